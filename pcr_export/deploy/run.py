"""From an exported folder alone to images, with the sampling settings of its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
from torch import nn

from pcr_export.deploy.parts import part_config, vae_scale_factor
from pcr_export.deploy.pipeline import load_exported_pipeline
from pcr_export.manifest import check_exported_folder, check_finished
from pcr_export.models.catalog import CatalogEntry, fill_in, own_picture_size, read_model_index
from pcr_export.models.denoiser import sample
from pcr_export.models.fetch import quiet
from pcr_export.models.load import LoadedModel
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.models.schedulers import check_walk, read_scheduler
from pcr_export.qdiffbench.images import to_uint8
from pcr_export.recipe import read_recipe


def generate(
    folder: Path,
    prompt: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    scheduler: str | None = None,
    negative_prompt: str = "",
    engine: str | None = None,
) -> np.ndarray:
    """Draw `prompt` with an exported folder.

    Args:
        folder: what an export wrote.
        steps, guidance_scale, guidance_rescale: None for those of the export's recipe.
        scheduler: NAME[:key=value,...] of diffusers, with all else as the folder's has it; None for the folder's.
        engine: as `load_exported_pipeline` takes it.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PcrExportError: as `load_exported_pipeline` does, or the settings can't be sampled.
    """
    check_finished(folder)
    model = load_exported_model(folder, engine=engine, scheduler=scheduler, steps=steps)
    for text, what in ((prompt, "prompts"), (negative_prompt, "negative prompts")):
        warn_of_cut_prompts(tokenizers_of(model.pipeline), [text], what)
    entry = with_guidance(model.entry, guidance_scale, guidance_rescale)
    denoiser = replace(model, entry=entry).denoiser(negative_prompt=negative_prompt)
    assert denoiser.decode is not None
    return to_uint8(denoiser.decode(sample(denoiser, denoiser, [prompt], [seed])))[0]


def with_guidance(entry: CatalogEntry, scale: float | None, rescale: float | None = None) -> CatalogEntry:
    """`entry` with another guidance scale and rescaling, None for its own; its own rescaling goes where guidance does."""
    scale = entry.guidance_scale if scale is None else scale
    own = entry.guidance_rescale if scale is not None and scale > 1 else 0.0
    return replace(entry, guidance_scale=scale, guidance_rescale=own if rescale is None else rescale)


def load_exported_model(
    folder: Path,
    threads: int | None = None,
    *,
    engine: str | None = None,
    scheduler: str | None = None,
    steps: int | None = None,
    network: Callable[[str], nn.Module] | None = None,
) -> LoadedModel:
    """An exported folder as a model: its pipeline, and the sampling settings of its recipe (without one, its class's common ones).

    Args:
        threads, engine, network: as `load_exported_pipeline` takes them.
        scheduler, steps: as `generate` takes them.

    Raises:
        PcrExportError: as `load_exported_pipeline`, `read_scheduler` and `check_walk` do, or the recipe is damaged.
    """
    check_exported_folder(folder)
    class_name = read_model_index(folder)["_class_name"]
    entry = sampling_of(folder, class_name)
    if steps is not None:
        entry = replace(entry, num_inference_steps=steps)
    with quiet():
        walked = read_scheduler(folder, scheduler)  # before any network is read
    check_walk(walked, int(entry.num_inference_steps or 0), getattr(diffusers, class_name))
    pipeline = load_exported_pipeline(folder, threads, engine=engine, network=network)
    pipeline.register_modules(scheduler=walked)
    return LoadedModel(entry=entry, pipeline=pipeline)


def sampling_of(folder: Path, class_name: str) -> CatalogEntry:
    """How an exported folder is sampled: as its recipe says, without one as its class commonly is. Raises PcrExportError."""
    entry = CatalogEntry(name=folder.resolve().name, source=str(folder))
    if (folder / "recipe.json").exists():
        recipe = read_recipe(folder)
        names = ("num_inference_steps", "guidance_scale", "guidance_rescale", "height", "width")
        entry = replace(entry, **{name: getattr(recipe, name) for name in names})
    unet, per_latent = part_config(folder / "unet"), vae_scale_factor(folder)
    return fill_in(
        entry,
        class_name=class_name,
        own_size=own_picture_size(unet["sample_size"], per_latent),
        few_steps=unet["time_cond_proj_dim"] is not None,
    )
