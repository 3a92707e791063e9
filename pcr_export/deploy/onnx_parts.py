"""Text encoders and both halves of the VAE -> float32 ONNX with the names that optimum gives their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.graph.to_onnx import OPSET, quiet_exporter, save_model


def export_text_encoder(encoder: Any, tokens: int, path: Path) -> None:
    """A CLIP text tower as ONNX.

        input_ids int64 [batch, tokens] -> last_hidden_state, pooler_output               CLIPTextModel
                                        -> text_embeds, last_hidden_state                 CLIPTextModelWithProjection
                                           and hidden_states.N for every N below the last, float32 [batch, tokens, width]

    Args:
        encoder: in eval mode.
        tokens: of a padded prompt.
        path: model.onnx, its weights go to model.onnx_data beside it.

    Raises:
        PcrExportError: the encoder can't be traced.
    """
    module = _TextEncoder(encoder)
    ids = torch.zeros((2, tokens), dtype=torch.int64)
    ids[:, -1] = int(encoder.config.eos_token_id or 0)
    _export(module, {"input_ids": ids}, module.output_names, {"input_ids": {0: "batch"}}, path)


def export_vae_decoder(vae: Any, path: Path) -> None:
    """An AutoencoderKL's decoder as ONNX:  latent_sample float32 [batch, channels, h, w] -> sample float32 [batch, 3, h f, w f].

    Args:
        vae: in eval mode.
        path: model.onnx, its weights go to model.onnx_data beside it.

    Raises:
        PcrExportError: the decoder can't be traced.
    """
    size = 8
    latents = torch.zeros((2, vae.config.latent_channels, size, size + 2))
    axes = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}
    _export(_VaeDecoder(vae), {"latent_sample": latents}, ["sample"], axes, path)


def export_vae_encoder(vae: Any, path: Path) -> None:
    """An AutoencoderKL's encoder as ONNX:  sample float32 [batch, 3, h f, w f] -> latent_parameters float32 [batch, 2 channels, h, w].

    The parameters are mean and log variance of a normal distribution, whose draw is the latents before scaling.

    Args:
        vae: in eval mode.
        path: model.onnx, its weights go to model.onnx_data beside it.

    Raises:
        PcrExportError: the encoder can't be traced.
    """
    f = 2 ** (len(vae.config.block_out_channels) - 1)
    images = torch.zeros((2, vae.config.in_channels, 8 * f, 10 * f))
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}}
    _export(_VaeEncoder(vae), {"sample": images}, ["latent_parameters"], axes, path)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        heads = (
            ("text_embeds", "last_hidden_state")
            if hasattr(encoder, "text_projection")
            else ("last_hidden_state", "pooler_output")
        )
        self.heads = heads
        self.output_names = [*heads, *(f"hidden_states.{i}" for i in range(encoder.config.num_hidden_layers))]

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        outputs = self.encoder(input_ids, output_hidden_states=True)
        return (*(outputs[name] for name in self.heads), *outputs.hidden_states[:-1])


class _VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return image


class _VaeEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.vae.encode(sample).latent_dist.parameters
        return parameters


def _export(
    module: nn.Module, example: dict[str, Tensor], outputs: list[str], axes: Mapping[str, Mapping[int, str]], path: Path
) -> None:
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet_exporter():
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(example),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes={name: dict(axes[name]) for name in example},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        part = type(module).__name__.lstrip("_")
        raise PcrExportError(
            f"the {part} can't be exported to ONNX ({type(error).__name__}): is it a stock diffusers pipeline's?"
        ) from error
    assert program is not None
    _strip(program.model, path.parent.name)
    save_model(program.model, path)


def _strip(model: ir.Model, name: str) -> None:
    """Take out the exporter's notes: stack traces hold this machine's paths."""
    annotated: list[Any] = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        annotated += [node, *node.outputs]
    for item in annotated:
        item.metadata_props.clear()
        item.doc_string = None
    model.graph.name = name
