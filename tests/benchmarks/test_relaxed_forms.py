"""Every form that holds 8-bit and relaxed steps computes what the shipped one does; none stores a weight twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graph.min_max import feed, min_max_scales, sqnr_db
from graph.small_denoisers import unet_denoiser, unet_inputs, zoo_denoiser

from benchmarks.relaxed_form_passes import FORMS, LENGTH_APART, PLANES, TWO_PROFILES, WHOLE_IF, register_forms
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import trace_float_onnx

TIMESTEPS, BITS = (900.0, 600.0, 300.0), (10, 10, 8)
SHIPPED = "tensorrt"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single layers, so that no rounding is passed on: the graph of each form."""
    denoiser = zoo_denoiser()
    inputs = {"x": torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": torch.tensor(0.0)}
    return _written(denoiser, inputs, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    denoiser = unet_denoiser("sdxl")
    return _written(denoiser, unet_inputs(denoiser), tmp_path_factory.mktemp("unet"))


def _written(denoiser, inputs, folder: Path) -> dict[str, Path]:
    register_forms()
    scales, layers = min_max_scales(denoiser, inputs, TIMESTEPS, bits=BITS)
    model = trace_float_onnx(denoiser, inputs)
    paths = {form: folder / form / "model.onnx" for form in (SHIPPED, *FORMS)}
    for form, path in paths.items():
        quantize_onnx(model, scales, layers, path, dialect=form)
    return paths


def _run(path: Path, inputs, timestep: float, planes: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = feed(inputs, timestep=torch.tensor(timestep)) | {PLANES: np.arange(planes)}
    return session.run(None, {each.name: given[each.name] for each in session.get_inputs()})[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("timestep", "bits"), list(zip(TIMESTEPS, BITS, strict=True)))
def test_each_layer_computes_what_it_does_in_the_shipped_form(zoo, form: str, timestep: float, bits: int) -> None:
    inputs = {"x": torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(1))}
    planes = 2 if bits > 8 else 1
    wanted = _run(zoo[SHIPPED], inputs, timestep, planes)
    assert sqnr_db(wanted, _run(zoo[form], inputs, timestep, planes)) > 65  # float16's last place is at 66 dB


@pytest.mark.parametrize("form", FORMS)
def test_only_the_form_with_profiles_has_another_signature(unet, form: str) -> None:
    shipped, other = (ir.load(unet[name]).graph.inputs for name in (SHIPPED, form))
    added = [PLANES] if form == TWO_PROFILES else []
    assert [value.name for value in other] == [value.name for value in shipped] + added


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_stored_once(unet, form: str) -> None:
    assert _int8_bytes(unet[form]) == _int8_bytes(unet[SHIPPED])


def _int8_bytes(path: Path) -> int:
    weights = ir.load(path).graph.initializers.values()
    return sum(value.const_value.nbytes for value in weights if value.dtype == ir.DataType.INT8)


def test_forms_are_built_as_they_are_called(unet) -> None:
    def kinds(form: str, wanted: Callable[[ir.Node], bool]) -> int:
        return sum(wanted(node) for node in ir.load(unet[form]).graph)

    def is_if(node: ir.Node) -> bool:
        return node.op_type == "If"

    assert {form: kinds(form, is_if) for form in unet} == {SHIPPED: 1, LENGTH_APART: 1, TWO_PROFILES: 0, WHOLE_IF: 1}
    assert (
        kinds(WHOLE_IF, lambda node: node.op_type in ("QuantizeLinear", "Attention")) == 0
    )  # they stand in the branches
    assert kinds(LENGTH_APART, lambda node: node.op_type == "QuantizeLinear") > 0
