"""Records of finished calls: what belongs is kept, what does not is written again."""

import pytest
import torch

from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.state import CalibrationState, CallRecord
from pcr_export.errors import PcrExportError


def record(value: float) -> CallRecord:
    return CallRecord([torch.full((2, 3), value)], {"site": Quantizer(0.5, 128)})


def test_records_before_a_foreign_one_are_kept(tmp_path):
    state, other = CalibrationState(tmp_path, "mine"), CalibrationState(tmp_path, "other")
    for index in range(4):
        state.write(index, record(index))
    other.write(2, record(9))
    kept = state.read()
    assert [float(each.outputs[0][0, 0]) for each in kept] == [0, 1]
    assert other.read() == []
    state.write(2, record(5))
    assert [float(each.outputs[0][0, 0]) for each in state.read()] == [0, 1, 5, 3]


def test_a_damaged_record_is_named(tmp_path):
    state = CalibrationState(tmp_path, "mine")
    state.write(0, record(0))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PcrExportError, match=r"call_00000\.safetensors is damaged"):
        state.read()
