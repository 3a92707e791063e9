"""Requests within bounds, painted together, each image that of `generate`."""

from __future__ import annotations

import functools
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import transformers
from deploy.conftest import ExportedFolder

from pcr_export.deploy.run import generate, load_exported_model
from pcr_export.deploy.triton_networks import CallModel
from pcr_export.deploy.triton_repository import write_triton_repository
from pcr_export.deploy.triton_requests import (
    Picture,
    RequestCancelledError,
    error_of,
    load_served_model,
    paint_requests,
    read_pictures,
)
from pcr_export.errors import PcrExportError, PromptWarning
from pcr_export.models.denoiser import sample
from pcr_export.models.load import LoadedModel
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.qdiffbench.images import to_uint8


@pytest.fixture(scope="module")
def model(sdxl: ExportedFolder) -> LoadedModel:
    return load_exported_model(sdxl.folder, threads=1)


@pytest.fixture(scope="module")
def served(sdxl: ExportedFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path_factory.mktemp("served") / "exported"))
    write_triton_repository(folder)
    return folder


def run_beside(folder: Path) -> CallModel:
    """What runs the networks in a server's place."""

    open_session = functools.cache(onnxruntime.InferenceSession)

    def call(name: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        session = open_session(folder / name / "model.onnx")
        shapes = {value.name: value.shape for value in session.get_inputs()}
        feed = {port: array if shapes[port] else array.reshape(()) for port, array in inputs.items()}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return call


def column(*values: object) -> np.ndarray:
    return np.array(values, dtype=object if isinstance(values[0], bytes) else None).reshape(-1, 1)


def picture(prompt: str = "a red star", seed: int = 0, steps: int = 2, guidance: float = 5.0) -> Picture:
    return Picture(prompt=prompt, negative_prompt="", seed=seed, steps=steps, guidance_scale=guidance)


def never(_request: int) -> bool:
    return False


def test_defaults_are_the_exports(model: LoadedModel) -> None:
    (read,) = read_pictures({"PROMPT": column("grün".encode())}, model)
    assert read == Picture(prompt="grün", negative_prompt="", seed=0, steps=50, guidance_scale=5.0)


def test_every_row_has_its_own(model: LoadedModel) -> None:
    inputs = {
        "PROMPT": column(b"a", b"b"),
        "NEGATIVE_PROMPT": column(b"", b"red"),
        "SEED": column(2**63 - 1, 2**40),
        "STEPS": column(1, 1000),
        "GUIDANCE_SCALE": column(0.0, 100.0),
    }
    first, second = read_pictures(inputs, model)
    assert first == Picture(prompt="a", negative_prompt="", seed=2**63 - 1, steps=1, guidance_scale=0.0)
    assert second == Picture(prompt="b", negative_prompt="red", seed=2**40, steps=1000, guidance_scale=100.0)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("PROMPT", b"x" * 4097, "PROMPT has 4097 bytes: give 4096 or fewer"),
        ("PROMPT", b"\xff\xfe", "PROMPT is no UTF-8"),
        ("NEGATIVE_PROMPT", b"x" * 10_000_000, "NEGATIVE_PROMPT has 10000000 bytes"),
        ("SEED", -1, "SEED is -1: give 0 to 9223372036854775807"),
        ("STEPS", 0, "STEPS is 0: give 1 to 1000"),
        ("STEPS", 1001, "STEPS is 1001"),
        ("GUIDANCE_SCALE", float("nan"), "GUIDANCE_SCALE is nan: give 0 to 100"),
        ("GUIDANCE_SCALE", float("inf"), "GUIDANCE_SCALE is inf"),
        ("GUIDANCE_SCALE", -1.0, r"GUIDANCE_SCALE is -1\.0"),
    ],
)
def test_out_of_bounds(model: LoadedModel, name: str, value: object, match: str) -> None:
    with pytest.raises(PcrExportError, match=match):
        read_pictures({"PROMPT": column(b"a"), name: column(value)}, model)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, "PROMPT is missing: give one for each image"),
        ({"PROMPT": np.zeros((0, 1), object)}, "PROMPT has no row"),
        ({"PROMPT": column(1)}, "PROMPT is of int64: give BYTES"),
        ({"PROMPT": np.array([b"a"], object)}, r"PROMPT has the shape \[1\]: give \[1, 1\], a row for each image"),
        ({"PROMPT": column(b"a", b"b"), "SEED": column(1)}, r"SEED has the shape \[1, 1\]: give \[2, 1\]"),
        ({"PROMPT": column(b"a"), "SEED": column(1.0)}, "SEED is of float64: give INT64"),
    ],
)
def test_inputs_of_another_shape_or_type(model: LoadedModel, inputs: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(PcrExportError, match=match):
        read_pictures(inputs, model)


def test_steps_that_the_scheduler_does_not_walk(lcm: ExportedFolder) -> None:
    model = load_exported_model(lcm.folder, threads=1)
    with pytest.raises(PcrExportError, match="1000 steps can't be sampled by LCMScheduler"):
        read_pictures({"PROMPT": column(b"a"), "STEPS": column(1000)}, model)


@pytest.mark.parametrize("prompt", ["", "../../etc/passwd", "a\0b", "x" * 4096])
def test_prompts_that_are_odd_but_fine(model: LoadedModel, prompt: str) -> None:
    (images,) = paint_requests(model, [[picture(prompt, steps=1)]], never)
    assert isinstance(images, np.ndarray)
    assert images.shape == (1, 16, 16, 3)


def test_images_are_those_of_generate(sdxl: ExportedFolder, model: LoadedModel) -> None:
    """Alone to the byte; together within 1 of 255: float sums of another batch differ in the last digit."""
    asked = [picture("a red star", 3), picture("a blue moon", 4), picture("a red star", 3, steps=3)]
    expected = [
        generate(sdxl.folder, one.prompt, seed=one.seed, steps=one.steps, guidance_scale=one.guidance_scale)
        for one in asked
    ]
    (alone,) = paint_requests(model, [[asked[0]]], never)
    np.testing.assert_array_equal(alone, expected[0][None])
    first, second = paint_requests(model, [[asked[0], asked[2]], [asked[1]]], never)
    np.testing.assert_allclose(first.astype(int), np.stack([expected[0], expected[2]]).astype(int), atol=1, rtol=0)
    np.testing.assert_allclose(second.astype(int), expected[1][None].astype(int), atol=1, rtol=0)


def test_a_prompt_that_is_cut_is_said_but_not_shown(
    model: LoadedModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither by this package nor by diffusers, whose own warning quotes what it cuts."""
    with pytest.warns(PromptWarning) as caught:
        (images,) = paint_requests(model, [[picture("a b c d e f g h i j k l m n secret", steps=1)]], never)
    assert isinstance(images, np.ndarray)
    (line,) = [str(warning.message) for warning in caught if warning.category is PromptWarning]
    assert line == "a request has prompts longer than 16 tokens: what comes after is not read"
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_rescaled_guidance_is_the_exports_where_there_is_guidance(model: LoadedModel) -> None:
    rescaled = replace(model, entry=replace(model.entry, guidance_rescale=0.7))
    denoiser = denoiser_from_pipeline(
        model.pipeline, num_inference_steps=2, guidance_scale=5.0, guidance_rescale=0.7, height=16, width=16
    )
    assert denoiser.decode is not None
    expected = to_uint8(denoiser.decode(sample(denoiser, denoiser, ["a red star"], [0])))
    (image,), (plain,) = (paint_requests(each, [[picture()]], never) for each in (rescaled, model))
    assert np.array_equal(image, expected)
    assert not np.array_equal(image, plain)
    images = [paint_requests(each, [[picture(guidance=1.0)]], never)[0] for each in (rescaled, model)]
    assert np.array_equal(*images)


def test_a_walk_that_nobody_waits_for_stops(model: LoadedModel) -> None:
    asked: list[int] = []

    def cancelled_at_third(request: int) -> bool:
        asked.append(request)
        return len(asked) > 2

    (result,) = paint_requests(model, [[picture(steps=1000)]], cancelled_at_third)
    assert isinstance(result, RequestCancelledError)
    assert len(asked) == 3  # a step each, and no 997 more


def test_one_cancelled_of_two_painted_together(model: LoadedModel) -> None:
    first, second = paint_requests(model, [[picture(seed=1)], [picture(seed=2)]], lambda request: request == 0)
    assert isinstance(first, RequestCancelledError)
    assert isinstance(second, np.ndarray)


def test_an_error_goes_to_its_request_alone(lcm: ExportedFolder) -> None:
    """LCM's scheduler refuses more steps than it was distilled with."""
    model = load_exported_model(lcm.folder, threads=1)
    first, second = paint_requests(model, [[picture(steps=1000)], [picture(steps=2)]], never)
    assert isinstance(first, PcrExportError)
    assert "1000 steps can't be sampled by LCMScheduler" in str(first)
    assert isinstance(second, np.ndarray)


@pytest.mark.parametrize("at_fault", [{"seed": -1}, {"seed": 2**70}, {"prompt": 3}, {"prompt": "\ud800"}])
def test_one_of_a_walk_that_fails_has_the_error_alone(model: LoadedModel, at_fault: dict[str, Any]) -> None:
    asked = [picture(seed=1, steps=1), replace(picture(steps=1), **at_fault), picture(seed=2, steps=1)]
    alone = [paint_requests(model, [[asked[i]]], never)[0] for i in (0, 2)]
    first, second, third = paint_requests(model, [[one] for one in asked], never)
    assert isinstance(second, PcrExportError)
    assert "\n" not in str(second)
    np.testing.assert_array_equal(first, alone[0])
    np.testing.assert_array_equal(third, alone[1])


class SmallMemory:
    """A network that has memory for so many rows, and counts its calls."""

    def __init__(self, network: Any, rows: int) -> None:
        self.network, self.rows, self.calls = network, rows, 0

    def __call__(self, inputs: dict[str, Any]) -> Any:
        self.calls += 1
        if len(inputs["sample"]) > self.rows:
            raise MemoryError
        return self.network(inputs)


def test_a_walk_too_large_for_the_memory_goes_on_as_smaller_ones(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SmallMemory(model.pipeline.unet.network, rows=2)  # of one image, with guidance
    monkeypatch.setattr(model.pipeline.unet, "network", memory)
    results = paint_requests(model, [[picture(seed=i, steps=1) for i in range(2)], [picture(steps=1)]], never)
    assert [getattr(result, "shape", None) for result in results] == [(2, 16, 16, 3), (1, 16, 16, 3)]
    assert memory.calls == 1 + 3


def test_a_request_that_fails_is_not_painted_further(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SmallMemory(model.pipeline.unet.network, rows=0)
    monkeypatch.setattr(model.pipeline.unet, "network", memory)
    pictures = [picture(seed=i, steps=1 + i // 4) for i in range(8)]
    (result,) = paint_requests(model, [pictures], never)
    assert str(result) == "the image can't be painted: MemoryError"
    assert memory.calls == 2  # together, and the first of them alone


def test_whoever_left_is_not_painted_alone(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SmallMemory(model.pipeline.unet.network, rows=2)
    monkeypatch.setattr(model.pipeline.unet, "network", memory)
    results = paint_requests(model, [[picture(steps=1)] for _ in range(3)], lambda request: request == 1)
    assert [type(result) for result in results] == [np.ndarray, RequestCancelledError, np.ndarray]
    assert memory.calls == 1 + 2


def test_an_interrupt_is_no_error_of_a_client(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_inputs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.pipeline.unet, "network", interrupt)
    with pytest.raises(KeyboardInterrupt):
        paint_requests(model, [[picture(steps=1)]], never)


def test_an_error_is_one_line_that_ends() -> None:
    assert str(error_of(OSError("x" * 10_000 + "\nmore"), "the image can't be painted")).startswith(
        "the image can't be "
    )
    assert len(str(error_of(PcrExportError("x" * 10_000 + "\nmore"), ""))) == 503


@pytest.mark.parametrize("networks", ["own", "triton"])
def test_long_prompts_stay_out_of_every_log(
    served: Path, networks: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the verbosity that the libraries come with, whoever runs the networks, prompts and negative prompts of 4 KB."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_warning()
        library.enable_propagation()
    try:
        model = load_served_model(served, {"networks": networks}, run_beside(served))
        long = ("secret " * 600)[:4096]
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python itself has it
            for prompt, negative in ((long, ""), ("a", long), (long, long), ("secret" * 600, "\0secret" * 500)):
                asked = replace(picture(prompt, steps=1), negative_prompt=negative)
                results = paint_requests(model, [[asked], [asked], [replace(asked, seed=-1)]], never)
                assert [type(result) for result in results] == [np.ndarray, np.ndarray, PcrExportError]
    finally:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_propagation()
    logged = caplog.text + "".join(capfd.readouterr()) + "".join(str(each.message) for each in caught)
    assert "secret" not in logged
    assert len(logged) < 5000


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"threads": "many"}, "the parameter threads is 'many': give a number from 1"),
        ({"threads": "0"}, "the parameter threads is '0'"),
        ({"threads": "9" * 9999}, r"the parameter threads is '9{59}\.\.\.: give a number from 1 to 1024"),
        ({"threads": "2\nmore"}, r"the parameter threads is '2\\nmore': give"),
        ({"engine": "../../x"}, r"the parameter engine is '\.\./\.\./x': give a target such as sm89"),
        ({"networks": "\0" * 10_000}, r"the parameter networks is '\\x00.{,60}\.\.\.: give own or triton"),
        ({"networks": "there"}, "the parameter networks is 'there': give own or triton"),
        ({"engine": "sm89"}, "has no engine for sm89"),
    ],
)
def test_parameters_that_cannot_be(sdxl: ExportedFolder, parameters: dict[str, str], match: str) -> None:
    def no_call(*_arguments: object) -> dict[str, np.ndarray]:
        raise AssertionError

    with pytest.raises(PcrExportError, match=match) as refusal:
        load_served_model(sdxl.folder, parameters, no_call)
    assert "\n" not in str(refusal.value)
