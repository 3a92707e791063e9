"""What a Denoiser must keep to, tried before anything long begins: a walk that is sent stand-in outputs, and its network's one call."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, Walk
from pcr_export.models.walk_timesteps import check_walked

EXAMPLE_CONDITIONS = 2  # of the call that the network is traced with: a batch that may vary is larger than 1
INTEGERS = (torch.int64, torch.int32, torch.bool)


def check_network(network: nn.Module) -> None:
    """Raise PcrExportError for a network in train mode, or one that is not float32."""
    training = [name or "it" for name, module in network.named_modules() if module.training]
    if training:
        raise PcrExportError(
            f"the network is in train mode ({training[0]} and {len(training) - 1} more modules), which drops out and moves "
            "statistics: call network.eval() first"
        )
    for name, weight in network.named_parameters():
        if weight.is_meta:
            raise PcrExportError(f"the network's {name} is on the meta device: load its weights first")
        if weight.dtype != torch.float32:
            raise PcrExportError(f"the network's {name} is {_dtype(weight)}: call network.float() first")


def check_timesteps(denoiser: Denoiser, num_steps: int | None = None) -> None:
    """Raise PcrExportError for timesteps that no table can have. `num_steps`: those of the recipe; None: not compared."""
    timesteps = denoiser.timesteps
    if not timesteps or not all(math.isfinite(each) for each in timesteps):
        raise PcrExportError(f"a denoiser's timesteps are finite numbers, one for each call of its walk: {timesteps}")
    distinct = list(dict.fromkeys(timesteps))
    if num_steps is not None and num_steps not in (len(timesteps), len(distinct)):
        raise PcrExportError(
            f"the recipe has num_inference_steps={num_steps}, the denoiser {len(timesteps)} timesteps: give the same number"
        )
    for one, following in pairwise(sorted(distinct)):
        if np.float32(one) == np.float32(following):
            raise PcrExportError(f"the timesteps {one} and {following} are one number in float32: scale the time up")
    first, last = timesteps[0], timesteps[-1]
    if first < last:
        raise PcrExportError(
            f"the timesteps ascend, from {first:g} to {last:g}, and step 0 is the noisiest: yield {last:g} - t from the walk, and let "
            f"the denoiser's call give the network {last:g} minus that"
        )


def try_inputs(denoiser: Denoiser, conditions: Sequence[Any], seeds: Sequence[int]) -> Inputs:
    """The inputs of the walk's first call for the first condition, twice. The network is not called.

    Raises PcrExportError where the walk can't be started, or yields what is not as the denoiser says.
    """
    if not len(conditions) or len(seeds) != len(conditions):
        raise PcrExportError(f"give conditions and a seed for each: got {len(conditions)} and {len(seeds)} seeds")
    first: tuple[list[Any], list[int]] = ([conditions[0]], [seeds[0]])
    one = _start(denoiser, *first)[1]
    example = _start(denoiser, *(part * EXAMPLE_CONDITIONS for part in first))[1]
    _check_axes(denoiser, one, example)
    return example


def check_output(denoiser: Denoiser, example: Inputs, output: Tensor) -> None:
    """Raise PcrExportError for an output of a call on `example` that is not as the denoiser says."""
    if output.dtype != torch.float32:
        raise PcrExportError(f"the network's output is {_dtype(output)}: return float32")
    names = next(iter(denoiser.dynamic_axes.values())) if denoiser.output_axes is None else denoiser.output_axes
    sizes = _sizes(denoiser, example)
    for axis, name in names.items():
        if axis >= output.ndim or output.shape[axis] != sizes.get(name, output.shape[axis]):
            whose = "of the first input" if denoiser.output_axes is None else "in output_axes"
            raise PcrExportError(
                f"the network's output has shape {list(output.shape)}, and axis {axis} {whose} is {name}, {sizes.get(name)} here: "
                "give output_axes as the output has them"
            )


@torch.inference_mode()
def try_walk(denoiser: Denoiser, conditions: Sequence[Any], seeds: Sequence[int], shape: Sequence[int]) -> str:
    """Walk the first condition to the end with stand-ins of `shape` for the network's outputs; sha256 of all that was yielded.

    Raises PcrExportError where the calls are not at the denoiser's timesteps, the walk is not deterministic, or it changes what it
    is sent.
    """
    first: tuple[list[Any], list[int]] = ([conditions[0]] * EXAMPLE_CONDITIONS, [seeds[0]] * EXAMPLE_CONDITIONS)
    (walk, inputs), (again, same) = _start(denoiser, *first), _start(denoiser, *first)
    generator = torch.Generator().manual_seed(0)
    digest, walked = hashlib.sha256(), list[float]()
    while True:
        _check_inputs(denoiser, inputs)
        _check_repeated(inputs, same, len(walked))
        _count(digest, inputs)
        walked.append(inputs[denoiser.timestep].item())
        if len(walked) > 2 * len(denoiser.timesteps):
            break
        output = torch.randn(tuple(shape), generator=generator)
        sent = output.clone()
        ended, result = _send(walk, sent)
        if not torch.equal(sent, output):
            raise PcrExportError("the walk changes the network's output in place: let it compute a new tensor")
        if ended:
            _check_latents(result)
            break
        inputs, same = result, _send(again, output)[1]
    check_walked(walked, denoiser.timesteps)
    return digest.hexdigest()


def hold_to_timesteps(denoiser: Denoiser) -> Denoiser:
    """The denoiser with a walk that raises PcrExportError as soon as a call is not at its timestep."""
    return replace(denoiser, walk=partial(_held_walk, denoiser))


def _held_walk(denoiser: Denoiser, conditions: Sequence[Any], seeds: Sequence[int]) -> Walk:
    walk = denoiser.walk(conditions, seeds)
    inputs = next(walk)
    walked: list[float] = []
    while True:
        walked.append(inputs[denoiser.timestep].item())
        check_walked(walked, denoiser.timesteps[: len(walked)])
        output = yield inputs
        try:
            inputs = walk.send(output)
        except StopIteration as stop:
            check_walked(walked, denoiser.timesteps)
            latents: Tensor = stop.value
            return latents


def _start(denoiser: Denoiser, conditions: list[Any], seeds: list[int]) -> tuple[Walk, Inputs]:
    with told("the walk"):
        walk = denoiser.walk(conditions, seeds)
        inputs = next(walk, None) if isinstance(walk, Generator) else None
    if inputs is None:
        raise PcrExportError("the walk yields nothing: it is a generator function that yields the network's inputs")
    _check_inputs(denoiser, inputs)
    return walk, inputs


def _send(walk: Walk, output: Tensor) -> tuple[bool, Any]:
    """(whether the walk ended, what it returned or yielded)."""
    with told("the walk"):
        try:
            return False, walk.send(output)
        except StopIteration as stop:
            return True, stop.value


@contextmanager
def told(what: str) -> Iterator[None]:
    """Code of the denoiser's own, of which any error becomes one line: PcrExportError."""
    try:
        yield
    except (PcrExportError, MemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise PcrExportError(f"{what} fails with {type(error).__name__}: {reason}") from error


def _check_inputs(denoiser: Denoiser, inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise PcrExportError(
            f"the walk yields {type(inputs).__name__}: yield the network's inputs by name, a dict of tensors"
        )
    known, given = list(denoiser.dynamic_axes), list(inputs)
    if set(known) != set(given):
        raise PcrExportError(f"the walk yields inputs {given}, dynamic_axes has {known}: name the same ones in both")
    if denoiser.timestep not in inputs:
        raise PcrExportError(
            f"timestep={denoiser.timestep!r} is none of the inputs {given}: give the name of the one that is"
        )
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise PcrExportError(f"input {name} is of type {type(x).__name__}: yield a tensor")
        if name == denoiser.timestep and (x.ndim or x.dtype != torch.float32):
            raise PcrExportError(
                f"the timestep {name} is {_dtype(x)} of shape {list(x.shape)}: yield a float32 of rank 0, such as "
                "torch.tensor(500.0), and let the denoiser's call make of it what the network takes"
            )
        if x.dtype not in (torch.float32, *INTEGERS):
            raise PcrExportError(f"input {name} is {_dtype(x)}: yield float32, or an integer type where it counts")


def _check_axes(denoiser: Denoiser, one: Inputs, example: Inputs) -> None:
    """Every axis that changes with the batch has a name, and every name one size."""
    for name, axes in denoiser.dynamic_axes.items():
        small, large = one[name].shape, example[name].shape
        for axis in axes:
            if not 0 <= axis < len(large):
                raise PcrExportError(
                    f"dynamic_axes has axis {axis} of {name}, whose shape is {list(large)}: count from 0"
                )
        for axis, (size, other) in enumerate(zip(small, large, strict=False)):
            if size != other and axis not in axes:
                raise PcrExportError(
                    f"axis {axis} of input {name} changes with the batch ({size} for one condition, {other} for two), and "
                    f"dynamic_axes has no name for it: write {name!r}: {{{axis}: 'batch'}}"
                )
    _sizes(denoiser, example)


def _sizes(denoiser: Denoiser, example: Inputs) -> dict[str, int]:
    """The size of every named axis. Raises PcrExportError where two of one name differ."""
    sizes: dict[str, int] = {}
    for name, axes in denoiser.dynamic_axes.items():
        for axis, label in axes.items():
            size = example[name].shape[axis]
            if sizes.setdefault(label, size) != size:
                raise PcrExportError(
                    f"dynamic_axes calls axis {axis} of {name} {label}, which is {size} there and {sizes[label]} elsewhere: "
                    "give it another name"
                )
    return sizes


def _check_repeated(inputs: Inputs, same: Inputs, index: int) -> None:
    for name, x in inputs.items():
        if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(same[name])):
            raise PcrExportError(
                f"the walk is not deterministic: input {name} of call {index} differs between two walks with the same seeds: draw "
                "noise from torch.Generator().manual_seed(seed)"
            )


def _check_latents(result: Any) -> None:
    if not isinstance(result, Tensor) or not result.ndim or len(result) != EXAMPLE_CONDITIONS:
        found = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise PcrExportError(
            f"the walk returns {found} for {EXAMPLE_CONDITIONS} conditions: return the final latents, one for each"
        )


def _count(digest: Any, inputs: Inputs) -> None:
    for name, x in inputs.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
