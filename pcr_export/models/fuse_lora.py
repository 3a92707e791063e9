"""LoRA inside the weights:  W + scale alpha / rank B A  for every layer of the UNet and the text encoders that a file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_file import LoraFile

DOWN = (".lora_A.", ".lora.down.", ".lora_down.", "_lora.down.", ".lora_linear_layer.down.")  # of one layer each
FUSED = ("unet", "text_encoder", "text_encoder_2")
ADAPTER = "fused"


def fuse_lora(pipeline: Any, lora: LoraFile) -> None:
    """Add a file's updates to the pipeline's weights; no trace of it stays but the weights.

    Args:
        pipeline: float32, of diffusers.

    Raises:
        PcrExportError: the file does not fit the pipeline: its layers have other names or sizes, or hold NaN.
    """
    try:
        named = sum(down in f"{name}." for name in pipeline.lora_state_dict(**_read(lora))[0] for down in DOWN)
        pipeline.load_lora_weights(**_read(lora), adapter_name=ADAPTER)
        parts = {name: part for name in FUSED if (part := getattr(pipeline, name, None)) is not None}
        loaded = sum(_holds_update(module) for part in parts.values() for module in part.modules())
        if loaded == 0 or loaded != named:  # diffusers passes over names that it does not find
            raise ValueError(f"it names {named} layers, of which this model has {loaded}")
        pipeline.fuse_lora(
            components=list(parts),
            lora_scale=lora.scale,
            adapter_names=[ADAPTER],
            safe_fusing=True,
        )
        pipeline.unload_lora_weights()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise PcrExportError(
            f"--lora {lora.path} can't be fused into this model ({reason}): give a LoRA that was trained for it"
        ) from error


def _holds_update(module: nn.Module) -> bool:
    return ADAPTER in getattr(module, "lora_A", {})


def _read(lora: LoraFile) -> dict[str, Any]:
    """The arguments that tell diffusers what to load: the tensors, or the file where its header tells what they are multiplied with."""
    with safe_open(lora.path, "pt") as file:
        if "lora_adapter_metadata" in (file.metadata() or {}):
            name = {"pretrained_model_name_or_path_or_dict": str(lora.path.parent), "weight_name": lora.path.name}
            return {**name, "local_files_only": True, "use_safetensors": True}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return {"pretrained_model_name_or_path_or_dict": multiply_by_alpha(tensors)}


def multiply_by_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same updates without alphas:  B alpha / rank. peft loses those of some layers where a file has several.

    Args:
        tensors: LAYER.lora_down.weight [rank, ...], LAYER.lora_up.weight [..., rank, ...], and LAYER.alpha [] where it is not the rank.
    """
    updates = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for name, alpha in tensors.items():
        layer = name.removesuffix(".alpha")
        up, down = (f"{layer}.lora_{end}.weight" for end in ("up", "down"))
        if layer == name:
            continue
        if up not in updates or down not in updates:
            raise ValueError(f"{name} belongs to no layer of it")
        updates[up] = updates[up].float() * (alpha.float() / len(updates[down]))
    return updates
