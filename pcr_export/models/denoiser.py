"""Denoiser: the door through which every model enters, diffusers' own and one of your own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Walk = Generator[Inputs, Tensor, Tensor]  # yields the network's inputs, is sent its output, returns the final latents


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network that is called once per denoising step, with how to call it and how to walk its sampling trajectory.

    `walk(conditions, seeds)` is a generator function: for a batch of conditions (prompts, class labels, ...) and one seed
    per condition it yields the network's named inputs, is sent the network's output (which it must not change in place)
    and returns the final latents [batch, ...]. It is deterministic: sent the same outputs it yields the same inputs. Every
    walk makes one call per entry of `timesteps`. A Denoiser never calls the network itself inside `walk`, so the same walk
    drives float, simulated and exported networks.
    """

    network: nn.Module  # in eval mode, float32
    call: Callable[[nn.Module, Inputs], Tensor]  # (network, named inputs) -> output
    walk: Callable[[Sequence[Any], Sequence[int]], Walk]
    timesteps: tuple[float, ...]  # of the calls of one walk, in order; a scheduler may call one twice (PNDM)
    dynamic_axes: Mapping[
        str, Mapping[int, str]
    ]  # every input in call order -> {axis: symbolic name}; {} where all is fixed
    timestep: str = "timestep"  # the name of the rank-0 float32 input that tells the step
    output: str = "out_sample"
    output_axes: Mapping[int, str] | None = None  # None: those of the first input
    decode: Callable[[Tensor], Tensor] | None = None  # latents -> images float32 [batch, 3, height, width] in 0..1

    def __call__(self, inputs: Inputs) -> Tensor:
        """The network's output for one step."""
        return self.call(self.network, inputs)


def noisy_input(denoiser: Denoiser, inputs: Inputs) -> str:
    """The name of the input that is denoised: the first of floating point that is not the timestep."""
    names = [name for name in denoiser.dynamic_axes if name != denoiser.timestep and inputs[name].is_floating_point()]
    return names[0] if names else next(iter(denoiser.dynamic_axes))


def noise_levels(timesteps: Sequence[float]) -> list[float]:
    """The steps of a walk, noisiest first, whatever the order that it calls them in (DPM2 rounds some past the one before).

    A repeated timestep is one step. A step is a row of the table of scales, and what `relax` counts.
    """
    return sorted(set(timesteps), reverse=True)


@torch.inference_mode()
def sample(
    denoiser: Denoiser, call: Callable[[Inputs], Tensor], conditions: Sequence[Any], seeds: Sequence[int]
) -> Tensor:
    """Walk one batch from noise to its final latents with `call` (the float network, its simulation or an engine) as the network."""
    walk = denoiser.walk(conditions, seeds)
    inputs = next(walk)
    while True:
        try:
            inputs = walk.send(call(inputs))
        except StopIteration as stop:
            return stop.value
