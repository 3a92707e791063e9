"""The parts of diffusers' pipelines whose networks are onnxruntime sessions or TensorRT engines of an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from pcr_export.deploy.schedule import ScheduleWatch
from pcr_export.engines.engine_folder import find_engine, tensorrt_onnx
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.tensorrt_runner import TensorRtEngine
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import read_json
from pcr_export.models.denoiser import Inputs


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
    """Called as a UNet2DConditionModel is; `network` is called with the named inputs. A schedule that is not calibrated is warned of."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: Path, network: Callable[[Inputs], Tensor]) -> None:
        super().__init__()
        self.config = FrozenDict(read_json(folder / "config.json"))
        self.network = network
        self.schedule = ScheduleWatch(folder.parent)
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
        self.schedule.see(float(timestep))
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
    """Called as an AutoencoderKL is. The encoder, which image-to-image and inpainting need, is loaded when it is first called."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        super().__init__(folder / "vae_decoder", threads)
        self.load_encoder = lambda: OnnxPart(vae_encoder(folder), threads)

    @cached_property
    def encoder(self) -> OnnxPart:
        """The encoder's session. Raises PcrExportError where the folder has none."""
        return self.load_encoder()

    def encode(self, images: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """The distribution of the latents, float32 [batch, channels, h, w], of images float32 [batch, 3, h f, w f] in -1..1."""
        parameters = self.encoder.run({"sample": images.contiguous()})["latent_parameters"]
        latents: Any = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(self, latents: Tensor, **_unused: Any) -> tuple[Tensor]:
        """(images float32 [batch, 3, h f, w f] in -1..1,)."""
        return (self.run({"latent_sample": latents})["sample"],)


def vae_encoder(folder: Path) -> Path:
    """The VAE encoder's part of an exported folder. Raises PcrExportError where it has none."""
    part = folder / "vae_encoder"
    if not (part / "model.onnx").is_file():
        raise PcrExportError(f"{part / 'model.onnx'} is missing, which encodes images: export again")
    return part
