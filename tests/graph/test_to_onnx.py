"""The float export: same numbers, free axes, module paths, same bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from class_conditional import class_conditional_denoiser
from exported_cases import Case
from min_max import feed
from small_denoisers import unet_inputs
from torch import Tensor, nn

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.graph.to_onnx import MODULE_KEY, export_float_onnx, save_model, trace_float_onnx
from pcr_export.models.denoiser import Denoiser

ROUNDING = 3 * 576 * 2**-24  # the longest float32 sums of these networks, in another order; values below 3


@pytest.fixture
def sdxl(exported: Callable[[str], Case]) -> tuple[Denoiser, Path]:
    case = exported("sdxl")
    return case.denoiser, case.float_path


def test_the_graph_computes_the_network_at_any_batch_and_size(sdxl: tuple[Denoiser, Path]) -> None:
    denoiser, path = sdxl
    with OnnxRuntimeEngine(path, threads=1) as engine:
        for batch, size in ((2, 8), (3, 12), (1, 8)):
            inputs = unet_inputs(denoiser, batch, size)
            with torch.no_grad():
                expected = denoiser(inputs).numpy()
            np.testing.assert_allclose(engine.run(feed(inputs)), expected, atol=ROUNDING)


def test_inputs_are_those_of_the_denoiser(sdxl: tuple[Denoiser, Path]) -> None:
    denoiser, path = sdxl
    graph = ir.load(path).graph
    assert [value.name for value in graph.inputs] == list(denoiser.dynamic_axes)
    assert [value.name for value in graph.outputs] == ["out_sample"]
    sample, timestep = graph.inputs[:2]
    assert [getattr(dim, "value", dim) for dim in sample.shape] == ["batch", 4, "height", "width"]
    assert len(timestep.shape) == 0
    assert timestep.dtype == ir.DataType.FLOAT
    assert [getattr(dim, "value", dim) for dim in graph.outputs[0].shape] == ["batch", 4, "height", "width"]


def test_nodes_know_their_module(sdxl: tuple[Denoiser, Path]) -> None:
    denoiser, path = sdxl
    products = [node for node in ir.load(path).graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    modules = {name for name, m in denoiser.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {node.metadata_props[MODULE_KEY] for node in products} == modules


def test_same_network_same_bytes_and_no_traces_of_this_machine(exported: Callable[[str], Case], tmp_path: Path) -> None:
    case = exported("class")
    export_float_onnx(class_conditional_denoiser(), case.inputs(), tmp_path / "model.onnx")
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / file).read_bytes() == (case.float_path.parent / file).read_bytes()
    text = case.float_path.read_bytes()
    assert b".py" not in text
    assert str(case.float_path.parent).encode() not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]


@pytest.mark.slow
def test_weights_are_the_networks_own_memory(exported: Callable[[str], Case]) -> None:
    case = exported("sdxl")
    parameters = dict(case.denoiser.network.named_parameters())
    model = trace_float_onnx(case.denoiser, case.inputs()).clone()
    transposed = 0
    for name, value in model.graph.initializers.items():
        parameter = parameters.get(name.removesuffix(".T"))
        if parameter is not None:
            expected = parameter.detach().T if name.endswith(".T") else parameter.detach()
            assert np.shares_memory(value.const_value.numpy(), parameter.detach().numpy()), name
            np.testing.assert_array_equal(value.const_value.numpy(), expected)
            transposed += name.endswith(".T")
    assert transposed > 20
    assert not any(node.op_type == "Transpose" and node.inputs[0].is_initializer() for node in model.graph)


def test_what_is_traced_and_cloned_is_what_is_exported(exported: Callable[[str], Case], tmp_path: Path) -> None:
    case = exported("sd")
    save_model(trace_float_onnx(case.denoiser, case.inputs()).clone(), tmp_path / "model.onnx")
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / file).read_bytes() == (case.float_path.parent / file).read_bytes()


class SharedWeight(nn.Module):
    """Two layers with one weight; the second one's product has rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1, 2)[..., :6]).sum(dim=1)) + t + label[:, None]


def test_layers_that_share_a_weight(tmp_path: Path) -> None:
    denoiser = replace(class_conditional_denoiser(), network=SharedWeight(), output_axes={0: "batch"})
    export_float_onnx(denoiser, class_inputs(), tmp_path / "model.onnx")
    inputs = class_inputs(batch=3)
    with OnnxRuntimeEngine(tmp_path / "model.onnx", threads=1) as engine, torch.no_grad():
        found = engine.run(feed(inputs))
        np.testing.assert_allclose(found, denoiser(inputs).numpy(), rtol=0, atol=ROUNDING)


def test_a_network_that_is_no_diffusers_model(exported: Callable[[str], Case]) -> None:
    case = exported("class")
    inputs = case.inputs(batch=3)
    with torch.no_grad():
        expected = case.denoiser(inputs).numpy()
    with OnnxRuntimeEngine(case.float_path, threads=1) as engine:
        np.testing.assert_allclose(engine.run(feed(inputs)), expected, atol=ROUNDING)


def class_inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, 3, 16, 16, generator=generator),
        "t": torch.tensor(500.0),
        "label": torch.arange(batch) % 5,
    }


def test_a_missing_input_is_refused(tmp_path: Path) -> None:
    inputs = class_inputs()
    del inputs["label"]
    with pytest.raises(PcrExportError, match="lacks input label"):
        export_float_onnx(class_conditional_denoiser(), inputs, tmp_path / "model.onnx")


def test_a_dynamic_axis_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="axis 0 of x is dynamic: give an example with a size of at least 2"):
        export_float_onnx(class_conditional_denoiser(), class_inputs(batch=1), tmp_path / "model.onnx")


def test_a_timestep_with_an_axis_is_refused(tmp_path: Path) -> None:
    inputs = class_inputs() | {"t": torch.tensor([500.0])}
    with pytest.raises(PcrExportError, match="t must be a rank-0 float32 tensor"):
        export_float_onnx(class_conditional_denoiser(), inputs, tmp_path / "model.onnx")


class Branching(nn.Module):
    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x if x.sum() > 0 else x + t + label.sum()


def test_a_network_that_cannot_be_traced_is_refused_in_one_line(tmp_path: Path) -> None:
    denoiser = replace(class_conditional_denoiser(), network=Branching())
    with pytest.raises(PcrExportError, match=r"cannot be exported to ONNX with batch, height, width free") as caught:
        export_float_onnx(denoiser, class_inputs(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
