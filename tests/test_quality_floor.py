"""Exit code 3 and its two causes: a graph that computes something else, and a quantization that loses the network."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError
from pcr_export.export import finish, quantize_denoiser
from pcr_export.export_validation import validate_artifact
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.denoiser import Denoiser
from pcr_export.qdiffbench.fidelity import MARGIN_DB, MOST_ASKED_DB, asked_of_artifact

LABELS = [0, 1, 2, 3]


@functools.cache
def float_graph() -> ir.Model:
    denoiser = class_conditional_denoiser()
    return trace_float_onnx(denoiser, next(denoiser.walk(LABELS[:2], [0, 1])))


def job(folder: Path, denoiser: Denoiser | None = None, **settings: Any) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **settings)
    network = denoiser or class_conditional_denoiser()
    graph = None if denoiser else float_graph
    return Job(denoiser=network, recipe=recipe, conditions=LABELS, folder=folder, float_graph=graph)


def swap_rows(path: Path, layer: str) -> None:
    """Two output channels of a layer change some of their weights: a small part of what a split does that counts from a wrong row."""
    tensor = ir.load(path).graph.initializers[f"{layer}.weight_q"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    data = np.memmap(path.with_name("model.onnx_data"), np.int8, "r+", tensor.offset or 0, tuple(tensor.shape))
    quarter = len(data) // 4  # of each channel's weights
    data[:quarter, :2] = np.array(data[:quarter, 1::-1])
    data.flush()


def test_wrong_rows_of_one_layer_are_told_from_rounding(tmp_path: Path) -> None:
    asked = job(tmp_path)
    exported = quantize_denoiser(asked)
    right = finish(asked, exported, validate_artifact(asked, exported))
    assert right["fidelity"]["asked_per_step"] == asked_of_artifact(right["fidelity"]["rounding_floor_per_step"])
    (tmp_path / ".stages" / "validate.json").unlink()
    swap_rows(tmp_path / "unet" / "model.onnx", "middle.conv")
    with pytest.raises(PcrExportError, match=r"not compute what was calibrated.*worst sites: .*report it") as refused:
        finish(asked, exported, validate_artifact(asked, exported))
    assert refused.value.exit_code == 3
    (given,) = re.findall(r"only ([\d.]+) dB", str(refused.value))
    assert float(given) > 20  # which the constant floor of before let pass
    tolerant = replace(asked, recipe=replace(asked.recipe, min_sqnr_db=10.0))  # an explicit number wins
    assert finish(tolerant, exported, validate_artifact(tolerant, exported))


def with_an_outlier() -> Denoiser:
    """One channel dwarfs the others and nothing reads it: exact in float, lost on one grid for all channels."""
    denoiser = class_conditional_denoiser()
    network = denoiser.network
    with torch.no_grad():
        network.get_submodule("down.conv").bias[0] = 3e4
        network.get_submodule("stride").weight[:, 0] = 0
        network.get_submodule("merge").weight[:, 0] = 0
    return denoiser


def test_a_lost_network_is_told_from_a_wrong_graph_and_its_layers_are_named(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match=r"quantization loses the network.*leave the layers float") as refused:
        export_denoiser(job(tmp_path, with_an_outlier()))
    assert refused.value.exit_code == 3
    named = re.findall(r"--skip (\S+?)[ )]", str(refused.value))
    assert {"merge", "stride"} <= set(named)
    mended = export_denoiser(job(tmp_path, with_an_outlier(), skip=("conv_in", "conv_out", *named)))
    assert mended["fidelity"]["simulation_vs_fp32_sqnr_db"] > 10
    assert "worst_layers" not in mended["fidelity"]


@pytest.mark.parametrize(
    ("floors", "asked"),
    [
        ([30.0, 30.0], [30 - MARGIN_DB] * 2),
        (
            [None, None],
            [MOST_ASKED_DB] * 2,
        ),  # no activation fell to the other side: of one that does little may be left
        ([140.0, 80.0], [MOST_ASKED_DB] * 2),
        ([None, 30.0], [33.01 - MARGIN_DB, 30 - MARGIN_DB]),  # where none fell, by chance, the mean of the calls
        ([], []),
    ],
)
def test_what_is_asked_of_an_artifact(floors: list[float | None], asked: list[float]) -> None:
    assert asked_of_artifact(floors) == pytest.approx(asked, abs=0.01)
