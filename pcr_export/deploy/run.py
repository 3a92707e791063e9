"""From an exported folder alone to images: diffusers' own pipeline whose networks are onnxruntime sessions or engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from transformers import CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from pcr_export.engines.engine_folder import find_engine, tensorrt_onnx
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.tensorrt_runner import TensorRtEngine
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import CatalogEntry, fill_in, read_json, read_model_index
from pcr_export.models.denoiser import Inputs, sample
from pcr_export.models.load import LoadedModel
from pcr_export.models.pipelines import Pipeline
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
    entry = model.entry
    entry = replace(
        entry,
        num_inference_steps=entry.num_inference_steps if steps is None else steps,
        guidance_scale=entry.guidance_scale if guidance_scale is None else guidance_scale,
    )
    denoiser = replace(model, entry=entry).denoiser(negative_prompt=negative_prompt)
    assert denoiser.decode is not None
    return to_uint8(denoiser.decode(sample(denoiser, denoiser, [prompt], [seed])))[0]


def load_exported_model(folder: Path, threads: int | None = None, *, engine: str | None = None) -> LoadedModel:
    """An exported folder as a model: its pipeline, and the sampling settings of its recipe (without one, its class's common ones).

    Raises:
        PcrExportError: as `load_exported_pipeline` does, or the recipe is damaged.
    """
    pipeline = load_exported_pipeline(folder, threads, engine=engine)
    entry = CatalogEntry(name=folder.resolve().name, source=str(folder))
    if (folder / "recipe.json").is_file():
        recipe = read_recipe(folder)
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        entry = replace(entry, **{name: getattr(recipe, name) for name in names})
    size = pipeline.unet.config.sample_size
    filled = fill_in(
        entry,
        class_name=type(pipeline).__name__,
        sample_size=(size if isinstance(size, int) else size[0]) * pipeline.vae_scale_factor,
        few_steps=pipeline.unet.config.time_cond_proj_dim is not None,
    )
    return LoadedModel(entry=filled, pipeline=pipeline)


def load_exported_pipeline(folder: Path, threads: int | None = None, *, engine: str | None = None) -> Pipeline:
    """The diffusers pipeline of an exported folder, its networks run by onnxruntime on the CPU; no torch weights are read.

    Args:
        folder: with model_index.json and the ONNX of every part.
        threads: of each session; None for onnxruntime's choice.
        engine: the target, such as "sm89", whose TensorRT engine runs the UNet on the GPU; None for onnxruntime. The text encoders
            and the VAE stay on the CPU.

    Raises:
        PcrExportError: the folder is no export, a part of it is missing or damaged, or the engine can't run here.
    """
    if not folder.is_dir():
        raise PcrExportError(f"{folder} is no folder: give one that an export wrote, such as engines/sdxl-w8a8")
    index = read_model_index(folder)
    if not (folder / "unet" / "model.onnx").is_file():
        raise PcrExportError(
            f"{folder} has no unet/model.onnx, so it is no exported folder: make one with `pcr-export {folder}`"
        )
    parts: dict[str, Any] = {
        "unet": OnnxUnet(folder / "unet", threads) if engine is None else TensorRtUnet(folder, engine),
        "vae": OnnxVae(folder / "vae_decoder", threads),
        "text_encoder": OnnxTextEncoder(folder / "text_encoder", threads),
        "tokenizer": _read_tokenizer(folder / "tokenizer"),
        "scheduler": _read_scheduler(folder / "scheduler"),
    }
    if index["_class_name"] == "StableDiffusionXLPipeline":
        parts |= {
            "text_encoder_2": OnnxTextEncoder(folder / "text_encoder_2", threads),
            "tokenizer_2": _read_tokenizer(folder / "tokenizer_2"),
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
            "add_watermarker": False,
        }
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: DiffusionPipeline = getattr(diffusers, index["_class_name"])(**parts)
    return pipeline


class OnnxPart(nn.Module):
    """A part of a pipeline whose network is an onnxruntime session; diffusers reads config, dtype and device of it."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: Path, threads: int | None) -> None:
        super().__init__()
        self.config = FrozenDict(read_json(folder / "config.json"))
        self.engine = OnnxRuntimeEngine(
            folder / "model.onnx", threads
        ).__enter__()  # closed with the last reference to it
        self.output_names = [output.name for output in self.engine.session.get_outputs()]

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name."""
        arrays = self.engine.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.output_names, arrays, strict=True)}


class ExportedUnet(nn.Module):
    """Called as a UNet2DConditionModel is; `network` is called with the named inputs."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: Path, network: Callable[[Inputs], Tensor]) -> None:
        super().__init__()
        self.config = FrozenDict(read_json(folder / "config.json"))
        self.network = network
        # the one weight's size that StableDiffusionXLPipeline looks up
        self.add_embedding = SimpleNamespace(
            linear_1=SimpleNamespace(in_features=self.config.get("projection_class_embeddings_input_dim"))
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **_unused: Any,
    ) -> tuple[Tensor]:
        """(noise or v, of sample's shape and on its device,)."""
        inputs = {
            "sample": sample,
            "timestep": timestep.to(torch.float32),
            "encoder_hidden_states": encoder_hidden_states,
        }
        inputs |= added_cond_kwargs or {}
        if timestep_cond is not None:
            inputs["timestep_cond"] = timestep_cond
        return (self.network(inputs).to(sample.device, sample.dtype),)


class OnnxUnet(ExportedUnet):
    """The UNet as an onnxruntime session."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        part = OnnxPart(folder, threads)
        super().__init__(folder, lambda inputs: part.run(inputs)[part.output_names[0]])


class TensorRtUnet(ExportedUnet):
    """The UNet as a TensorRT engine of an exported folder; inputs and outputs may live on the CPU or on the GPU."""

    def __init__(self, folder: Path, target: str) -> None:
        engine = TensorRtEngine(find_engine(folder, target), tensorrt_onnx(folder))
        super().__init__(folder / "unet", engine.__enter__())  # closed with the last reference to it


class OnnxTextEncoder(OnnxPart):
    """Called as a CLIPTextModel or a CLIPTextModelWithProjection is."""

    def forward(self, input_ids: Tensor, **_unused: Any) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        """Every output, hidden states too; the last hidden state closes them as optimum closes them."""
        outputs = self.run({"input_ids": input_ids})
        last = outputs["last_hidden_state"]
        hidden = (*(outputs[f"hidden_states.{i}"] for i in range(self.config["num_hidden_layers"])), last)
        if "text_embeds" in outputs:
            return CLIPTextModelOutput(text_embeds=outputs["text_embeds"], last_hidden_state=last, hidden_states=hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=outputs["pooler_output"], hidden_states=hidden
        )


class OnnxVae(OnnxPart):
    """Called as an AutoencoderKL is; it decodes only."""

    def decode(self, latents: Tensor, **_unused: Any) -> tuple[Tensor]:
        """(images float32 [batch, 3, h f, w f] in -1..1,)."""
        return (self.run({"latent_sample": latents})["sample"],)


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise PcrExportError(f"{folder / 'tokenizer.json'} is missing: export again")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PcrExportError(f"{folder} holds no readable tokenizer ({error}): export again") from error


def _read_scheduler(folder: Path) -> Any:
    config = read_json(folder / "scheduler_config.json")
    name = str(config.get("_class_name"))
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise PcrExportError(f"{folder} names {name}, which is no scheduler of diffusers: export again")
    from_config: Any = getattr(scheduler, "from_config")  # noqa: B009 - diffusers mixes it in where types don't see it
    return from_config(config)
