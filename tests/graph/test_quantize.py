"""The quantizing job on whole networks: against the torch simulation, its bytes, its report, its refusals."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported_cases import RELAXED, TIMESTEPS, Case
from min_max import feed, min_max_scales, sqnr_db
from torch import Tensor, nn

from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.weights.rounding import NEAREST_8, NearestRounding
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer


@pytest.fixture(params=["sd", "sdxl", "class"])
def case(request: pytest.FixtureRequest, exported: Callable[[str], Case]) -> Case:
    return exported(request.param)


@pytest.fixture
def sdxl(exported: Callable[[str], Case]) -> Case:
    return exported("sdxl")


@pytest.mark.parametrize("bits", [None, RELAXED])
def test_the_artifact_computes_the_simulation(case: Case, bits: tuple[int, ...] | None) -> None:
    scales, layers = case.calibrate(bits)
    path = case.folder / f"{bits}" / "model.onnx"
    report = quantize_onnx(case.float_path, scales, layers, path)
    assert report.layers == tuple(sorted(scales.layers))
    reference = copy.deepcopy(case.denoiser.network)
    with OnnxRuntimeEngine(path, threads=1) as engine, Simulation(case.denoiser, layers, NEAREST_8) as simulation:
        simulate = simulated_call(simulation, scales, case.denoiser.timestep)
        for timestep in TIMESTEPS:
            for batch, size in ((2, 8), (1, 12)):
                inputs = case.inputs(batch, size) | {case.denoiser.timestep: torch.tensor(timestep)}
                simulated = simulate(inputs).numpy()
                # The integers are exact (test_integers.py), but a float sum in another order moves an activation over a
                # rounding edge now and then; layer by layer that grows to a part of the quantization noise, never above.
                distance = sqnr_db(simulated, engine.run(feed(inputs)))
                assert distance > 30
                assert distance > sqnr_db(float_output(replace(case.denoiser, network=reference), inputs), simulated)


@pytest.mark.parametrize("bits", [None, RELAXED])
def test_4_bit_weights_lie_packed_in_the_file_and_compute_the_same(sdxl: Case, bits: tuple[int, ...] | None) -> None:
    scales, layers = sdxl.calibrate(bits)
    kept = sorted(scales.layers)[0]

    def rounding(layer: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """To nearest, with -8 in the place of -7: learned weights have all 16 integers."""
        q, scale = NearestRounding(4, {kept: 8})(layer, weight)
        return (q if layer == kept else np.where(q == -7, np.int8(-8), q)), scale

    path, wide = (sdxl.folder / name / "model.onnx" for name in ("w4", "w8"))
    report, other = (
        quantize_onnx(sdxl.float_path, scales, layers, *each) for each in ((path, "onnxruntime", rounding), (wide,))
    )
    initializers = ir.load(path).graph.initializers
    integers = {
        dtype: [v for v in initializers.values() if v.dtype == dtype] for dtype in (ir.DataType.INT4, ir.DataType.INT8)
    }
    assert {value.name for value in integers[ir.DataType.INT8]} == {f"{kept}.weight_q"}
    for value in integers[ir.DataType.INT4]:
        tensor = value.const_value
        assert not isinstance(tensor, ir.ExternalTensor) or tensor.length == -(-tensor.size // 2)
    assert report.onnx_bytes < other.onnx_bytes
    with OnnxRuntimeEngine(path, threads=1) as engine, Simulation(sdxl.denoiser, layers, rounding) as simulation:
        simulate = simulated_call(simulation, scales, "timestep")
        for timestep in TIMESTEPS:
            inputs = sdxl.inputs() | {"timestep": torch.tensor(timestep)}
            assert sqnr_db(simulate(inputs).numpy(), engine.run(feed(inputs))) > 30


@torch.no_grad()
def float_output(denoiser: Denoiser, inputs: Inputs) -> np.ndarray:
    return denoiser(inputs).numpy()


def test_relaxing_brings_the_artifact_nearer_to_float(sdxl: Case) -> None:
    distance = {}
    for bits in (None, RELAXED):
        scales, layers = sdxl.calibrate(bits)
        quantize_onnx(sdxl.float_path, scales, layers, sdxl.folder / "model.onnx")
        inputs = sdxl.inputs() | {"timestep": torch.tensor(TIMESTEPS[0])}
        with OnnxRuntimeEngine(sdxl.folder / "model.onnx", threads=1) as engine, torch.no_grad():
            distance[bits] = sqnr_db(sdxl.denoiser(inputs).numpy(), engine.run(feed(inputs)))
    assert distance[RELAXED] > distance[None] + 3


def test_16_bits_leave_only_the_error_of_the_weights(sdxl: Case) -> None:
    """Two digits at every step: the artifact is the float network with rounded weights, which 8 bits are far from."""
    inputs = sdxl.inputs() | {"timestep": torch.tensor(TIMESTEPS[0])}
    distance = {}
    for bits in (8, 16):
        scales, layers = sdxl.calibrate((bits,) * len(TIMESTEPS))
        quantize_onnx(sdxl.float_path, scales, layers, sdxl.folder / "model.onnx")
        with Simulation(sdxl.denoiser, layers, NEAREST_8) as simulation:
            only_weights = simulation.run(inputs).numpy()
        with OnnxRuntimeEngine(sdxl.folder / "model.onnx", threads=1) as engine:
            distance[bits] = sqnr_db(only_weights, engine.run(feed(inputs)))
    assert distance[16] > 60 > 50 > distance[8]


class Perceptron(nn.Module):
    """No picture, no use of the timestep, and a quantized layer that makes the output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 40)
        self.last = nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.first(x)))


@pytest.mark.parametrize("bits", [None, RELAXED])
def test_a_quantized_layer_may_make_the_output(tmp_path: Path, bits: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(
        network=Perceptron().eval(),
        call=lambda network, inputs: network(inputs["x"], inputs["timestep"]),
        walk=lambda conditions, seeds: iter(()),
        timesteps=(),
        dynamic_axes={"x": {0: "batch"}, "timestep": {}},
        output="y",
    )
    inputs = {"x": torch.randn(5, 8), "timestep": torch.tensor(TIMESTEPS[0])}
    scales, layers = min_max_scales(denoiser, inputs, TIMESTEPS, bits=bits, skip=())
    export_float_onnx(denoiser, inputs, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", scales, layers, tmp_path / "model.onnx")
    # A silu that differs in its last digit may fall on the other side of a rounding edge: one unit of one input of a sum.
    site = scales.sites.index(scales.layers["last"])
    unit = scales.scale[0, site] * denoiser.network.last.weight.abs().max().item()
    with (
        OnnxRuntimeEngine(tmp_path / "model.onnx", threads=1) as engine,
        Simulation(denoiser, layers, NEAREST_8) as simulation,
    ):
        assert engine.session.get_outputs()[0].name == "y"
        simulated = simulated_call(simulation, scales, "timestep")(inputs).numpy()
        assert unit < 0.05 * np.abs(simulated).max()
        np.testing.assert_allclose(engine.run(feed(inputs)), simulated, atol=unit + 1e-5)


def test_same_input_same_bytes(sdxl: Case) -> None:
    for bits in (None, RELAXED):
        scales, layers = sdxl.calibrate(bits)
        for name in ("a", "b"):
            quantize_onnx(sdxl.float_path, scales, layers, sdxl.folder / name / "model.onnx")
        for file in ("model.onnx", "model.onnx_data"):
            assert (sdxl.folder / "a" / file).read_bytes() == (sdxl.folder / "b" / file).read_bytes()
        assert sorted(path.name for path in (sdxl.folder / "a").iterdir()) == ["model.onnx", "model.onnx_data"]


def test_the_graph_is_integer_and_carries_its_weights_once(sdxl: Case) -> None:
    plain = quantize_onnx(sdxl.float_path, sdxl.scales, sdxl.layers, sdxl.folder / "plain.onnx")
    graph = ir.load(sdxl.folder / "plain.onnx").graph
    count = Counter(node.op_type for node in graph)
    assert "If" not in count
    assert count["Conv"] == 2  # conv_in and conv_out
    assert count["Gemm"] == 0
    assert count["MatMulIntegerToFloat"] >= len(sdxl.scales.layers)
    assert count["QuantizeLinear"] >= plain.quantizers > 0
    assert [value.name for value in graph.inputs] == list(sdxl.denoiser.dynamic_axes)
    relaxed_scales, layers = sdxl.calibrate(RELAXED)
    relaxed = quantize_onnx(sdxl.float_path, relaxed_scales, layers, sdxl.folder / "relaxed.onnx")
    assert Counter(node.op_type for node in ir.load(sdxl.folder / "relaxed.onnx").graph)["If"] == 1
    assert relaxed.quantizers == plain.quantizers
    sizes = [(sdxl.folder / f"{name}.onnx_data").stat().st_size for name in ("plain", "relaxed")]
    assert sizes[0] == sizes[1]


def test_attention_and_pictures_need_no_transposes_but_at_the_float_convolutions(sdxl: Case) -> None:
    quantize_onnx(sdxl.float_path, sdxl.scales, sdxl.layers, sdxl.folder / "model.onnx")
    transposes = [node for node in ir.load(sdxl.folder / "model.onnx").graph if node.op_type == "Transpose"]
    pictures = [node for node in transposes if "indices" not in str(node.name)]  # those are a few integers
    perms = [tuple(node.attributes["perm"].value) for node in pictures if "to_" in str(node.name)]
    assert perms.count((0, 3, 1, 2)) == 1
    assert not [node for node in pictures if tuple(node.attributes["perm"].value) == (0, 2, 1, 3)]


def test_a_layer_that_the_graph_lacks_is_named(sdxl: Case, tmp_path: Path) -> None:
    stranger = replace(sdxl.scales, layers={**sdxl.scales.layers, "mid_block.nowhere": sdxl.scales.sites[0]})
    with pytest.raises(
        PcrExportError,
        match=r"no node of the float graph computes mid_block\.nowhere, .*take both from the same network",
    ):
        quantize_onnx(sdxl.float_path, stranger, sdxl.layers, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_no_layer_at_all_is_refused(sdxl: Case, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="calibrate again"):
        quantize_onnx(sdxl.float_path, replace(sdxl.scales, layers={}), sdxl.layers, tmp_path / "model.onnx")


def test_a_layer_with_scales_and_a_reason_is_refused(sdxl: Case, tmp_path: Path) -> None:
    name = sorted(sdxl.scales.layers)[0]
    layers = [Layer(name=name, op="Linear", site=None, reason="too sensitive")]
    with pytest.raises(PcrExportError, match=f"{name} has scales but is to stay float"):
        quantize_onnx(sdxl.float_path, sdxl.scales, layers, tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_an_unreadable_float_graph_is_refused(sdxl: Case, tmp_path: Path, content: bytes | None) -> None:
    """An empty file is an empty graph."""
    path = tmp_path / "float.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PcrExportError, match=r"export the model again|must have one rank-0 input"):
        quantize_onnx(path, sdxl.scales, sdxl.layers, tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize("size", [None, 5000])
def test_missing_weights_are_refused(sdxl: Case, tmp_path: Path, size: int | None) -> None:
    (tmp_path / "model.onnx").write_bytes(sdxl.float_path.read_bytes())
    if size is not None:
        (tmp_path / "model.onnx_data").write_bytes(bytes(size))
    with pytest.raises(PcrExportError, match=r"is (missing|.*cut short): export the model again"):
        quantize_onnx(tmp_path / "model.onnx", sdxl.scales, sdxl.layers, tmp_path / "out" / "model.onnx")


def test_a_damaged_weight_is_named(sdxl: Case, tmp_path: Path) -> None:
    for file in ("model.onnx", "model.onnx_data"):
        (tmp_path / file).write_bytes((sdxl.float_path.parent / file).read_bytes())
    data = np.memmap(tmp_path / "model.onnx_data", np.float32, "r+")
    data[:] = np.nan
    data.flush()
    with pytest.raises(PcrExportError, match="NaN or infinite values: the model's weights are damaged"):
        quantize_onnx(tmp_path / "model.onnx", sdxl.scales, sdxl.layers, tmp_path / "out" / "model.onnx")
    assert list((tmp_path / "out").iterdir()) == []
