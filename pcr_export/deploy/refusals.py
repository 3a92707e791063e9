"""What an exported network can't do is refused in one line: arguments without an input, members without weights, other devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcr_export.errors import PcrExportError

Axes = Sequence[int | str | None]  # of an input: its size, the name of a free axis, or None for any size
FLOAT_PIPELINE = "paint with the float pipeline for that"
LORA = "give LoRA files to the export (--lora FILE[:SCALE]), which fuses them"
SAVING = "copy the exported folder"
INVERSION = "load the textual inversion into the float pipeline, save that with save_pretrained, and export the folder"
IMAGE_PROMPT = f"an IP-Adapter needs weights that the graph lacks: {FLOAT_PIPELINE}"
# What a person who meets the name wanted, by a part of the name; the first that fits counts.
ADVICE = {
    "ip_adapter": IMAGE_PROMPT,
    "image_embeds": IMAGE_PROMPT,
    "image_projection": IMAGE_PROMPT,
    "encoder_hid_proj": IMAGE_PROMPT,
    "intrablock": f"a T2I-Adapter changes the inside of the network: {FLOAT_PIPELINE}",
    "additional_residual": f"a ControlNet or an adapter changes the inside of the network: {FLOAT_PIPELINE}",
    "cross_attention_kwargs": f"{LORA}, and leave the argument out",
    "lora": LORA,
    "peft": LORA,
    "adapter": LORA,
    "token_embedding": INVERSION,
    "input_embeddings": INVERSION,
    "text_model": "leave clip_skip out",
    "slicing": "ask for fewer pictures at once",
    "slice": "leave the call out",
    "tiling": "ask for smaller pictures",
    "memory_efficient": "leave the call out",
    "freeu": "leave the call out",
    "attn_proc": FLOAT_PIPELINE,
}


class MissingMemberError(PcrExportError, AttributeError):
    """A part has no such member. `hasattr` says so too, since it is an AttributeError."""


class GraphPart(nn.Module):
    """A part of a pipeline whose network is a graph: float32 on the CPU, and without weights that could be changed."""

    title = "network"  # in words
    dtype = torch.float32
    device = torch.device("cpu")
    to_a_gpu = "for a GPU, load_pipeline(folder, backend='tensorrt-rtx') runs an engine of the UNet"

    def __getattr__(self, name: str) -> Any:
        """A member that torch or a subclass registered. Raises MissingMemberError for every other name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise MissingMemberError(
                f"the exported {self.title} is a graph and has no {name}: {_advice(name)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """A member; refused for accelerate's hooks, by which enable_model_cpu_offload and its like move weights."""
        if name == "_hf_hook":
            raise PcrExportError(f"the exported {self.title} has no weights to move to and fro: leave the call out")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphPart:
        """What `to`, `half`, `cuda` and their like come down to; refused where tensors would not stay as they are."""
        try:
            moved = fn(torch.zeros(1, 2, 2, 2))
            stays = moved.device == self.device and moved.dtype == self.dtype and moved.is_contiguous()
        except (AssertionError, NotImplementedError, RuntimeError):  # no such device here
            stays = False
        if not stays:
            raise PcrExportError(
                f"the exported {self.title} takes float32 on the CPU: leave .to() out; {self.to_a_gpu}"
            )
        return super()._apply(fn, recurse)

    def set_attention_slice(self, size: Any) -> None:
        """diffusers passes over parts that lack this."""
        if size is not None:
            raise PcrExportError(f"the exported {self.title} has no attention slicing: leave the call out")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, _op: Any = None) -> None:
        """diffusers passes over parts that lack this."""
        if valid:
            raise PcrExportError(f"the exported {self.title} has no attention of xformers: leave the call out")


def refuse_arguments(title: str, arguments: Mapping[str, Any]) -> None:
    """Raise PcrExportError that names the first argument which is given, though the part called `title` has no input for it."""
    for name, value in arguments.items():
        empty = value is None or value is False or (isinstance(value, dict | list | tuple) and not value)
        if not empty:
            raise PcrExportError(f"the exported {title} has no input for {name}: {_advice(name)}")


def check_inputs(title: str, ports: Mapping[str, Axes], tensors: Mapping[str, Tensor]) -> None:
    """Hold what a part is called with against the inputs of its graph.

    Args:
        title: of the part, in words.
        ports: the axes of each input.
        tensors: what it is to be fed.

    Raises:
        PcrExportError: a tensor has no input, an input no tensor, or a size does not fit: which, and what to do.
    """
    refuse_arguments(title, {name: tensor for name, tensor in tensors.items() if name not in ports})
    sizes: dict[str, int] = {}
    for name, axes in ports.items():
        if name not in tensors:
            raise PcrExportError(f"the exported {title} lacks its input {name}: call it as the pipeline's class does")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes) or not all(map(_fits, shape, axes, [sizes] * len(axes))):
            raise PcrExportError(_misfit(title, name, shape, axes, sizes))
        if tensors[name].requires_grad and torch.is_grad_enabled():
            raise PcrExportError(f"the exported {title} gives no gradients: call it inside torch.no_grad()")


def _fits(size: int, axis: int | str | None, sizes: dict[str, int]) -> bool:
    """Whether an axis can have this size; free axes of one name have one size, which `sizes` keeps."""
    return axis is None or size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)


def _misfit(title: str, name: str, shape: tuple[int, ...], axes: Axes, sizes: Mapping[str, int]) -> str:
    found = [*shape, *[0] * len(axes)]
    wanted = ", ".join(_wanted(axis, size, sizes) for axis, size in zip(axes, found, strict=False))
    advice = "call it as the pipeline's class does"
    if name == "encoder_hidden_states" and len(shape) == len(axes) == 3 and shape[1] != axes[1]:
        advice = f"give prompt_embeds of {axes[1]} tokens, or export again for texts of any length"
    return f"the exported {title} takes {name} as [{wanted}], not {list(shape)}: {advice}"


def _wanted(axis: int | str | None, size: int, sizes: Mapping[str, int]) -> str:
    """In words; a free axis by its name, but by its size where another input tells that and this one differs."""
    if axis is None:
        return "any"
    known = sizes.get(str(axis), size)
    return str(axis if known == size else known)


def _advice(name: str) -> str:
    return next((advice for part, advice in ADVICE.items() if part in name), FLOAT_PIPELINE)
