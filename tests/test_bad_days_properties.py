"""Properties: every reader gives a value or one line whatever bytes it meets, and integers stand for what they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines.small_record import small_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcr_export.calibrate.ranges import Quantizer, quantize, quantize_dequantize, quantizer_from_range
from pcr_export.calibrate.state import CalibrationState, CallRecord
from pcr_export.calibrate.weights.block_inputs import read_block_call
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.calibrate.weights.rounding import LearnedRounding, write_rounded
from pcr_export.engines.engine_record import read_engine_record, write_engine_record
from pcr_export.engines.onnx_files import onnx_sha256
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import read_json, read_model_index
from pcr_export.models.check_folder import check_folder
from pcr_export.prompt_sets import READERS as PROMPT_READERS
from pcr_export.prompts import read_prompts
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.images import read_images, write_png
from pcr_export.recipe import Recipe, parse_bits, parse_keep, parse_observed_steps, read_recipe, recipe_from_json
from pcr_export.relaxed_steps import parse_relaxed_steps, searched_mean_bits
from pcr_export.stages import Stages
from pcr_export.step_scales import StepScales, read_step_scales, write_step_scales

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RECIPE = Recipe(model="m", num_inference_steps=3, guidance_scale=1.0, height=16, width=16)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def good_recipe(folder: Path) -> Path:
    (folder / "recipe.json").write_text(RECIPE.to_json())
    return folder / "recipe.json"


def good_scales(folder: Path) -> Path:
    scales = StepScales(
        scale=np.ones((2, 1), np.float32),
        zero_point=np.full((2, 1), 128, np.uint8),
        bits=np.array([8, 9], np.uint8),
        timesteps=np.array([9, 3], np.float32),
        sites=("a",),
        layers={"a": "a"},
    )
    write_step_scales(scales, folder / "step_scales.safetensors")
    return folder / "step_scales.safetensors"


def good_state(folder: Path) -> Path:
    CalibrationState(folder, "key").write(0, CallRecord([torch.zeros(2)], {"a": Quantizer(1.0, 128)}))
    return folder / "call_00000.safetensors"


def good_learned(folder: Path) -> Path:
    path = folder / "block_00000.safetensors"
    write_rounded({"a": (np.ones((2, 3), np.int8), np.ones(2, np.float32))}, path)
    return path


def good_record(folder: Path) -> Path:
    write_engine_record(folder / "sm89.json", small_record())
    return folder / "sm89.json"


def good_index(folder: Path) -> Path:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder / "model_index.json"


def good_image(folder: Path) -> Path:
    write_png(np.zeros((4, 4, 3), np.uint8), folder / "00000.png")
    return folder / "00000.png"


def good_stamp(folder: Path) -> Path:
    Stages(folder, resume=False).run("stage", {"a": "b"}, [], lambda: {"x": 1})
    return folder / "stage.json"


def good_report(folder: Path) -> Path:
    good_scales(folder)
    (folder / "report.json").write_text(
        json.dumps({"format": 1, "recipe": {"weight_bits": 8}, "model": "m", "sites": []})
    )
    return folder / "report.json"


def good_graph(folder: Path) -> Path:
    """No graph is parsed from text here: an empty model is one, too."""
    (folder / "model.onnx").write_bytes(b"\x08\x0a:\x03\x12\x01g")
    return folder / "model.onnx"


Make, Read = Callable[[Path], Path], Callable[[Path], object]
FORMATS: dict[str, tuple[Make, Read]] = {
    "recipe": (good_recipe, lambda path: read_recipe(path.parent)),
    "step scales": (good_scales, read_step_scales),
    "calibration state": (good_state, lambda path: CalibrationState(path.parent, "key").read()),
    "learned weights": (
        good_learned,
        lambda path: LearnedRounding(path.parent)("a", np.ones((2, 3), np.float32)),
    ),
    "block inputs": (good_state, lambda path: read_block_call(path.parent, "a")),
    "engine record": (good_record, read_engine_record),
    "model index": (good_index, lambda path: read_model_index(path.parent)),
    "model folder": (good_index, lambda path: check_folder(path.parent)),
    "any JSON": (good_index, read_json),
    "image": (good_image, lambda path: read_images(path.parent, 0, 1)),
    "stamp": (good_stamp, lambda path: Stages(path.parent).run("stage", {"a": "b"}, [], dict)),
    "report": (good_report, lambda path: write_html_report(path.parent)),
    "graph": (good_graph, onnx_sha256),
}


def value_or_line(read: Callable[[], object]) -> None:
    """Anything but a value or one line for a person is a failure."""
    try:
        read()
    except PcrExportError as error:
        message = str(error)
    else:
        return
    assert message


@pytest.mark.parametrize("name", FORMATS)
@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(name: str, tmp_path: Path, data: bytes) -> None:
    make, read = FORMATS[name]
    path = make(tmp_path)
    path.write_bytes(data)
    value_or_line(lambda: read(path))


@pytest.mark.parametrize("name", FORMATS)
@quick
@given(data=st.data())
def test_a_good_file_with_some_bytes_changed(name: str, tmp_path: Path, data: st.DataObject) -> None:
    make, read = FORMATS[name]
    path = make(tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    value_or_line(lambda: read(path))


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name in ("recipe", "engine record", "model index", "model folder", "report")]
)
@quick
@given(data=st.data())
def test_a_good_file_with_some_fields_changed(name: str, tmp_path: Path, data: st.DataObject) -> None:
    make, read = FORMATS[name]
    path = make(tmp_path)
    content = json.loads(path.read_text())
    for field in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3)):
        content[field] = data.draw(plain)
    path.write_text(json.dumps(content))
    value_or_line(lambda: read(path))


@pytest.mark.parametrize("suffix", [".txt", *PROMPT_READERS])
@quick
@given(
    content=st.binary(max_size=100)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | plain.map(lambda value: json.dumps(value).encode())
)
def test_any_prompts_file(suffix: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    value_or_line(lambda: read_prompts(path))


@quick
@given(
    text=st.text(max_size=12) | st.from_regex(r"(auto|first|last|w|uniform|normal|0)[:0-9.,%a]{0,40}", fullmatch=True)
)
def test_any_text_of_an_option(text: str) -> None:
    for parse in (
        lambda: parse_relaxed_steps(text, 5),
        lambda: searched_mean_bits(text, 10),
        lambda: parse_bits(text),
        lambda: parse_keep(text),
        lambda: parse_observed_steps(text, 5),
        lambda: recipe_from_json(text),
    ):
        value_or_line(parse)


@quick
@given(value=plain)
def test_any_field_of_a_recipe(value: object) -> None:
    fields = json.loads(RECIPE.to_json())
    for name in fields:
        value_or_line(lambda name=name: recipe_from_json(json.dumps({**fields, name: value})))


activations = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


@quick
@given(values=activations, affine=st.booleans())
def test_a_value_in_range_is_within_half_a_step(values: list[float], affine: bool) -> None:
    """|dequantize(quantize(x)) - x| <= scale / 2, and of the range itself 0 is kept exactly."""
    x = torch.tensor([*values, 0.0], dtype=torch.float64)
    quantizer = quantizer_from_range(float(x.min()), float(x.max()), affine=affine)
    q = quantize(x, quantizer.scale, quantizer.zero_point)
    assert torch.equal(q, q.round())
    assert ((q + quantizer.zero_point >= 0) & (q + quantizer.zero_point <= 255)).all()
    error = (quantize_dequantize(x, quantizer.scale, quantizer.zero_point) - x).abs()
    # the zero point is rounded, too: of an affine grid the end of the range may lie one half more outside
    assert (error <= quantizer.scale * ((1.0 if affine else 0.5) + 1e-6)).all()
    assert error[-1] == 0


@quick
@given(
    values=activations,
    scale=st.floats(2.0**-10, 2.0**10, width=32),
    zero_point=st.integers(0, 255),
    bits=st.integers(8, 15),
)
def test_what_is_on_the_grid_stays(values: list[float], scale: float, zero_point: int, bits: int) -> None:
    """Quantizing again changes nothing, more bits never lose, and inside the range the error is half a step of the finer grid."""
    x = torch.tensor(values, dtype=torch.float64)
    once = quantize_dequantize(x, scale, zero_point, bits)
    assert torch.equal(quantize_dequantize(once, scale, zero_point, bits), once)
    inside = (x / scale >= -zero_point) & (x / scale <= 255 - zero_point)
    step = scale / 2 ** (bits - 8)
    tolerance = (
        step / 2 if bits == 8 else step
    )  # the second digit ends at 127: x just below half a coarse step is a step off
    assert ((once - x).abs()[inside] <= tolerance * (1 + 1e-9)).all()


@quick
@given(
    rows=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    bits=st.integers(2, 8),
)
def test_weights_are_integers_of_their_bits(rows: list[list[float]], bits: int) -> None:
    """Within +-(2^(bits-1) - 1), and no further from the weight than half a step inside the clip."""
    weight = np.array(rows, np.float32)
    q, scale = quantize_weight(weight, bits)
    limit = 2 ** (bits - 1) - 1
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    assert (np.abs(q.astype(int)) <= limit).all()
    assert (np.isfinite(scale) & (scale > 0)).all()
    back = q * scale[:, None].astype(np.float64)
    inside = np.abs(weight) <= limit * scale[:, None].astype(np.float64)
    assert (
        np.abs(back - weight)[inside] <= (scale[:, None].astype(np.float64) * 0.5001 + 1e-30).repeat(3, 1)[inside]
    ).all()
