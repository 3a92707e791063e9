"""Which arithmetic to train in: bfloat16 where the device multiplies it faster than float32."""

from __future__ import annotations

import torch


def autocast(device: torch.device) -> torch.autocast:
    """Return the autocast context: bfloat16 on CUDA and on a CPU with AMX, float32 (disabled) on any other CPU."""
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast))
