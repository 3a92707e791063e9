"""LoRA inside the weights:  W + scale alpha / rank B A  for every layer of the UNet and the text encoders that a file names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_file import LoraFile
from pcr_export.models.lora_tensors import lora_fault, other_half, second_half_of

FUSED = ("unet", "text_encoder", "text_encoder_2")
ADAPTER = "fused"
MOST_REASON = 300  # characters


def fuse_lora(pipeline: Any, lora: LoraFile) -> None:
    """Add a file's updates to the pipeline's weights; no trace of it stays but the weights. Every tensor of it is used.

    Args:
        pipeline: float32, of diffusers.

    Raises:
        PcrExportError: the file does not fit the pipeline: a tensor of it has no place there (it is named), or it holds NaN.
    """
    tensors, has_header = _read(lora)
    try:
        if fault := lora_fault({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise ValueError(fault)
        updates = multiply_by_alpha(tensors)
        pipeline.load_lora_weights(**_what_to_load(lora, updates, has_header), adapter_name=ADAPTER)
        parts = {name: part for name in FUSED if (part := getattr(pipeline, name, None)) is not None}
        unused = unused_tensors(updates, parts.values())
        if unused:
            raise ValueError(
                f"{len(unused)} of its {len(updates)} tensors have no place in it, the first is {unused[0]}"
            )
        pipeline.fuse_lora(
            components=list(parts),
            lora_scale=lora.scale,
            adapter_names=[ADAPTER],
            safe_fusing=True,
        )
        pipeline.unload_lora_weights()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:MOST_REASON].rstrip(" .:") or type(error).__name__
        raise PcrExportError(
            f"--lora {lora.path} can't be fused into this model ({reason}): give a LoRA that was trained for it"
        ) from error


def unused_tensors(updates: Mapping[str, Tensor], parts: Iterable[nn.Module]) -> list[str]:
    """The tensors of a file that no layer of `parts` holds now: diffusers passes over names that it does not find."""
    held: Counter[str] = Counter()
    for part in parts:
        for module in part.modules():
            halves = (getattr(module, name, {}) for name in ("lora_A", "lora_B"))
            held.update(_bytes_hash(half[ADAPTER].weight) for half in halves if ADAPTER in half)
    unused = []
    for name, tensor in updates.items():
        digest = _bytes_hash(tensor)
        if held[digest] == 0:
            unused.append(name)
        held[digest] -= 1
    return unused


def _bytes_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def _read(lora: LoraFile) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether its header tells what they are multiplied with."""
    with safe_open(lora.path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, "lora_adapter_metadata" in (file.metadata() or {})


def _what_to_load(lora: LoraFile, updates: Mapping[str, Tensor], has_header: bool) -> dict[str, Any]:
    """The arguments that tell diffusers what to load: the tensors, or the file where its header counts."""
    if not has_header:
        return {"pretrained_model_name_or_path_or_dict": dict(updates)}
    name = {"pretrained_model_name_or_path_or_dict": str(lora.path.parent), "weight_name": lora.path.name}
    return {**name, "local_files_only": True, "use_safetensors": True}


def multiply_by_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same updates without alphas:  B alpha / rank. peft loses those of some layers where a file has several.

    Args:
        tensors: LAYER.lora_down.weight [rank, ...], LAYER.lora_up.weight [..., rank, ...], and LAYER.alpha [] where it is not the rank;
            lora_A and lora_B, and the other spellings of `lora_tensors`, likewise.
    """
    updates = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - updates.keys():
        up = second_half_of(name, updates)
        if up is None or other_half(up) not in updates:
            raise ValueError(f"{name} belongs to no layer of it")
        updates[up] = updates[up].float() * (tensors[name].float().reshape(()) / len(updates[other_half(up)]))
    return updates
