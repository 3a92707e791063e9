"""From a name, a folder or a hub id to a float32 pipeline: safetensors only, no code from outside, one line where it fails."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTextConfig

from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.catalog import CatalogEntry, fill_in, own_picture_size, read_model_index, resolve
from pcr_export.models.check_configs import check_configs
from pcr_export.models.check_folder import LEFT_OUT, TOKENIZERS, WEIGHT_STEMS, check_folder, part_variant, weight_files
from pcr_export.models.clean_part import clean_part, read_tokenizer
from pcr_export.models.denoiser import Denoiser
from pcr_export.models.fetch import fetch_folder, fetch_unet, fetch_unet_config, quiet
from pcr_export.models.fuse_lora import fuse_lora
from pcr_export.models.pipelines import Pipeline, denoiser_from_pipeline
from pcr_export.models.read_weights import read_weights
from pcr_export.models.schedulers import check_walk, read_scheduler
from pcr_export.read_files import read_json

OPTIONS = ("force_zeros_for_empty_prompt", "add_watermarker")  # of a pipeline, in its model_index.json


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A pipeline in memory with the settings it is sampled with; no field of `entry` that sampling needs is None."""

    entry: CatalogEntry
    pipeline: Pipeline

    def denoiser(self, *, negative_prompt: str = "") -> Denoiser:
        """The Denoiser of this model at its entry's settings."""
        entry = self.entry
        if (
            entry.num_inference_steps is None
            or entry.guidance_scale is None
            or entry.height is None
            or entry.width is None
        ):
            raise ValueError(f"the settings of {entry.name} are not complete: load it with load_model")
        return denoiser_from_pipeline(
            self.pipeline,
            num_inference_steps=entry.num_inference_steps,
            guidance_scale=entry.guidance_scale,
            height=entry.height,
            width=entry.width,
            negative_prompt=negative_prompt,
            guidance_rescale=entry.guidance_rescale,
        )


def load_model(entry: CatalogEntry) -> LoadedModel:
    """Load the pipeline of `entry` and fill in the settings that it leaves open.

    Raises:
        PcrExportError: as `load_float_pipeline` does.
    """
    pipeline = load_float_pipeline(entry)
    filled = fill_in(
        entry,
        class_name=type(pipeline).__name__,
        own_size=own_picture_size(pipeline.unet.config.sample_size, pipeline.vae_scale_factor),
        few_steps=type(pipeline.scheduler).__name__ == "LCMScheduler"
        or pipeline.unet.config.time_cond_proj_dim is not None,
    )
    return LoadedModel(entry=filled, pipeline=pipeline)


def load_denoiser(model: str, *, negative_prompt: str = "") -> Denoiser:
    """The Denoiser of a catalog name, a pipeline folder or a hub id, at the settings of its catalog entry or class.

    Raises:
        PcrExportError: as `resolve` and `load_float_pipeline` do.
    """
    return load_model(resolve(model)).denoiser(negative_prompt=negative_prompt)


def load_float_pipeline(entry: CatalogEntry) -> Pipeline:
    """The pipeline of `entry`, float32, in eval mode, without safety checker, with the entry's scheduler and UNet where it has them.

    Raises:
        PcrExportError: the hub does not give it, a file is missing or damaged, its parts don't fit each other or the picture's size, or the
            pipeline is of another class.
    """
    folder = Path(entry.source) if entry.is_local else fetch_folder(entry)
    check_folder(folder)
    check_configs(folder, entry, None if entry.unet is None else fetch_unet_config(entry.unet, entry))
    pipeline = _read_pipeline(folder, _read_scheduler(folder, entry))
    if entry.unet is not None:
        pipeline.register_modules(unet=fetch_unet(entry.unet, entry))
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in parts.items():
        _check_finite(part.float(), name, folder)
    for lora in entry.lora:
        with quiet():
            fuse_lora(pipeline, lora)
    for part in parts.values():
        part.eval().requires_grad_(False)
    return pipeline


def _check_finite(part: torch.nn.Module, name: str, folder: Path) -> None:
    """Raise PcrExportError that names the first weight which holds NaN or infinite values: images would turn black without a word."""
    for weight, tensor in part.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise PcrExportError(f"{folder}: {name}.{weight} holds NaN or infinite values: fetch the folder again")


def _read_scheduler(folder: Path, entry: CatalogEntry) -> Any:
    """The scheduler that `entry` is sampled with, walked once; PcrExportError where it or its steps can't be sampled."""
    with quiet():
        scheduler = read_scheduler(folder, entry.scheduler)
    class_name = read_model_index(folder)["_class_name"]
    few_steps = (
        type(scheduler).__name__ == "LCMScheduler"
        or read_json(folder / "unet" / "config.json").get("time_cond_proj_dim") is not None
    )
    steps = fill_in(entry, class_name=class_name, own_size=(8, 8), few_steps=few_steps).num_inference_steps
    check_walk(scheduler, int(steps or 0), getattr(diffusers, class_name))
    return scheduler


def _read_pipeline(folder: Path, scheduler: Any) -> Pipeline:
    """The pipeline of a folder that was looked at. Its parts are read one by one; nothing else of the folder is looked into."""
    index = read_model_index(folder)
    try:
        with quiet():
            parts: dict[str, Any] = {
                name: _read_part(folder, name, index[name]) for name in WEIGHT_STEMS if name in index
            }
            for name in TOKENIZERS:
                if name in index:
                    encoder = parts[name.replace("tokenizer", "text_encoder")]
                    most = encoder.config.max_position_embeddings
                    parts[name] = read_tokenizer(folder / name, class_name=index[name][1], most_tokens=most)
                    _check_vocabulary(folder / name, parts[name], encoder)
            pipeline_class = getattr(diffusers, index["_class_name"])
            # The safety checker is no part of what is exported; leaving it out saves reading 1.2 GB.
            parts |= {**dict.fromkeys(LEFT_OUT), "requires_safety_checker": False, "scheduler": scheduler}
            parts |= {name: index[name] for name in OPTIONS if name in index}
            taken = inspect.signature(pipeline_class).parameters
            pipeline: Pipeline = pipeline_class(**{name: part for name, part in parts.items() if name in taken})
    except PcrExportError:
        raise
    except Exception as error:  # whatever damaged files make of two libraries
        raise PcrExportError(
            f"{folder} can't be loaded as a {index['_class_name']} ({first_line(error)}): fetch it again"
        ) from error
    return pipeline


def _read_part(folder: Path, name: str, named: Sequence[str]) -> torch.nn.Module:
    """The part of a pipeline folder that model_index.json names as (library, class)."""
    library, class_name = named
    network_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    kind = CLIPTextConfig if library == "transformers" else network_class
    with clean_part(folder / name, kind, weight_files(folder, name)) as clean:
        try:
            part: Any = read_weights(
                network_class, clean, folder / name, variant=part_variant(folder, name), local_files_only=True
            )
        except OSError as error:
            raise OSError(str(error).replace(str(clean), str(folder / name))) from error
    if library == "diffusers":
        part.register_to_config(_name_or_path=str(folder / name))  # not the folder that is gone
    else:
        part.config._name_or_path = part.name_or_path = str(folder / name)
    return part


def _check_vocabulary(folder: Path, tokenizer: Any, encoder: Any) -> None:
    """Raise PcrExportError for a tokenizer that makes tokens for which its text encoder has no vector."""
    highest, known = max(tokenizer.get_vocab().values(), default=0), encoder.get_input_embeddings().num_embeddings
    if highest >= known:
        raise PcrExportError(
            f"{folder} has the token {highest}, where the text encoder knows {known}: they are no pair, fetch the folder again"
        )
