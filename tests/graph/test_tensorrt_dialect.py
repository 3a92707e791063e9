"""TensorRT's dialect of whole networks, run by onnxruntime for its numbers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported_cases import RELAXED, TIMESTEPS, Case
from min_max import feed, sqnr_db

from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.graph.quantize import quantize_onnx, write_half_onnx
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.step_scales import StepScales

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@pytest.fixture(params=["sd", "sdxl", "class"])
def case(request: pytest.FixtureRequest, exported: Callable[[str], Case]) -> Case:
    return exported(request.param)


@pytest.fixture(scope="module")
def lowered(exported: Callable[[str], Case]) -> dict[str, Path]:
    """The SDXL-like network without and with relaxed steps."""
    case = exported("sdxl")
    paths = {name: case.folder / f"tensorrt-{name}.onnx" for name in ("plain", "relaxed")}
    for path, bits in zip(paths.values(), (None, RELAXED), strict=True):
        scales, layers = case.calibrate(bits)
        quantize_onnx(case.float_path, scales, layers, path, "tensorrt")
    return paths


@torch.no_grad()
def float_output(denoiser: Denoiser, inputs: Inputs) -> np.ndarray:
    return denoiser(inputs).numpy()


@pytest.mark.parametrize("bits", [None, RELAXED])
def test_it_is_as_near_to_float_as_the_simulation(case: Case, bits: tuple[int, ...] | None) -> None:
    """float16 moves activations over rounding edges, so the noise differs from the simulation's; its size does not."""
    scales, layers = case.calibrate(bits)
    path = case.folder / f"tensorrt-{bits}" / "model.onnx"
    quantize_onnx(case.float_path, scales, layers, path, "tensorrt")
    calls = [
        case.inputs(batch, size) | {case.denoiser.timestep: torch.tensor(timestep)}
        for timestep in TIMESTEPS
        for batch, size in ((2, 8), (1, 12))
    ]
    with OnnxRuntimeEngine(path, threads=1) as engine:
        outputs = [engine.run(feed(inputs)) for inputs in calls]
    with Simulation(case.denoiser, layers, NEAREST_8) as simulation:
        simulate = simulated_call(simulation, scales, case.denoiser.timestep)
        simulations = [simulate(inputs).numpy() for inputs in calls]
    for inputs, output, simulated in zip(calls, outputs, simulations, strict=True):
        reference = float_output(case.denoiser, inputs)
        assert output.dtype == np.float32
        assert (
            sqnr_db(reference, output) > sqnr_db(reference, simulated) - 3
        )  # another draw: 0.6 dB here, of few outputs
        assert sqnr_db(simulated, output) > 20


def test_signature_is_unchanged(exported: Callable[[str], Case], lowered: dict[str, Path]) -> None:
    reference = ir.load(exported("sdxl").float_path).graph
    for path in lowered.values():
        graph = ir.load(path).graph
        for ours, theirs in zip((*graph.inputs, *graph.outputs), (*reference.inputs, *reference.outputs), strict=True):
            assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)


def test_relaxed_steps_repeat_no_layer_and_no_weight(lowered: dict[str, Path]) -> None:
    count = {name: Counter(node.op_type for node in ir.load(path).graph) for name, path in lowered.items()}
    for op_type in ("Conv", "MatMul", "Gemm", "QuantizeLinear", "DequantizeLinear", "Attention"):
        assert count["relaxed"][op_type] == count["plain"][op_type]
    assert count["plain"]["If"] == 0
    assert count["relaxed"]["If"] == 1
    plain, relaxed = (path.with_name(path.name + "_data").stat().st_size for path in lowered.values())
    assert relaxed == plain


def test_one_quantizer_per_tensor_and_one_unit_for_what_may_merge(
    exported: Callable[[str], Case], lowered: dict[str, Path]
) -> None:
    graph = ir.load(lowered["plain"]).graph
    products = {str(node.name).split("/product#")[0]: node for node in graph if "/product#" in str(node.name)}
    scales = exported("sdxl").scales
    assert products.keys() == scales.layers.keys()
    embedded = {node.inputs[0] for layer, node in products.items() if layer.endswith("time_emb_proj")}
    assert len(embedded) == 1  # every block computes the same SiLU of the time embedding: sites of its own, one tensor
    blocks = sum(site.endswith("time_emb_proj") for site in scales.sites)
    assert sum(node.op_type == "QuantizeLinear" for node in graph) == len(scales.sites) - (blocks - 1)
    for layer, node in products.items():
        assert node.inputs[0] is products[scales.layers[layer]].inputs[0]
    block = "mid_block.attentions.0.transformer_blocks.0.attn1."
    query, key, value = (products[f"{block}to_{name}"] for name in "qkv")
    assert query.inputs[0] is key.inputs[0] is value.inputs[0]
    units = {node.inputs[1].producer().inputs[1] for node in (query, key, value)}
    assert len(units) == 1


def test_scale_of_the_weights_is_one_power_of_two(lowered: dict[str, Path]) -> None:
    for node in ir.load(lowered["plain"]).graph:
        if str(node.name).split("#")[0].endswith("/weight_dq"):
            unit = node.inputs[1].const_value.numpy()
            assert unit.shape == ()
            assert unit.dtype == np.float16
            assert np.frexp(unit)[0] == 0.5
            assert node.inputs[0].dtype == ir.DataType.INT8


def test_the_timestep_stays_float32_until_its_sine(lowered: dict[str, Path]) -> None:
    session_types = typed(lowered["plain"])
    sines = [node for node in ir.load(lowered["plain"]).graph if node.op_type in ("Sin", "Cos")]
    assert sines
    for node in sines:
        assert session_types[str(node.inputs[0].name)] == FLOAT


def test_wide_tensors_are_float16(lowered: dict[str, Path]) -> None:
    types = typed(lowered["plain"])
    for node in ir.load(lowered["plain"]).graph:
        if node.op_type in (
            "Conv",
            "MatMul",
            "GroupNormalization",
            "LayerNormalization",
            "Attention",
            "Concat",
            "Resize",
        ):
            values = [node.inputs[0], node.outputs[0]]
            if types[str(node.outputs[0].name)] != ir.DataType.INT64:
                assert {types[str(value.name)] for value in values} == {HALF}, node.name


def typed(path: Path) -> dict[str, ir.DataType]:
    """Value -> type, as ONNX infers it."""
    import onnx  # onnx_ir has no inference of its own

    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=False)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    initializers = {tensor.name: ir.DataType(tensor.data_type) for tensor in model.graph.initializer}
    return initializers | {value.name: ir.DataType(value.type.tensor_type.elem_type) for value in values}


def test_same_input_same_bytes(exported: Callable[[str], Case], lowered: dict[str, Path]) -> None:
    case = exported("sdxl")
    scales, layers = case.calibrate(RELAXED)
    path = case.folder / "again" / lowered["relaxed"].name
    quantize_onnx(ir.load(case.float_path), scales, layers, path, "tensorrt")  # a model in memory gives the same file
    for name in (path.name, path.name + "_data"):
        assert (path.parent / name).read_bytes() == (lowered["relaxed"].parent / name).read_bytes()


def test_a_model_in_memory_is_left_as_it_was(exported: Callable[[str], Case], tmp_path: Path) -> None:
    case = exported("class")
    model = ir.load(case.float_path)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    quantize_onnx(model, case.scales, case.layers, tmp_path / "a.onnx", "tensorrt")
    write_half_onnx(model, tmp_path / "half.onnx")
    quantize_onnx(model, case.scales, case.layers, tmp_path / "b.onnx")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_float16_graph_is_the_network(case: Case) -> None:
    path = case.folder / "half.onnx"
    write_half_onnx(case.float_path, path)
    inputs = case.inputs()
    with OnnxRuntimeEngine(path, threads=1) as engine:
        assert sqnr_db(float_output(case.denoiser, inputs), engine.run(feed(inputs))) > 45  # float16 carries 11 bits
    weights = [v for v in ir.load(path).graph.initializers.values() if v.name.endswith(".half")]
    assert {value.dtype for value in weights} == {HALF}


def test_one_step_needs_no_table(exported: Callable[[str], Case], tmp_path: Path) -> None:
    case = exported("class")
    one = replace(
        case.scales,
        **{name: getattr(case.scales, name)[:1] for name in ("scale", "zero_point", "bits", "timesteps")},
    )
    quantize_onnx(case.float_path, one, case.layers, tmp_path / "model.onnx", "tensorrt")
    assert not [node for node in ir.load(tmp_path / "model.onnx").graph if "_row" in str(node.name)]


def test_a_constant_beyond_float16_is_refused(tmp_path: Path, exported: Callable[[str], Case]) -> None:
    case = exported("class")
    model = ir.load(case.float_path)
    value = next(
        v
        for v in model.graph.initializers.values()
        if v.dtype == FLOAT and "weight" in str(v.name) and "norm" in str(v.name)
    )
    value.const_value = ir.tensor(np.full(value.const_value.shape, 1e6, np.float32), name=value.name)
    with pytest.raises(PcrExportError, match=r"beyond float16.*export it for onnxruntime"):
        quantize_onnx(model, case.scales, case.layers, tmp_path / "model.onnx", "tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_a_vector_without_a_batch_axis_is_refused_on_relaxed_steps(tmp_path: Path) -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
    vector (float[4] x, float t) => (float[4] y)
    <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}> { y = MatMul(x, w) }""")
    for node in model.graph:
        node.metadata_props["pcr.module"] = "embed"
    scales = StepScales(
        scale=np.ones((2, 1), np.float32),
        zero_point=np.full((2, 1), 128, np.uint8),
        bits=np.array([10, 8], np.uint8),
        timesteps=np.array([900.0, 100.0], np.float32),
        sites=("embed",),
        layers={"embed": "embed"},
    )
    with pytest.raises(PcrExportError, match=r"embed reads a vector without a batch axis.*leave it out with --skip"):
        quantize_onnx(model, scales, [], tmp_path / "model.onnx", "tensorrt")
