"""What a Triton request asks for, within bounds, and the images of several requests from one walk."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcr_export.deploy.run import load_exported_model, with_guidance
from pcr_export.deploy.triton_networks import CallModel, served_network
from pcr_export.engines.onnxruntime import RUN_ERRORS
from pcr_export.errors import PcrExportError, first_line
from pcr_export.manifest import check_finished
from pcr_export.models.load import LoadedModel, quiet
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.qdiffbench.images import to_uint8

OWN, TRITON = "own", "triton"  # who runs the networks: the pipeline itself, or the models beside it
MAX_PROMPT_BYTES = 4096  # of UTF-8; CLIP reads 77 tokens of it
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


class RequestCancelledError(PcrExportError):
    """Nobody waits for the image any more."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image that a request asks for."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float


def load_served_model(folder: Path, parameters: Mapping[str, str], call: CallModel) -> LoadedModel:
    """The model that `pipeline` serves.

    Args:
        folder: the exported one.
        parameters: of the model's config.pbtxt; "networks", "threads" and "engine" count, empty ones are unset.
        call: runs another model of the server; used where `networks` is "triton".

    Raises:
        PcrExportError: as `load_exported_model` does, or a parameter is none of those that can be.
    """
    check_finished(folder)
    networks = parameters.get("networks") or OWN
    if networks not in (OWN, TRITON):
        raise PcrExportError(f"the parameter networks is {networks!r}: give {OWN} or {TRITON}")
    if networks == TRITON:
        return load_exported_model(folder, network=lambda name: served_network(folder, name, call))
    threads = parameters.get("threads") or None
    if threads is not None and not (threads.isdecimal() and int(threads)):
        raise PcrExportError(f"the parameter threads is {threads!r}: give a number from 1, or nothing")
    if threads is not None:
        torch.set_num_threads(int(threads))
    return load_exported_model(
        folder, None if threads is None else int(threads), engine=parameters.get("engine") or None
    )


def read_pictures(inputs: Mapping[str, np.ndarray], model: LoadedModel) -> list[Picture]:
    """The images that a request asks for, one per row of its inputs.

    Args:
        inputs: PROMPT and NEGATIVE_PROMPT (bytes), SEED (int64), STEPS (int32), GUIDANCE_SCALE (float32), each [batch, 1]; all but
            PROMPT may be absent: no negative prompt, seed 0, steps and guidance of the export's recipe.
        model: whose recipe that is.

    Raises:
        PcrExportError: an input is out of bounds: which, and what it may be.
    """
    count = inputs["PROMPT"].size
    defaults: dict[str, Any] = {
        "NEGATIVE_PROMPT": b"",
        "SEED": 0,
        "STEPS": model.entry.num_inference_steps,
        "GUIDANCE_SCALE": model.entry.guidance_scale,
    }
    columns = {name: [default] * count for name, default in defaults.items()}
    columns |= {name: array.ravel().tolist() for name, array in inputs.items()}
    return [
        Picture(
            prompt=_text("PROMPT", columns["PROMPT"][i]),
            negative_prompt=_text("NEGATIVE_PROMPT", columns["NEGATIVE_PROMPT"][i]),
            seed=int(columns["SEED"][i]),
            steps=_steps(int(columns["STEPS"][i])),
            guidance_scale=_guidance(float(columns["GUIDANCE_SCALE"][i])),
        )
        for i in range(count)
    ]


def paint_requests(
    model: LoadedModel, requests: Sequence[Sequence[Picture]], is_cancelled: Callable[[int], bool]
) -> list[np.ndarray | PcrExportError]:
    """The images of every request, uint8 [images, height, width, 3] each, or why there are none.

    Images of equal steps, guidance and negative prompt are painted in one walk, whichever request they belong to, each from the noise
    of its own seed. `is_cancelled(i)` of request i is asked before every step; a walk that nobody waits for stops there.
    """
    groups: dict[tuple[int, float, str], list[tuple[int, int]]] = defaultdict(list)
    for owner, pictures in enumerate(requests):
        for row, picture in enumerate(pictures):
            groups[picture.steps, picture.guidance_scale, picture.negative_prompt].append((owner, row))
    painted: dict[tuple[int, int], np.ndarray] = {}
    errors: dict[int, PcrExportError] = {}
    for places in groups.values():
        owners = {owner for owner, _ in places}
        try:
            images = _paint(model, [requests[owner][row] for owner, row in places], partial(_all, is_cancelled, owners))
        except PcrExportError as error:
            errors |= dict.fromkeys(owners, error)
        except (*RUN_ERRORS, MemoryError) as error:
            errors |= dict.fromkeys(owners, PcrExportError(f"the image can't be painted: {first_line(error)}"))
        else:
            painted |= dict(zip(places, images, strict=True))
    for owner in range(len(requests)):
        if owner not in errors and is_cancelled(owner):
            errors[owner] = RequestCancelledError("the request was cancelled")
    return [
        errors[owner] if owner in errors else np.stack([painted[owner, row] for row in range(len(pictures))])
        for owner, pictures in enumerate(requests)
    ]


@torch.inference_mode()
def _paint(model: LoadedModel, pictures: Sequence[Picture], abandoned: Callable[[], bool]) -> np.ndarray:
    """uint8 [images, height, width, 3] of pictures that differ in prompt and seed only."""
    first = pictures[0]
    entry = replace(with_guidance(model.entry, first.guidance_scale), num_inference_steps=first.steps)
    denoiser = replace(model, entry=entry).denoiser(negative_prompt=first.negative_prompt)
    assert denoiser.decode is not None
    prompts = [picture.prompt for picture in pictures]
    warn_of_cut_prompts(
        tokenizers_of(model.pipeline), [*prompts, first.negative_prompt], "a request has prompts", quote=False
    )
    walk = denoiser.walk(prompts, [picture.seed for picture in pictures])
    with quiet():  # diffusers logs the end of a prompt that is too long
        inputs = next(walk)
    while True:
        if abandoned():
            raise RequestCancelledError("the request was cancelled")
        try:
            inputs = walk.send(denoiser(inputs))
        except StopIteration as stop:
            return to_uint8(denoiser.decode(stop.value))


def _all(holds: Callable[[int], bool], numbers: Iterable[int]) -> bool:
    return all(map(holds, numbers))


def _text(name: str, value: bytes) -> str:
    if len(value) > MAX_PROMPT_BYTES:
        raise PcrExportError(f"{name} has {len(value)} bytes: give {MAX_PROMPT_BYTES} or fewer")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PcrExportError(f"{name} is no UTF-8 ({error.reason} at byte {error.start}): give text") from error


def _steps(value: int) -> int:
    if not 1 <= value <= MAX_STEPS:
        raise PcrExportError(f"STEPS is {value}: give 1 to {MAX_STEPS}")
    return value


def _guidance(value: float) -> float:
    if not (math.isfinite(value) and 0 <= value <= MAX_GUIDANCE):
        raise PcrExportError(f"GUIDANCE_SCALE is {value}: give 0 to {MAX_GUIDANCE:g}")
    return value
