"""Requests within bounds, painted together, each image that of `generate`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from deploy.conftest import ExportedFolder

from pcr_export.deploy.run import generate, load_exported_model
from pcr_export.deploy.triton_requests import (
    Picture,
    RequestCancelledError,
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
        "SEED": column(-1, 2**40),
        "STEPS": column(1, 1000),
        "GUIDANCE_SCALE": column(0.0, 100.0),
    }
    first, second = read_pictures(inputs, model)
    assert first == Picture(prompt="a", negative_prompt="", seed=-1, steps=1, guidance_scale=0.0)
    assert second == Picture(prompt="b", negative_prompt="red", seed=2**40, steps=1000, guidance_scale=100.0)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("PROMPT", b"x" * 4097, "PROMPT has 4097 bytes: give 4096 or fewer"),
        ("PROMPT", b"\xff\xfe", "PROMPT is no UTF-8"),
        ("NEGATIVE_PROMPT", b"x" * 10_000_000, "NEGATIVE_PROMPT has 10000000 bytes"),
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


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"threads": "many"}, "the parameter threads is 'many': give a number from 1"),
        ({"threads": "0"}, "the parameter threads is '0'"),
        ({"networks": "there"}, "the parameter networks is 'there': give own or triton"),
        ({"engine": "sm89"}, "has no engine for sm89"),
    ],
)
def test_parameters_that_cannot_be(sdxl: ExportedFolder, parameters: dict[str, str], match: str) -> None:
    def no_call(*_arguments: object) -> dict[str, np.ndarray]:
        raise AssertionError

    with pytest.raises(PcrExportError, match=match):
        load_served_model(sdxl.folder, parameters, no_call)
