"""What the blocks of a network are called with along a calibration trajectory: samples of every step, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, noisy_input
from pcr_export.read_files import check_regular
from pcr_export.sites import Layer
from pcr_export.write_files import write_bytes

BLOCK_CLASSES = ("ResnetBlock2D", "BasicTransformerBlock")  # of diffusers; a layer outside of them is a block alone
PLAIN = (type(None), bool, int, float, str)
SHARED = "="  # in front of the name of a tensor that all samples share
BUDGET_BYTES = 2**35  # of the recorded inputs, on disk


def find_blocks(network: nn.Module, layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Module path of every block that holds quantized layers -> those layers; blocks and layers in the order of `layers`."""
    paths = [name for name, module in network.named_modules() if type(module).__name__ in BLOCK_CLASSES]
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        if layer.site is not None:
            around = [path for path in paths if layer.name.startswith(f"{path}.")]
            blocks.setdefault(min(around, key=len, default=layer.name), []).append(layer.name)
    return blocks


@dataclass(frozen=True)
class Shared:
    """A tensor that is the same for every sample and at every step."""

    value: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """The arguments of a block: tensors [samples, ...], float16 where that holds them, shared tensors, and plain values."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        """Of every tensor's first axis."""
        return next(len(x) for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))

    def rows(self, indices: Tensor | slice) -> BlockCall:
        """The same call with some of the samples; what was recorded as floating point in float32, integers as they are."""

        def pick(value: Any) -> Any:
            if isinstance(value, Shared):
                return value.value
            if not isinstance(value, Tensor):
                return value
            return value[indices].float() if value.is_floating_point() else value[indices]

        return BlockCall(
            args=[pick(value) for value in self.args],
            kwargs={name: pick(value) for name, value in self.kwargs.items()},
        )


class BlockRecorder:
    """Runs the float network on some samples of every call of a trajectory and writes what each block was called with.

    A file per call of the trajectory; one that is there already is kept, so a stopped pass goes on. Tensors are stored in float16
    unless they overflow it.

    Args:
        samples: over all calls of a trajectory; fewer where they would need more than `budget` bytes, at least one a call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        blocks: Sequence[str],
        folder: Path,
        samples: int,
        seed: int,
        budget: int = BUDGET_BYTES,
    ) -> None:
        self._denoiser = denoiser
        self._blocks = blocks
        self._folder = folder
        self._per_call = max(1, samples // len(denoiser.timesteps))
        self._seed = seed
        self._budget = budget
        self._rows_of_one: dict[
            tuple[str, str], int
        ] = {}  # (block, argument) -> its first axis where one sample is run

    @torch.inference_mode()
    def __call__(self, index: int, batches: Sequence[Inputs]) -> None:
        """Record call `index`, whose inputs are `batches`; call 0 comes first."""
        if index == 0:
            self._keep_to_budget(batches)
        path = self._folder / f"call_{index:05d}.safetensors"
        if path.exists():
            return
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        inputs = self._choose(index, batches)
        count = len(inputs[noisy_input(self._denoiser, inputs)])
        for block, arguments in self._arguments(inputs).items():
            plain[block] = {}
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    samples = self._samples(block, name, value, count)
                    shared = "" if samples is not None else SHARED
                    tensors[f"{block}|{shared}{name}"] = _stored(value if samples is None else samples)
                elif isinstance(value, PLAIN) or value == {}:
                    plain[block][name] = value
                else:
                    raise PcrExportError(
                        f"block {block} is called with {name} of type {type(value).__name__}, which can't be kept: use --weights rtn"
                    )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(tensors, {"plain": json.dumps(plain, sort_keys=True)}))

    def _keep_to_budget(self, batches: Sequence[Inputs]) -> None:
        """Lower the samples of a call to what the budget has room for, by the size of one of them."""
        asked, self._per_call = self._per_call, 1
        arguments = self._arguments(self._choose(0, batches))
        tensors = {
            (block, name): x for block, each in arguments.items() for name, x in each.items() if isinstance(x, Tensor)
        }
        self._rows_of_one = {place: len(x) if x.ndim else 0 for place, x in tensors.items()}
        size = sum(_stored(x).nbytes for x in tensors.values())
        self._per_call = max(1, min(asked, self._budget // (size * len(self._denoiser.timesteps))))

    def _samples(self, block: str, name: str, x: Tensor, count: int) -> Tensor | None:
        """The argument with a row for each of `count` samples; None where it has none: all of them share it.

        What has one row however many samples there are is the same for all of them in this call, and may be another in the next.
        """
        rows = self._rows_of_one.get((block, name), 0)
        if rows == 1 and len(x) == 1 < count:
            return x.expand(count, *x.shape[1:])
        return x if rows and len(x) == rows * count and (rows == 1 or count > 1) else None

    def _choose(self, index: int, batches: Sequence[Inputs]) -> Inputs:
        """Rows of all batches, drawn from the seed; what has no batch axis stays."""
        first = noisy_input(self._denoiser, batches[0])
        sizes = [len(batch[first]) for batch in batches]
        generator = torch.Generator().manual_seed(self._seed + index)
        rows = torch.randperm(sum(sizes), generator=generator)[: self._per_call].sort().values

        def pick(name: str) -> Tensor:
            parts = [batch[name] for batch in batches]
            batched = all(x.ndim and len(x) == size for x, size in zip(parts, sizes, strict=True))
            return torch.cat(parts)[rows] if batched else parts[0]

        return {name: pick(name) for name in batches[0]}

    def _arguments(self, inputs: Inputs) -> dict[str, dict[str, Any]]:
        """Block -> its arguments by name, or by number where they were given by position."""
        found: dict[str, dict[str, Any]] = {}

        def keep(block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
            found[block] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}

        with ExitStack() as hooks:
            for block in self._blocks:
                module = self._denoiser.network.get_submodule(block)
                hooks.enter_context(
                    module.register_forward_pre_hook(
                        lambda _module, args, kwargs, block=block: keep(block, args, kwargs), with_kwargs=True
                    )
                )
            self._denoiser(inputs)
        return found


def _stored(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.contiguous()
    half = x.half()
    return half.contiguous() if torch.isfinite(half).all() else x.contiguous()


def read_block_call(folder: Path, block: str) -> BlockCall:
    """All samples of a block. Raises PcrExportError where a file is damaged."""
    tensors: dict[str, list[Tensor]] = {}
    plain: dict[str, Any] = {}
    for path in sorted(folder.glob("call_*.safetensors")):
        check_regular(path, advice="delete it and run again")
        try:
            with safe_open(path, "pt") as file:
                plain = json.loads((file.metadata() or {})["plain"])[block]
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name.startswith(f"{block}|"):
                        tensors.setdefault(name.removeprefix(f"{block}|"), []).append(file.get_tensor(name))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PcrExportError(f"{path} is damaged ({error}): delete it and run again") from error
    named = {**plain, **_joined(block, tensors)}
    positions = sorted((name for name in named if name.isdigit()), key=int)
    return BlockCall(
        args=[named[name] for name in positions],
        kwargs={name: value for name, value in named.items() if not name.isdigit()},
    )


def _joined(block: str, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """The samples of all calls behind one another, by argument. Raises PcrExportError where they do not belong together."""
    named: dict[str, Any] = {}
    for name, parts in tensors.items():
        if not name.startswith(SHARED):
            named[name] = torch.cat(list(parts))
        elif all(torch.equal(parts[0], part) for part in parts):
            x = parts[0]
            named[name.removeprefix(SHARED)] = Shared(x.float() if x.is_floating_point() else x)
        else:
            raise PcrExportError(
                f"block {block} is called with {name.removeprefix(SHARED)}, which has no row for each sample and changes from "
                "step to step: use --weights rtn"
            )
    if len({len(x) for x in named.values() if isinstance(x, Tensor)}) > 1:
        raise PcrExportError(f"block {block} is called with arguments of different batch sizes: use --weights rtn")
    return named
