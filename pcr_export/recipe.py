"""Recipe: every setting of an export and its one default. Plain data: importable without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.read_files import MissingFileError, check_schema, parse_json, read_text
from pcr_export.relaxed_steps import parse_relaxed_steps, searched_mean_bits
from pcr_export.scheduler_setting import parse_scheduler

ESTIMATORS = ("mse", "minmax", "percentile")  # of ranges
RANGES = (*ESTIMATORS, "auto")
SCHEMES = ("progressive", "float-trajectory", "static")
REDUCTIONS = ("pooled", "min-mean")
WEIGHTS = ("rtn", "gptq", "adaround")
FIRST_TOKEN = ("auto", "together", "apart")
SKIPPED_BY_DEFAULT = ("conv_in", "conv_out")
MOST_STEPS = 1000  # what the schedulers of diffusers were trained with
MOST_CALLS_PER_STEP = 2  # DPM2 calls the network at a noise level in between, too; a job knows which there are
MOST_DRAWS = 10**5  # of --observed-steps normal
MOST_PIXELS = 2**14  # a side
COUNTS = (
    "num_inference_steps",
    "calib_size",
    "calib_batch",
    "height",
    "width",
    "weight_samples",
    "weight_rounds",
    "adaround_iterations",
)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates that are added to the weights before anything else is done."""

    name: str  # of the file, without its folder
    sha256: str  # of its bytes
    scale: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized. Two equal recipes on equal models and prompts give equal bytes."""

    model: str  # catalog name, hub id or folder, as it was asked for
    num_inference_steps: int
    guidance_scale: float
    height: int  # pixels
    width: int  # pixels
    scheduler: str | None = None  # NAME[:key=value,...] of diffusers; None: the model's own
    guidance_rescale: float = 0.0  # 0..1 (arXiv 2305.08891); 0: not rescaled
    weight_bits: int = 8
    activation_bits: int = 8  # of every step; more than 8 are two digits, as on a relaxed step
    scheme: str = "progressive"  # how scales are found; the others are baselines
    ranges: str = "mse"
    percentile: float = 99.99  # of each end, used by ranges="percentile" and tried by "auto"
    affine: bool = True  # zero offsets where the graph can carry them
    observed_steps: str = "all"  # that scheme="static" sees: "all", "uniform:10" or "normal:64"
    reduce: str = "pooled"  # of scheme="static" over steps: "pooled" or ModelOpt's "min-mean"
    smooth_quant: float | None = None  # SmoothQuant's alpha for every quantized Linear; None: not smoothed
    split_shortcut: bool = False  # the decoder's conv_shortcut in halves with scales of their own
    first_token: str = (
        "auto"  # of a text: quantized "together" with the others, or "apart"; "auto": apart where it stands out
    )
    relax: str = "none"  # "none", "first:20%", "last:0.2", steps such as "0:4,17", or "auto:8.4": searched
    relax_bits: int = 10  # activation bits on relaxed steps
    weights: str = "rtn"  # how they are rounded: to nearest, or learned
    keep: str = "none"  # layers that keep 8-bit weights: "4" of them, or "4.5bit" on average
    weight_samples: int = 1024  # UNet inputs, over all steps, that rounding is learned from
    weight_rounds: int = 1  # of learning, each on latents that the weights of the round before made
    adaround_iterations: int = 500  # of each block
    lora: tuple[Lora, ...] = ()  # fused into the model, in this order
    skip: tuple[str, ...] = (
        SKIPPED_BY_DEFAULT  # module path patterns (fnmatch) that stay float; "auto:4": four more, searched
    )
    calib_size: int = 64  # prompts
    calib_batch: int = 64  # prompts of a call that reduce="min-mean" averages over; nothing else depends on it
    seed: int = 0
    min_sqnr_db: float | None = (
        None  # asked of the artifact against its simulation at every step; None: what rounding leaves
    )

    def __post_init__(self) -> None:
        for value, known, flag in (
            (self.ranges, RANGES, "--ranges"),
            (self.scheme, SCHEMES, "--scheme"),
            (self.reduce, REDUCTIONS, "--reduce"),
            (self.weights, WEIGHTS, "--weights"),
            (self.first_token, FIRST_TOKEN, "--first-token"),
        ):
            if value not in known:
                raise PcrExportError(f"{flag} {value} is unknown: choose one of {', '.join(known)}")
        if not (4 <= self.weight_bits <= 8 and 8 <= self.activation_bits <= 16):
            bits = f"w{self.weight_bits}a{self.activation_bits}"
            raise PcrExportError(
                f"--bits {bits} is not supported: use w8a8, w4 to w8 for weights, a8 to a16 for activations"
            )
        if self.activation_bits > 8 and self.relax != "none":
            raise PcrExportError(
                f"--relax {self.relax} needs 8-bit activations: with a{self.activation_bits} write --relax none"
            )
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise PcrExportError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("height", "width"):
            if getattr(self, name) > MOST_PIXELS:
                raise PcrExportError(f"--{name} must be at most {MOST_PIXELS}, got {getattr(self, name)}")
        if self.num_inference_steps > MOST_STEPS:
            raise PcrExportError(f"--steps must be at most {MOST_STEPS}, got {self.num_inference_steps}")
        if not math.isfinite(self.guidance_scale):
            raise PcrExportError(f"--guidance-scale must be a finite number, got {self.guidance_scale}")
        if not 0 <= self.guidance_rescale <= 1:
            raise PcrExportError(f"--guidance-rescale must lie in [0, 1], got {self.guidance_rescale}")
        if self.guidance_rescale and self.guidance_scale <= 1:
            raise PcrExportError(
                f"--guidance-rescale {self.guidance_rescale:g} needs guidance: give a --guidance-scale above 1"
            )
        if self.scheduler is not None:  # in its one spelling, which the hash is of
            object.__setattr__(self, "scheduler", str(parse_scheduler(self.scheduler)))
        if not 9 <= self.relax_bits <= 16:
            raise PcrExportError(f"--relax-bits must lie in 9..16, got {self.relax_bits}")
        if not 50 < self.percentile <= 100:
            raise PcrExportError(f"--percentile must lie in (50, 100], got {self.percentile}")
        if searched_mean_bits(self.relax, self.relax_bits) is None:
            most = MOST_CALLS_PER_STEP * self.num_inference_steps
            parse_relaxed_steps(self.relax, self.num_inference_steps, most=most)
        self._check_baseline()
        split_skip(self.skip)
        if parse_keep(self.keep) != (0, None) and self.weight_bits == 8:
            raise PcrExportError(f"--keep {self.keep} needs fewer than 8 bits of weights, such as --bits w4a8")

    def _check_baseline(self) -> None:
        """The settings that only baselines have."""
        kind, _ = parse_observed_steps(self.observed_steps, self.num_inference_steps)
        if kind != "all" and self.scheme != "static":
            raise PcrExportError(f"--observed-steps {self.observed_steps} needs --scheme static")
        if self.reduce == "min-mean" and (self.scheme != "static" or self.ranges != "minmax" or self.affine):
            raise PcrExportError("--reduce min-mean needs --scheme static, --ranges minmax and --symmetric")
        if self.smooth_quant is not None and not 0 <= self.smooth_quant <= 1:
            raise PcrExportError(f"--smooth-quant must lie in [0, 1], got {self.smooth_quant}")

    def to_json(self) -> str:
        """The recipe as JSON with sorted keys."""
        return _as_json(asdict(self))

    def hash(self) -> str:
        """sha256 of the recipe's JSON, without later settings that change nothing: results of before they came keep their hash."""
        facts = {name: value for name, value in asdict(self).items() if LATER_SETTINGS.get(name, ...) != value}
        if self.scheme == "progressive":
            facts["progressive"] = PROGRESSIVE
        facts["min_sqnr_db"] = EARLIER_MIN_SQNR_DB if self.min_sqnr_db is None else self.min_sqnr_db
        return hashlib.sha256(_as_json(facts).encode()).hexdigest()


PROGRESSIVE = "observe, then advance"  # what that scheme does: rows of when it did something else are not its own
LATER_SETTINGS = {  # that came after results were published, at the values that mean what was done before
    "weights": "rtn",
    "keep": "none",
    "weight_samples": 1024,
    "weight_rounds": 1,
    "adaround_iterations": 500,
    "lora": (),
    "first_token": "auto",  # the models of those results have no such token
    "scheduler": None,
    "guidance_rescale": 0.0,
}


EARLIER_MIN_SQNR_DB = 20.0  # before the floor was derived from rounding


IN_NO_STAGE = (
    "model",
    "min_sqnr_db",
    "calib_size",
)  # weights and prompts are hashed themselves; the floor is asked last
ONLY_WITH: Mapping[
    str, Callable[[Recipe], bool]
] = {  # settings that nothing reads unless the recipe has a value that makes it read them
    "percentile": lambda recipe: recipe.ranges in ("percentile", "auto"),
    "observed_steps": lambda recipe: recipe.scheme == "static",
    "reduce": lambda recipe: recipe.scheme == "static",
    "calib_batch": lambda recipe: recipe.reduce == "min-mean",
    "relax_bits": lambda recipe: recipe.relax != "none",
    "weight_samples": lambda recipe: recipe.weights != "rtn" or recipe.keep != "none",
    "weight_rounds": lambda recipe: recipe.weights != "rtn" or recipe.keep != "none",
    "adaround_iterations": lambda recipe: recipe.weights == "adaround",
}


def recipe_key(recipe: Recipe) -> dict[str, str]:
    """The settings that a calibration depends on, a part of its key each: of a change only what it changes is made again."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in IN_NO_STAGE}
    read = {name: value for name, value in settings.items() if name not in ONLY_WITH or ONLY_WITH[name](recipe)}
    return {f"recipe {name}": json.dumps(value) for name, value in read.items()}


def _as_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2, sort_keys=True) + "\n"


def recipe_from_json(text: str) -> Recipe:
    """Read what `Recipe.to_json` wrote. Raises PcrExportError where the text is damaged or of another version."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise PcrExportError(f"the recipe is no JSON ({error}): export again") from error
    names = {field.name for field in fields(Recipe)}
    if not isinstance(values, dict) or not names - set(LATER_SETTINGS) <= set(values) <= names:
        raise PcrExportError("the recipe was written by another version of pcr-export: export again")
    check_schema(values, Recipe, "the recipe", advice="export again")
    lora = tuple(Lora(**each) for each in values.pop("lora", ()))
    settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return Recipe(**settings, lora=lora)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of an exported folder. Raises PcrExportError where it has none, or a damaged one."""
    try:
        text = read_text(folder / "recipe.json", advice="export again")
    except MissingFileError as error:
        raise PcrExportError(
            f"{folder} has no recipe.json, so it is no exported folder: make one with `pcr-export MODEL`, or end the export that stopped"
        ) from error
    return recipe_from_json(text)


def parse_observed_steps(text: str, num_steps: int) -> tuple[str, int]:
    """'uniform:10' -> ("uniform", 10); 'all' -> ("all", num_steps). Raises PcrExportError where it can't be done in `num_steps`."""
    match = re.fullmatch(r"all|(uniform|normal):(\d{1,9})", text)
    if not match:
        raise PcrExportError(f"--observed-steps {text} is not understood: write all, uniform:10 or normal:64")
    kind, count = (match[1], int(match[2])) if match[1] else ("all", num_steps)
    if not 1 <= count <= (num_steps if kind == "uniform" else MOST_DRAWS):
        raise PcrExportError(
            f"--observed-steps {text} must name 1 to {num_steps} steps (normal: 1 or more, to {MOST_DRAWS})"
        )
    return kind, count


def parse_keep(text: str) -> tuple[int, float | None]:
    """'4' -> (4, None) layers; '4.5bit' -> (0, 4.5) bits on average; 'none' -> (0, None). Raises PcrExportError for anything else."""
    match = re.fullmatch(r"none|(\d{1,9})|(\d{1,9}(?:\.\d+)?)bits?", text)
    if not match:
        raise PcrExportError(f"--keep {text} is not understood: write a number of layers, or mean bits such as 4.5bit")
    return int(match[1] or 0), float(match[2]) if match[2] else None


def split_skip(skip: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """The module path patterns, and N of "auto:N", 0 without one. Raises PcrExportError where N is no number above 0."""
    counts = [pattern.removeprefix("auto:") for pattern in skip if pattern.startswith("auto:")]
    for count in counts:
        if not count.isdecimal() or int(count) < 1:
            raise PcrExportError(f"--skip auto:{count} is not understood: write a number of layers, such as auto:4")
    return tuple(pattern for pattern in skip if not pattern.startswith("auto:")), sum(map(int, counts))


def parse_bits(text: str) -> tuple[int, int]:
    """'w8a8' -> (8, 8). Raises PcrExportError where the text has another form."""
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text.lower())
    if not match:
        raise PcrExportError(f"--bits {text} is not understood: write weight and activation bits as w8a8")
    return int(match[1]), int(match[2])
