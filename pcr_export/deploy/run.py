"""From an exported folder alone to images, with the sampling settings of its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from pcr_export.deploy.pipeline import load_exported_pipeline
from pcr_export.models.catalog import CatalogEntry, fill_in, own_picture_size
from pcr_export.models.denoiser import sample
from pcr_export.models.load import LoadedModel
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.qdiffbench.images import to_uint8
from pcr_export.recipe import read_recipe


def generate(
    folder: Path,
    prompt: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    engine: str | None = None,
) -> np.ndarray:
    """Draw `prompt` with an exported folder.

    Args:
        folder: what an export wrote.
        steps, guidance_scale: None for those of the export's recipe.
        engine: as `load_exported_pipeline` takes it.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PcrExportError: as `load_exported_pipeline` does.
    """
    model = load_exported_model(folder, engine=engine)
    for text, what in ((prompt, "prompts"), (negative_prompt, "negative prompts")):
        warn_of_cut_prompts(tokenizers_of(model.pipeline), [text], what)
    entry = model.entry
    entry = replace(
        entry,
        num_inference_steps=entry.num_inference_steps if steps is None else steps,
        guidance_scale=entry.guidance_scale if guidance_scale is None else guidance_scale,
    )
    denoiser = replace(model, entry=entry).denoiser(negative_prompt=negative_prompt)
    assert denoiser.decode is not None
    return to_uint8(denoiser.decode(sample(denoiser, denoiser, [prompt], [seed])))[0]


def load_exported_model(
    folder: Path,
    threads: int | None = None,
    *,
    engine: str | None = None,
    network: Callable[[str], nn.Module] | None = None,
) -> LoadedModel:
    """An exported folder as a model: its pipeline, and the sampling settings of its recipe (without one, its class's common ones).

    Args:
        threads, engine, network: as `load_exported_pipeline` takes them.

    Raises:
        PcrExportError: as `load_exported_pipeline` does, or the recipe is damaged.
    """
    pipeline = load_exported_pipeline(folder, threads, engine=engine, network=network)
    entry = CatalogEntry(name=folder.resolve().name, source=str(folder))
    if (folder / "recipe.json").is_file():
        recipe = read_recipe(folder)
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        entry = replace(entry, **{name: getattr(recipe, name) for name in names})
    filled = fill_in(
        entry,
        class_name=type(pipeline).__name__,
        own_size=own_picture_size(pipeline.unet.config.get("sample_size"), pipeline.vae_scale_factor),
        few_steps=pipeline.unet.config.time_cond_proj_dim is not None,
    )
    return LoadedModel(entry=filled, pipeline=pipeline)
