"""What a network computes with, as one hash: parameters and buffers."""

from __future__ import annotations

import hashlib

import torch

from pcr_export.errors import PcrExportError


def hash_weights(*modules: torch.nn.Module) -> str:
    """sha256 of the modules' parameters and buffers, those that no state dict has among them, with their names, types and shapes.

    Raises PcrExportError where one has no content yet.
    """
    digest = hashlib.sha256()
    for module in modules:
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        for name, tensor in sorted(tensors, key=lambda named: named[0]):
            if tensor.is_meta:
                raise PcrExportError(f"the network's {name} is on the meta device: load its weights first")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
