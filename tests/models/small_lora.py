"""LoRA files made at random for the tiny pipelines, as diffusers and as kohya's scripts write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYERS = {  # part of the pipeline -> layers of it, a convolution among them
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.0.resnets.0.conv1",
    ),
    "text_encoder": tuple(f"encoder.layers.0.self_attn.{name}" for name in ATTENTION),
    "text_encoder_2": ("encoder.layers.1.mlp.fc1", *(f"encoder.layers.1.self_attn.{name}" for name in ATTENTION)),
}


def find_layer(part: nn.Module, name: str) -> nn.Module:
    """A layer of the part; transformers before 5 keeps those of CLIP below `text_model`."""
    inner = part.text_model if hasattr(part, "text_model") and name.startswith("encoder.") else part
    return inner.get_submodule(name)


def random_updates(pipeline: object, seed: int = 0) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(part, layer) -> A float32 [rank, inputs, ...], B float32 [outputs, rank, ...]."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for part, names in LAYERS.items():
        for name in names if getattr(pipeline, part, None) is not None else ():
            out, inputs, *kernel = find_layer(getattr(pipeline, part), name).weight.shape
            a = torch.randn((RANK, inputs, *kernel), generator=generator)
            b = torch.randn((out, RANK, *[1] * len(kernel)), generator=generator)
            updates[part, name] = (a / 10, b / 10)
    return updates


def update_of_weight(a: Tensor, b: Tensor) -> Tensor:
    """B A, in the shape of the layer's weight."""
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def save_as_diffusers(updates: Mapping[tuple[str, str], tuple[Tensor, Tensor]], path: Path) -> Path:
    """unet.LAYER.lora_A.weight, text_encoder.text_model.LAYER.lora_A.weight."""
    tensors = {}
    for (part, name), (a, b) in updates.items():
        prefix = f"{part}.{name}" if part == "unet" else f"{part}.text_model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, path)
    return path


def save_as_kohya(
    updates: Mapping[tuple[str, str], tuple[Tensor, Tensor]], alphas: Mapping[tuple[str, str], float], path: Path
) -> Path:
    """lora_unet_LAYER.lora_down.weight, lora_te1_text_model_LAYER.alpha and so on, dots written as underscores."""
    tensors = {}
    for (part, name), (a, b) in updates.items():
        stem = {"unet": "lora_unet", "text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}[
            part
        ]
        prefix = f"{stem}_{name.replace('.', '_')}"
        tensors |= {f"{prefix}.lora_down.weight": a, f"{prefix}.lora_up.weight": b}
        tensors[f"{prefix}.alpha"] = torch.tensor(alphas[part, name])
    save_file(tensors, path)
    return path
