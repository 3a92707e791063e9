"""UNets of full size with random weights: the configurations of Stable Diffusion's denoisers, written as diffusers folders."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2**30
VECTOR_NOISE = 0.1  # of biases around 0 and of the gains of norms around 1
SEED_FILE = "seed.json"  # written last: a folder without it is not whole

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sdxl": {  # stabilityai/stable-diffusion-xl-base-1.0
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
    },  # stable-diffusion-v1-5: diffusers' defaults but for these two
}


def write_random_unet(kind: str, folder: Path, seed: int) -> None:
    """Write a UNet of `CONFIGURATIONS` as sharded float32 safetensors, one shard in memory at a time.

    A matrix is normal with variance 1 / fan_in. Does nothing where the folder holds this seed's.
    """
    made = {"kind": kind, "seed": seed, "configuration": CONFIGURATIONS[kind]}
    if _is_made(folder, made):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SEED_FILE).unlink(missing_ok=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGURATIONS[kind])
    unet.save_config(folder)
    shards = list(_shards(unet.state_dict()))
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    generator = torch.Generator().manual_seed(seed)
    for name, shard in zip(names, shards, strict=True):
        save_file({key: _random(key, like, generator) for key, like in shard.items()}, folder / name)
    index = {
        "metadata": {"total_size": sum(like.nbytes for shard in shards for like in shard.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    _write_json(folder / SEED_FILE, made)


def _is_made(folder: Path, made: dict[str, Any]) -> bool:
    path = folder / SEED_FILE
    return path.exists() and json.loads(path.read_text()) == json.loads(json.dumps(made))


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return noise.div_(math.sqrt(like[0].numel()))
    is_gamma = "norm" in name and name.endswith("weight")
    return noise.mul_(VECTOR_NOISE).add_(1.0 if is_gamma else 0.0)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, path)
