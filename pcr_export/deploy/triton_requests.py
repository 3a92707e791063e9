"""What a Triton request asks for, within bounds, and the images of several requests from one walk."""

from __future__ import annotations

import math
import re
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
from pcr_export.errors import PcrExportError, first_line
from pcr_export.manifest import check_finished
from pcr_export.models.load import LoadedModel, quiet
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.models.schedulers import check_walk
from pcr_export.qdiffbench.images import to_uint8

OWN, TRITON = "own", "triton"  # who runs the networks: the pipeline itself, or the models beside it
MAX_PROMPT_BYTES = 4096  # of UTF-8; CLIP reads 77 tokens of it
MAX_SEED = 2**63 - 1  # SEED is an int64, and diffusers takes none below 0
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_THREADS = 1024
MAX_ERROR = 500  # letters of what a client is told
SHOWN_LETTERS = 60  # of a value in an error
CANCELLED = "the request was cancelled"
INPUTS = {  # of `pipeline`: the field of a Picture that each one is
    "PROMPT": "prompt",
    "NEGATIVE_PROMPT": "negative_prompt",
    "SEED": "seed",
    "STEPS": "steps",
    "GUIDANCE_SCALE": "guidance_scale",
}

Place = tuple[int, int]  # of an image: the number of its request, the row in it


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
    threads = parameters.get("threads") or None
    engine = parameters.get("engine") or None
    if networks not in (OWN, TRITON):
        raise PcrExportError(f"the parameter networks is {_shown(networks)}: give {OWN} or {TRITON}")
    if threads is not None and not (re.fullmatch("[0-9]{1,4}", threads) and 1 <= int(threads) <= MAX_THREADS):
        raise PcrExportError(f"the parameter threads is {_shown(threads)}: give a number from 1 to {MAX_THREADS}")
    if engine is not None and not re.fullmatch(r"\w[\w.-]{,39}", engine, re.ASCII):
        raise PcrExportError(f"the parameter engine is {_shown(engine)}: give a target such as sm89")
    if networks == TRITON:
        return load_exported_model(folder, network=lambda name: served_network(folder, name, call))
    if threads is not None:
        torch.set_num_threads(int(threads))
    return load_exported_model(folder, None if threads is None else int(threads), engine=engine)


def read_pictures(inputs: Mapping[str, np.ndarray], model: LoadedModel) -> list[Picture]:
    """The images that a request asks for, one per row of its inputs.

    Args:
        inputs: PROMPT and NEGATIVE_PROMPT (bytes), SEED (int64), STEPS (int32), GUIDANCE_SCALE (float32), each [batch, 1]; all but
            PROMPT may be absent: no negative prompt, seed 0, steps and guidance of the export's recipe.
        model: whose recipe that is, and whose scheduler has to walk so many steps.

    Raises:
        PcrExportError: an input is missing, of another shape or type, or out of bounds: which, and what it may be.
    """
    if "PROMPT" not in inputs:
        raise PcrExportError("PROMPT is missing: give one for each image")
    count = len(inputs["PROMPT"]) if inputs["PROMPT"].ndim else 0
    if not count:
        raise PcrExportError("PROMPT has no row: give one for each image")
    columns: dict[str, list[Any]] = {
        "NEGATIVE_PROMPT": [""] * count,
        "SEED": [0] * count,
        "STEPS": [model.entry.num_inference_steps] * count,
        "GUIDANCE_SCALE": [model.entry.guidance_scale] * count,
    }
    columns |= {name: _column(name, array, count) for name, array in inputs.items() if name in INPUTS}
    for steps in set(columns["STEPS"]) if "STEPS" in inputs else ():
        check_walk(model.pipeline.scheduler, steps, type(model.pipeline))
    return [Picture(**{field: columns[name][i] for name, field in INPUTS.items()}) for i in range(count)]


def paint_requests(
    model: LoadedModel, requests: Sequence[Sequence[Picture]], is_cancelled: Callable[[int], bool]
) -> list[np.ndarray | PcrExportError]:
    """The images of every request, uint8 [images, height, width, 3] each, or why there are none.

    Images of equal steps, guidance and negative prompt are painted in one walk, whichever request they belong to, each from the noise
    of its own seed. Where that walk fails each image is painted alone, so that only the request at fault has an error, and a walk too
    large for the memory goes on as smaller ones. `is_cancelled(i)` of request i is asked before every step; a walk that nobody waits
    for stops there.
    """
    groups: dict[tuple[int, float, str], list[Place]] = defaultdict(list)
    for owner, pictures in enumerate(requests):
        for row, picture in enumerate(pictures):
            groups[picture.steps, picture.guidance_scale, picture.negative_prompt].append((owner, row))
    painted: dict[Place, np.ndarray] = {}
    errors: dict[int, PcrExportError] = {}

    def paint(places: Sequence[Place]) -> PcrExportError | None:
        """Why these can't be painted. Nothing holds the failed walk's memory any more."""
        abandoned = partial(_all, is_cancelled, {owner for owner, _ in places})
        try:
            images = _paint(model, [requests[owner][row] for owner, row in places], abandoned)
        except RequestCancelledError as error:
            return RequestCancelledError(str(error))
        except Exception as error:  # whatever the libraries raise, it belongs to these clients and to no other
            return error_of(error, "the image can't be painted")
        painted.update(zip(places, images, strict=True))
        return None

    def paint_alone(owner: int, row: int) -> None:
        if owner not in errors and (error := paint([(owner, row)])):
            errors[owner] = error

    for group in groups.values():
        places = [place for place in group if place[0] not in errors]
        error = paint(places) if places else None
        if error is None:
            continue
        if len(places) == 1 or isinstance(error, RequestCancelledError):
            errors |= dict.fromkeys((owner for owner, _ in places), error)
        else:
            for place in places:
                paint_alone(*place)
    for owner in range(len(requests)):
        if owner not in errors and is_cancelled(owner):
            errors[owner] = RequestCancelledError(CANCELLED)
    return [
        errors[owner] if owner in errors else np.stack([painted[owner, row] for row in range(len(pictures))])
        for owner, pictures in enumerate(requests)
    ]


def error_of(error: Exception, what: str) -> PcrExportError:
    """An exception as the client is told it: one line of bounded length, `what` in front of it where it was not made for people."""
    line = first_line(error) if isinstance(error, PcrExportError) else f"{what}: {first_line(error)}"
    return PcrExportError(line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}...")


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
            raise RequestCancelledError(CANCELLED)
        try:
            inputs = walk.send(denoiser(inputs))
        except StopIteration as stop:
            return to_uint8(denoiser.decode(stop.value))


def _all(holds: Callable[[int], bool], numbers: Iterable[int]) -> bool:
    return all(map(holds, numbers))


def _column(name: str, array: np.ndarray, count: int) -> list[Any]:
    """The values of an input, checked; numbers as Python's own."""
    kinds, type_name, read = READ[name]
    if array.dtype.kind not in kinds:
        raise PcrExportError(f"{name} is of {array.dtype}: give {type_name}")
    if array.shape != (count, 1):
        raise PcrExportError(
            f"{name} has the shape {_shown(list(array.shape))}: give {[count, 1]}, a row for each image"
        )
    return [read(name, value) for value in array.ravel().tolist()]


def _text(name: str, value: bytes) -> str:
    if not isinstance(value, bytes):
        raise PcrExportError(f"{name} is of {type(value).__name__}: give BYTES")
    if len(value) > MAX_PROMPT_BYTES:
        raise PcrExportError(f"{name} has {len(value)} bytes: give {MAX_PROMPT_BYTES} or fewer")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PcrExportError(f"{name} is no UTF-8 ({error.reason} at byte {error.start}): give text") from error


def _seed(name: str, value: int) -> int:
    if not 0 <= value <= MAX_SEED:
        raise PcrExportError(f"{name} is {value}: give 0 to {MAX_SEED}")
    return value


def _steps(name: str, value: int) -> int:
    if not 1 <= value <= MAX_STEPS:
        raise PcrExportError(f"{name} is {value}: give 1 to {MAX_STEPS}")
    return value


def _guidance(name: str, value: float) -> float:
    if not (math.isfinite(value) and 0 <= value <= MAX_GUIDANCE):
        raise PcrExportError(f"{name} is {value}: give 0 to {MAX_GUIDANCE:g}")
    return value


def _shown(value: Any) -> str:
    """What was given, in quotes where it is a text, so that it stays one line; cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."


# numpy's kinds of an input's values, Triton's name for them, and what reads one of them
READ: Mapping[str, tuple[str, str, Callable[[str, Any], Any]]] = {
    "PROMPT": ("OS", "BYTES", _text),
    "NEGATIVE_PROMPT": ("OS", "BYTES", _text),
    "SEED": ("iu", "INT64", _seed),
    "STEPS": ("iu", "INT32", _steps),
    "GUIDANCE_SCALE": ("f", "FP32", _guidance),
}
