"""What was asked for on the command line, and what it means for a model: its recipe, prompts and folder. No heavy imports."""

from __future__ import annotations

import shlex
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pcr_export.engine_settings import EngineSettings, parse_range
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import CatalogEntry, resolve
from pcr_export.models.lora_file import parse_loras
from pcr_export.prompts import own_prompt_sets, read_prompts
from pcr_export.recipe import Recipe, parse_bits
from pcr_export.scheduler_setting import parse_scheduler

CALIBRATION_PIXELS_PER_CALL = 2**20  # prompts of one UNet call, times height and width
VALIDATION_PIXELS = 2**19  # validation images, times height and width
MOST_IMAGES = 128
USUAL_GUIDANCE = 5.0  # stands in for a model's own while nothing is loaded
PART_FORMS = ("fp32", "fp16", "int8")  # of the weights of text encoders and VAE, each smaller than the one before


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The arguments of `pcr-export MODEL`, by the names of its options. None means the model's own."""

    model: str
    out: Path = Path("engines")
    bits: str = "w8a8"
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    scheduler: str | None = None  # NAME[:key=value,...] of diffusers
    height: str | None = None  # pixels, or MIN:OPT:MAX of the engines; calibrated at OPT
    width: str | None = None
    backend: str = EngineSettings.backend
    target: str | None = None  # GPUs, separated by commas
    batch: str = "1"  # images per call, or MIN:OPT:MAX
    allow_float_fallback: bool = EngineSettings.allow_float_fallback
    onnx_only: bool = False
    calib_size: int = Recipe.calib_size
    calib_batch: int | None = None
    prompts_file: Path | None = None
    eval_prompts_file: Path | None = None
    images: int | None = None
    scheme: str = Recipe.scheme
    ranges: str = Recipe.ranges
    percentile: float = Recipe.percentile
    affine: bool = field(default=Recipe.affine, metadata={"off": "--symmetric"})
    observed_steps: str = Recipe.observed_steps
    reduce: str = Recipe.reduce
    smooth_quant: float | None = Recipe.smooth_quant
    split_shortcut: bool = Recipe.split_shortcut
    first_token: str = Recipe.first_token
    relax: str | None = None
    relax_bits: int = Recipe.relax_bits
    weights: str = Recipe.weights
    keep: str = Recipe.keep
    weight_samples: int = Recipe.weight_samples
    weight_rounds: int = Recipe.weight_rounds
    adaround_iterations: int = Recipe.adaround_iterations
    skip: list[str] | None = None
    lora: list[str] | None = None  # FILE or FILE:SCALE
    seed: int = Recipe.seed
    resume: bool = True
    validate: bool = True
    parts: str = PART_FORMS[0]
    strip_encoders: bool = False

    def command(self) -> str:
        """The command line of an equal request, quoted for a shell: every option that is not its default."""
        words = ["pcr-export", "export"]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name != "model" and value != option.default:
                words += _words_of(option, value)
        return shlex.join([*words, *(["--"] if self.model.startswith("-") else []), self.model])

    def entry(self) -> CatalogEntry:
        """The model that was asked for, with the sampling settings that were."""
        asked: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "scheduler": str(parse_scheduler(self.scheduler)) if self.scheduler is not None else None,
            "height": parse_range("--height", self.height)[1] if self.height else None,
            "width": parse_range("--width", self.width)[1] if self.width else None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(resolve(self.model), lora=parse_loras(self.lora), **given)

    def engines(self) -> EngineSettings:
        """The engines that were asked for."""
        targets = tuple(dict.fromkeys(part.strip().lower() for part in (self.target or "").split(",") if part.strip()))
        return EngineSettings(
            backend=self.backend,
            targets=targets,
            batch=parse_range("--batch", self.batch),
            height=parse_range("--height", self.height) if self.height else None,
            width=parse_range("--width", self.width) if self.width else None,
            allow_float_fallback=self.allow_float_fallback,
            build=not self.onnx_only,
            rebuild_command=self.command(),
        )

    def folder(self) -> Path:
        """The output folder, NAME-wXaY."""
        return self.out / f"{self.entry().name}-{self.bits.lower()}"

    def prompt_sets(self) -> tuple[list[str], list[str]]:
        """The prompts to calibrate on and those to validate with: the user's files, or the sets of calib/."""
        own = own_prompt_sets(self.model)
        return (
            read_prompts(self.prompts_file or own.calibration),
            read_prompts(self.eval_prompts_file or own.in_domain),
        )

    def check(self) -> None:
        """Raise PcrExportError for everything that can be refused before a model is loaded."""
        entry = self.entry()
        self.engines()
        self.recipe(
            replace(
                entry,
                num_inference_steps=entry.num_inference_steps or 1000,
                guidance_scale=USUAL_GUIDANCE if entry.guidance_scale is None else entry.guidance_scale,
                height=entry.height or 512,
                width=entry.width or 512,
            ),
            num_prompts=len(self.prompt_sets()[0]),
        )
        if self.parts not in PART_FORMS:
            raise PcrExportError(f"--parts {self.parts} is unknown: choose one of {', '.join(PART_FORMS)}")
        if self.strip_encoders and self.parts != PART_FORMS[0]:
            raise PcrExportError(f"--parts {self.parts} needs the parts that --strip-encoders leaves out: choose one")
        if self.calib_batch is not None and self.reduce != "min-mean":
            raise PcrExportError(
                f"--calib-batch {self.calib_batch} needs --reduce min-mean, which averages over calls: leave it out, "
                "other scales depend on no batch size"
            )
        if self.validate and self.images is not None and self.images < 2:
            raise PcrExportError(f"--images {self.images}: give 2 or more, or --no-validate")

    def recipe(self, entry: CatalogEntry, num_prompts: int) -> Recipe:
        """The recipe for a model whose own settings are all known."""
        if None in (entry.num_inference_steps, entry.guidance_scale, entry.height, entry.width):
            raise ValueError("the entry's sampling settings are not complete")
        weight_bits, activation_bits = parse_bits(self.bits)
        pixels = max(1, int(entry.height or 0) * int(entry.width or 0))
        own_relax = f"{entry.relaxed_end}:20%" if entry.relaxed_end and activation_bits == 8 else "none"
        return Recipe(
            model=self.model,
            num_inference_steps=int(entry.num_inference_steps or 0),
            guidance_scale=float(entry.guidance_scale or 0),
            height=int(entry.height or 0),
            width=int(entry.width or 0),
            scheduler=entry.scheduler,
            guidance_rescale=entry.guidance_rescale,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            scheme=self.scheme,
            ranges=self.ranges,
            percentile=self.percentile,
            affine=self.affine,
            observed_steps=self.observed_steps,
            reduce=self.reduce,
            smooth_quant=self.smooth_quant,
            split_shortcut=self.split_shortcut,
            first_token=self.first_token,
            relax=own_relax if self.relax is None else self.relax,
            relax_bits=self.relax_bits,
            weights=self.weights,
            keep=self.keep,
            weight_samples=self.weight_samples,
            weight_rounds=self.weight_rounds,
            adaround_iterations=self.adaround_iterations,
            skip=(*Recipe.skip, *(self.skip or ())),
            lora=tuple(lora.facts() for lora in entry.lora),
            calib_size=min(self.calib_size, num_prompts),
            calib_batch=max(1, CALIBRATION_PIXELS_PER_CALL // pixels) if self.calib_batch is None else self.calib_batch,
            seed=self.seed,
        )

    def num_images(self, recipe: Recipe, num_prompts: int) -> int:
        """How many images validation makes."""
        own = max(2, min(MOST_IMAGES, VALIDATION_PIXELS // (recipe.height * recipe.width)))
        return min(num_prompts, own if self.images is None else self.images)

    def plan_rows(self) -> list[tuple[str, str]]:
        """The plan for --dry-run, which loads no model: (setting, value)."""
        entry, (calibration, evaluation) = self.entry(), self.prompt_sets()
        own = "the model's own"
        sampling = (
            "name",
            "source",
            "scheduler",
            "num_inference_steps",
            "guidance_scale",
            "guidance_rescale",
            "height",
            "width",
        )
        rows = [(name, own if (value := getattr(entry, name)) is None else str(value)) for name in sampling]
        asked = ("bits", "parts", "scheme", "ranges", "affine", "relax", "relax_bits", "seed")
        rows += [(name, own if (value := getattr(self, name)) is None else str(value)) for name in asked]
        rows += [("lora", f"{lora.path} x {lora.scale:g}") for lora in entry.lora]
        return [
            *rows,
            ("calibration prompts", f"{min(self.calib_size, len(calibration))} of {len(calibration)}"),
            ("backend", f"{self.backend}{f' for {self.target}' if self.target else ''}"),
            ("validation prompts", f"of {len(evaluation)}" if self.validate else "no validation"),
            (
                "stages",
                "calibrate, quantize"
                + (", engines" if self.engines().wants_tensorrt else "")
                + ", package"
                + (", validate, images, quality" if self.validate else ""),
            ),
            ("output", str(self.folder())),
        ]


def _words_of(option: Field[Any], value: Any) -> list[str]:
    """An option with its value as words: a flag for a boolean, the option again for each entry of a list."""
    flag = f"--{option.name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else option.metadata.get("off", f"--no-{flag[2:]}")]
    values = value if isinstance(value, list) else [value]
    return [word for each in values for word in (flag, str(each))]
