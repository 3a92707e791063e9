"""Schedulers of diffusers: made from what was asked for, and walked once without a network, so that a bad one is known early."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from msgspec import Meta
from torch import Tensor

from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.catalog import read_model_index
from pcr_export.read_files import check_schema, read_json
from pcr_export.scheduler_setting import BY_NOISE_SCHEDULE, BY_SIGMA, INSTEAD, SchedulerSetting, parse_scheduler

Scheduler = Any  # diffusers mixes its methods in where types don't see them
ETA = 0.0  # of every pipeline of diffusers that is not told another
ANNOTATED_AS_BOOL = ("sigma_max", "shift_terminal")  # by diffusers, but a number or None
CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "none": None, "null": None}
FAILURES = (  # what schedulers of diffusers raise where a setting or a number of steps does not suit them
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Count = Annotated[int, Meta(ge=0, le=10**5)]


class SchedulerConfig(TypedDict, total=False):
    """The counts that set how much a scheduler computes or holds."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=10**5)]
    trained_betas: Annotated[list[float], Meta(max_length=10**5)] | None
    original_inference_steps: Count
    steps_offset: Count
    solver_order: Annotated[int, Meta(ge=1, le=10)]
    predictor_order: Annotated[int, Meta(ge=1, le=10)]
    corrector_order: Annotated[int, Meta(ge=0, le=10)]


# of any key: what diffusers writes, of which each class takes what it knows
SchedulerValue = (
    bool
    | Annotated[int, Meta(ge=-(2**31), le=2**31)]
    | float
    | str
    | Annotated[list[float | str | list[float] | None], Meta(max_length=10**5)]
    | dict[str, Any]
    | None
)


def read_scheduler(folder: Path, asked: str | None = None) -> Scheduler:
    """The scheduler of a pipeline folder, or the one that was asked for with its noise schedule; no weights are read.

    Args:
        asked: NAME[:key=value,...] of diffusers; None for the folder's own.

    Raises:
        PcrExportError: it can't be made, or it can't walk a Stable Diffusion pipeline to the same image each time.
    """
    index = read_model_index(folder)
    config = read_scheduler_config(folder / "scheduler" / "scheduler_config.json")
    pipeline_class: type = getattr(diffusers, index["_class_name"])
    named = index.get("scheduler")
    if not (isinstance(named, list) and len(named) == 2 and isinstance(named[1], str)):
        raise PcrExportError(f"{folder} has no scheduler that diffusers can load: see its model_index.json")
    name = named[1]
    if asked is not None:
        return make_scheduler(asked, config, name, pipeline_class)
    if name in INSTEAD:
        reason, instead = INSTEAD[name]
        raise PcrExportError(f"{folder} has a {name}, which {reason}: add --scheduler {instead}")
    return _as_sampled(_construct(name, config, {}), pipeline_class)


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """The configuration of a scheduler of diffusers. Raises PcrExportError where it is damaged, or a count lies out of every range."""
    config = read_json(path, SchedulerConfig, infinite=True)
    for key, value in config.items():
        check_schema(value, SchedulerValue, f"{path} ({key})")
    return {key: value for key, value in config.items() if key != "_class_name" or _is_scheduler(value)}


def make_scheduler(asked: str, config: Mapping[str, Any], name: str, pipeline_class: type) -> Scheduler:
    """The scheduler `asked`, NAME[:key=value,...], with all else as another one has it, as `NAME.from_config(config, ...)`.

    Args:
        config, name: of the scheduler that it stands in for.
        pipeline_class: of the pipeline whose constructor it goes through.

    Raises:
        PcrExportError: there is none of that name, it can't stand in for `name`, or a key or value is none of its constructor's.
    """
    setting = parse_scheduler(asked)
    family = BY_SIGMA if name in BY_SIGMA else BY_NOISE_SCHEDULE
    if setting.name not in family:
        raise PcrExportError(f"scheduler {setting.name} can't replace {name}: choose one of {', '.join(family)}")
    values = read_values(setting)
    scheduler = _as_sampled(_construct(setting.name, config, values), pipeline_class)
    for key, value in values.items():
        if scheduler.config[key] != value:
            now = scheduler.config[key]
            pipeline = pipeline_class.__name__
            raise PcrExportError(f"--scheduler {asked}: {pipeline} samples with {key}={now} only: leave it out")
    return scheduler


def read_values(setting: SchedulerSetting) -> dict[str, Any]:
    """The values of a setting as the scheduler's constructor takes them. Raises PcrExportError that names what is known."""
    constructor = _class_of(setting.name).__init__
    known = [key for key in inspect.signature(constructor).parameters if key != "self"]
    hints = typing.get_type_hints(constructor)
    values: dict[str, Any] = {}
    for key, text in setting.values:
        if key not in known:
            raise PcrExportError(f"{setting.name} has no {key}: choose of {', '.join(known)}")
        kinds = _kinds(float | None if key in ANNOTATED_AS_BOOL else hints.get(key, Any))
        try:
            values[key] = _read_value(text, kinds)
        except ValueError as error:
            can_be = " or ".join(kinds.values())
            advice = f"write {can_be}" if can_be else "leave it out, it is no text"
            raise PcrExportError(f"{setting.name} can't have {key}={text}: {advice}") from error
    return values


def _kinds(hint: Any) -> dict[Any, str]:
    """What an annotation allows, types and the texts of a Literal, each with its words; lists and functions are not written so."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", types.NoneType: "none"}
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return {value: str(value) for value in typing.get_args(hint)}
    if origin in (typing.Union, types.UnionType):
        return {kind: word for each in typing.get_args(hint) for kind, word in _kinds(each).items()}
    return words if hint is Any else {hint: words[hint]} if hint in words else {}


def _read_value(text: str, kinds: Mapping[Any, str]) -> Any:
    """A text as one of the kinds. Raises ValueError where it is none of them."""
    value = _literal(text)
    if type(value) is int and int not in kinds:
        value = float(value)
    if text in kinds or (type(value) not in kinds and str in kinds):
        return text
    if type(value) not in kinds:
        raise ValueError(text)
    return value


def _literal(text: str) -> Any:
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _class_of(name: str) -> Any:
    """The scheduler class of that name. Raises PcrExportError where diffusers has none, or a package that it needs is missing."""
    scheduler = getattr(diffusers, name, None)
    absent = [package for package in getattr(scheduler, "_backends", ()) if package != "torch"]
    if absent:  # a class that diffusers puts in the place of one that can't be imported
        raise PcrExportError(f"{name} needs {' and '.join(absent)}: pip install {' '.join(absent)}")
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise PcrExportError(
            f"diffusers {diffusers.__version__} has no scheduler {name}: choose another with --scheduler"
        )
    return scheduler


def _is_scheduler(name: object) -> bool:
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)


def _construct(name: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> Scheduler:
    """NAME.from_config(config, **values). Raises PcrExportError with the constructor's reason where it refuses them."""
    from_config: Any = _class_of(name).from_config
    try:
        return from_config(config, **values)
    except FAILURES as error:
        raise PcrExportError(
            f"{name} can't be set up so ({first_line(error)}): mend its settings, or choose another with --scheduler"
        ) from error


def _as_sampled(scheduler: Scheduler, pipeline_class: type) -> Scheduler:
    """The scheduler after the pipeline's constructor, which sets steps_offset and clip_sample of some: by diffusers' own code."""
    constructor: Any = pipeline_class
    parameters = inspect.signature(constructor).parameters
    parts: dict[str, Any] = {name: None for name, each in parameters.items() if each.default is each.empty}
    if "requires_safety_checker" in parameters:
        parts["requires_safety_checker"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return constructor(**{**parts, "scheduler": scheduler}).scheduler


def start(scheduler: Scheduler, num_inference_steps: int, pipeline_class: type, device: torch.device) -> None:
    """Set the timesteps of a sampling, as the text-to-image pipelines of diffusers do."""
    scheduler.set_timesteps(num_inference_steps, device=device)
    if issubclass(pipeline_class, StableDiffusionXLPipeline) and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def step_arguments(scheduler: Scheduler, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What `scheduler.step` takes besides outputs and latents: diffusers' prepare_extra_step_kwargs."""
    taken = inspect.signature(scheduler.step).parameters
    values: dict[str, Any] = {"eta": ETA, "generator": list(generators)}
    return {name: value for name, value in values.items() if name in taken}


def check_walk(scheduler: Scheduler, num_inference_steps: int, pipeline_class: type) -> tuple[float, ...]:
    """Walk a few numbers without a network; the timesteps of the walk as float32 holds them, in its order.

    Raises:
        PcrExportError: the scheduler can't make so many steps, goes from images to noise, makes NaN, or draws from the global
            random state, so that the same seed would not give the same image.
    """
    name = type(scheduler).__name__
    if name in INSTEAD:
        reason, instead = INSTEAD[name]
        raise PcrExportError(f"{name} {reason}: use {instead}")
    if num_inference_steps < 1:
        raise PcrExportError(f"{num_inference_steps} steps can't be sampled: give 1 or more")
    most = getattr(scheduler.config, "num_train_timesteps", num_inference_steps)
    if num_inference_steps > most:
        raise PcrExportError(f"{num_inference_steps} steps can't be sampled: the scheduler knows {most}, give fewer")
    scheduler, before = copy.deepcopy(scheduler), _global_random_state()
    try:
        start(scheduler, num_inference_steps, pipeline_class, torch.device("cpu"))
        latents = _walk_without_network(scheduler)
    except FAILURES as error:
        raise PcrExportError(
            f"{num_inference_steps} steps can't be sampled by {name} ({first_line(error)}): "
            "give another number, mend its settings, or choose another with --scheduler"
        ) from error
    timesteps = tuple(float(timestep.to(torch.float32)) for timestep in scheduler.timesteps)
    _check_walked(name, timesteps, latents, before == _global_random_state())
    return timesteps


def _check_walked(name: str, timesteps: Sequence[float], latents: Tensor, repeats: bool) -> None:
    if not repeats:
        raise PcrExportError(
            f"{name} draws from the global random state, so that the same seed gives another image each time: use another scheduler"
        )
    if timesteps[0] < timesteps[-1]:
        raise PcrExportError(f"{name} goes from an image to noise: use another scheduler")
    if not latents.isfinite().all():
        raise PcrExportError(
            f"{name} makes NaN whatever the network does: mend its settings (rescale_betas_zero_snr needs a model of prediction_type "
            "v_prediction), or use another one or fewer steps"
        )


@torch.no_grad()
def _walk_without_network(scheduler: Scheduler) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    latents, output = (randn_tensor((2, 4, 2, 2), generator=generators) for _ in range(2))  # float32
    latents = latents * scheduler.init_noise_sigma
    arguments = step_arguments(scheduler, generators)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(output, timestep, latents, **arguments, return_dict=False)[0]
    return latents


def _global_random_state() -> tuple[object, ...]:
    legacy: Any = np.random.get_state(legacy=True)
    return (torch.get_rng_state().numpy().tobytes(), legacy[1].tobytes(), legacy[2:], random.getstate())
