import dataclasses

import numpy as np
import pytest

from pcr_export.errors import PcrExportError
from pcr_export.step_scales import StepScales, read_step_scales, write_step_scales


@pytest.fixture
def scales():
    random = np.random.default_rng(0)
    return StepScales(
        scale=random.uniform(0.01, 1, (3, 2)).astype(np.float32),
        zero_point=random.integers(0, 256, (3, 2)).astype(np.uint8),
        bits=np.array([10, 8, 8], np.uint8),
        timesteps=np.array([901.5, 500.0, 1.0], np.float32),
        sites=("a", "b"),
        layers={"b": "b", "a": "a", "c": "a"},
    )


def test_what_is_written_is_read(scales, tmp_path):
    write_step_scales(scales, tmp_path / "s.safetensors")
    read = read_step_scales(tmp_path / "s.safetensors")
    for name in ("scale", "zero_point", "bits", "timesteps"):
        np.testing.assert_array_equal(getattr(read, name), getattr(scales, name))
    assert (read.sites, dict(read.layers)) == (scales.sites, dict(scales.layers))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_same_scales_same_bytes(scales, tmp_path):
    write_step_scales(scales, tmp_path / "one")
    write_step_scales(dataclasses.replace(scales, layers=dict(reversed(scales.layers.items()))), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nearest_step(scales):
    assert [scales.nearest_step(t) for t in (999, 901.5, 701, 700, 499, 250, 0)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": np.zeros((3, 2), np.float32)}, "positive"),
        ({"timesteps": np.array([1, 2, 3], np.float32)}, "descending"),
        ({"bits": np.array([7, 8, 8], np.uint8)}, "bits"),
        ({"layers": {"a": "z"}}, "do not exist"),
        ({"zero_point": np.zeros((3, 2), np.int32)}, "zero_point must be uint8"),
    ],
)
def test_impossible_tables_are_refused(scales, change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(scales, **change)


def test_damaged_files_are_refused(scales, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(PcrExportError, match="export again"):
        read_step_scales(path)
    write_step_scales(scales, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole.replace(b'format\\": 1', b'format\\": 9')):
        path.write_bytes(damaged)
        with pytest.raises(PcrExportError, match="export again"):
            read_step_scales(path)
