"""The parts of diffusers' pipelines whose networks are onnxruntime sessions or TensorRT engines of an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from pcr_export.deploy.refusals import INVERSION, Axes, GraphPart, check_inputs, refuse_arguments
from pcr_export.deploy.schedule import ScheduleWatch
from pcr_export.engines.engine_folder import find_engine, tensorrt_onnx
from pcr_export.engines.onnx_files import input_axes
from pcr_export.engines.onnxruntime import RUN_ERRORS, OnnxRuntimeEngine
from pcr_export.engines.tensorrt_runner import TensorRtEngine
from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.denoiser import Inputs
from pcr_export.models.part_configs import full_config
from pcr_export.models.picture_sizes import check_picture_size, latent_factor

TITLES = {
    "unet": "UNet",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
}


CONFIGS = {
    "unet": UNet2DConditionModel,
    **dict.fromkeys(("text_encoder", "text_encoder_2"), CLIPTextConfig),
    **dict.fromkeys(("vae_encoder", "vae_decoder"), AutoencoderKL),
}


def part_config(folder: Path) -> FrozenDict:
    """The configuration of an exported part, which diffusers reads. Raises PcrExportError where it is missing or damaged."""
    return FrozenDict(full_config(folder / "config.json", CONFIGS[folder.name], advice="export again"))


class OnnxPart(GraphPart):
    """A part of a pipeline whose network is an onnxruntime session; diffusers reads config, dtype and device of it."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        super().__init__()
        self.title = TITLES[folder.name]
        self.config = part_config(folder)
        self.engine = OnnxRuntimeEngine(
            folder / "model.onnx", threads
        ).__enter__()  # closed with the last reference to it
        self.output_names = [output.name for output in self.engine.session.get_outputs()]
        self.ports: Mapping[str, Axes] = {port.name: port.shape for port in self.engine.session.get_inputs()}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, on the CPU. Raises PcrExportError where the inputs are none that the graph takes."""
        check_inputs(self.title, self.ports, inputs)
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
        try:
            arrays = self.engine.session.run(None, feed)
        except RUN_ERRORS as error:
            shapes = {name: list(array.shape) for name, array in feed.items()}
            raise PcrExportError(
                f"the exported {self.title} does not run on inputs of the sizes {shapes}: {first_line(error)}"
            ) from error
        return {name: torch.from_numpy(array) for name, array in zip(self.output_names, arrays, strict=True)}


class ExportedUnet(GraphPart):
    """Called as a UNet2DConditionModel is; `network` is called with the named inputs. A schedule that is not calibrated is warned of."""

    title = TITLES["unet"]

    def __init__(self, folder: Path, network: Callable[[Inputs], Tensor], ports: Mapping[str, Axes]) -> None:
        """Read the configuration in `folder`; `ports` are the axes of each of the network's inputs."""
        super().__init__()
        self.config = part_config(folder)
        self.network, self.ports = network, ports
        self.schedule = ScheduleWatch(folder.parent)
        self.vae_scale_factor = vae_scale_factor(folder.parent)
        # the one weight's size that StableDiffusionXLPipeline looks up
        self.add_embedding = SimpleNamespace(
            linear_1=SimpleNamespace(in_features=self.config.get("projection_class_embeddings_input_dim"))
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Noise or v, of sample's shape and on its device; alone in a tuple without `return_dict`.

        Raises:
            PcrExportError: an argument is given that the graph has no input for, or a size is none that it takes.
        """
        added = added_cond_kwargs or {}
        refuse_arguments(
            self.title,
            {
                **{name: value for name, value in added.items() if name not in self.ports},
                "class_labels": class_labels,
                "attention_mask": attention_mask,
                "cross_attention_kwargs": cross_attention_kwargs,
                "down_block_additional_residuals": down_block_additional_residuals,
                "mid_block_additional_residual": mid_block_additional_residual,
                "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
                "encoder_attention_mask": encoder_attention_mask,
            },
        )
        given = {
            "sample": sample,
            "timestep": _one_timestep(timestep),
            "encoder_hidden_states": encoder_hidden_states,
            **added,
            "timestep_cond": timestep_cond,
        }
        inputs = {name: tensor.to(torch.float32) for name, tensor in given.items() if tensor is not None}
        check_inputs(self.title, self.ports, inputs)
        per_latent = self.vae_scale_factor
        height, width = (size * per_latent for size in sample.shape[-2:])
        check_picture_size(height, width, latent_factor(self.config) * per_latent)
        self.schedule.see(float(inputs["timestep"]))
        output = self.network(inputs).to(sample.device, sample.dtype)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def vae_scale_factor(folder: Path) -> int:
    """Pixels per latent, by which sizes are told; that of every published VAE where the folder was exported without."""
    part = folder / "vae_decoder"
    return 2 ** (len(part_config(part)["block_out_channels"]) - 1) if (part / "config.json").exists() else 8


def _one_timestep(timestep: Tensor | float) -> Tensor:
    """float32 []: the timestep of all rows. Raises PcrExportError where rows differ in it."""
    values = torch.as_tensor(timestep).to(torch.float32).flatten()
    if not len(values) or not torch.all(values == values[0]):
        raise PcrExportError(
            "the exported UNet takes one timestep for all rows of a call: call it once for each timestep"
        )
    return values[0]


class OnnxUnet(ExportedUnet):
    """The UNet as an onnxruntime session."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        part = OnnxPart(folder, threads)
        super().__init__(folder, lambda inputs: part.run(inputs)[part.output_names[0]], part.ports)


class TensorRtUnet(ExportedUnet):
    """The UNet as a TensorRT engine of an exported folder; inputs and outputs may live on the CPU or on the GPU."""

    to_a_gpu = "the engine is on the GPU already"

    def __init__(self, folder: Path, target: str) -> None:
        onnx_path = tensorrt_onnx(folder)
        engine = TensorRtEngine(find_engine(folder, target), onnx_path)
        # closed with the last reference to it
        super().__init__(folder / "unet", engine.__enter__(), input_axes(onnx_path))


class OnnxTextEncoder(OnnxPart):
    """Called as a CLIPTextModel or a CLIPTextModelWithProjection is."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput | tuple[Any, ...]:
        """Every output, hidden states where they are asked for; the last hidden state closes them as optimum closes them.

        Raises:
            PcrExportError: an argument is given that the graph has no input for, or a token is none of its vocabulary.
        """
        others = {"attention_mask": attention_mask, "position_ids": position_ids}
        refuse_arguments(self.title, {**others, "output_attentions": output_attentions})
        self._check_tokens(input_ids)
        outputs = self.run({"input_ids": input_ids.to(torch.int64)})
        last = outputs["last_hidden_state"]
        hidden = (*(outputs[f"hidden_states.{i}"] for i in range(self.config["num_hidden_layers"])), last)
        answer: BaseModelOutputWithPooling | CLIPTextModelOutput
        if "text_embeds" in outputs:
            answer = CLIPTextModelOutput(text_embeds=outputs["text_embeds"], last_hidden_state=last)
        else:
            answer = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=outputs["pooler_output"])
        if output_hidden_states:
            answer["hidden_states"] = hidden
        return answer.to_tuple() if return_dict is False else answer

    def _check_tokens(self, ids: Tensor) -> None:
        known = self.config.get("vocab_size")
        if isinstance(known, int) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise PcrExportError(
                f"the exported {self.title} knows {known} tokens, and the prompt has token {int(ids.max())}: {INVERSION}"
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
        parameters = self.encoder.run({"sample": images.to(torch.float32).contiguous()})["latent_parameters"]
        latents: Any = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Images float32 [batch, 3, h f, w f] in -1..1; `generator` is diffusers' and draws nothing, as in an AutoencoderKL."""
        del generator
        images = self.run({"latent_sample": latents.to(torch.float32)})["sample"]
        return DecoderOutput(sample=images) if return_dict else (images,)


def vae_encoder(folder: Path) -> Path:
    """The VAE encoder's part of an exported folder. Raises PcrExportError where it has none."""
    part = folder / "vae_encoder"
    if not (part / "model.onnx").is_file():
        raise PcrExportError(f"{part / 'model.onnx'} is missing, which encodes images: export again")
    return part
