"""An automatic skip list: how much quantizing each layer alone hurts its block's output; the worst layers stay float."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.calibrate.ranges import quantize_dequantize, quantizer_from_range
from pcr_export.calibrate.weights.block import Block, read_block
from pcr_export.calibrate.weights.block_inputs import BlockRecorder, find_blocks
from pcr_export.calibrate.weights.rounding import RoundWeight
from pcr_export.models.denoiser import Denoiser, Inputs, sample
from pcr_export.progress import Track, silent
from pcr_export.sites import Layer
from pcr_export.stages import Key, Stages, key_hash


@dataclass(frozen=True, kw_only=True)
class SensitivitySearch:
    """One search: the network, the calibration prompts it is measured on, and where it keeps what is done.

    A layer's error is the squared error of its block's output, relative to the output's energy, over inputs of all steps of the
    float trajectories, with its weight rounded and its input on an 8-bit grid for each step (min-max).
    """

    denoiser: Denoiser
    layers: Sequence[Layer]
    round_weight: RoundWeight
    conditions: Sequence[Any]
    seeds: Sequence[int]
    samples: int  # UNet inputs, over all steps
    seed: int  # of the samples' choice
    folder: Path
    key: Key
    resume: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def run(self) -> dict[str, float]:
        """Layer -> error, those that are quantized. A stopped search goes on with the next block."""
        errors: dict[str, float] = {}
        stages = Stages(self.folder, resume=self.resume, log=self.log)
        with self.track("sensitivity of each layer", len(self._blocks)) as advance:
            for index, name in enumerate(self._blocks):
                errors |= stages.run(f"layer_errors_{index:05d}", self.key, [], partial(self._measure, name))
                advance(1)
        shutil.rmtree(self._inputs_folder, ignore_errors=True)
        return errors

    @cached_property
    def _blocks(self) -> Mapping[str, list[str]]:
        return find_blocks(self.denoiser.network, self.layers)

    @property
    def _inputs_folder(self) -> Path:
        return self.folder / f"layer_errors_inputs-{key_hash(self.key)[:16]}"

    @cached_property
    def _recorded(self) -> Path:
        """The inputs of every block along the float trajectories."""
        recorder = BlockRecorder(self.denoiser, list(self._blocks), self._inputs_folder, self.samples, self.seed)
        index = itertools.count()

        def call(inputs: Inputs) -> Tensor:
            recorder(next(index), [inputs])
            advance(1)
            with torch.inference_mode():
                return self.denoiser(inputs)

        with self.track("float trajectories", len(self.denoiser.timesteps)) as advance:
            sample(self.denoiser, call, self.conditions, self.seeds)
        return self._inputs_folder

    def _measure(self, name: str) -> dict[str, float]:
        block = read_block(self.denoiser.network, name, self.layers, self._recorded)
        return layer_errors(block, self.round_weight, len(self.denoiser.timesteps))


@torch.no_grad()
def layer_errors(
    block: Block, round_weight: RoundWeight, num_steps: int, *, weights_only: bool = False
) -> dict[str, float]:
    """Layer -> relative squared error of the block's output with that layer alone quantized.

    Args:
        num_steps: that the block's samples come from, as many of each, in order.
        weights_only: leave the layer's input as it is.
    """
    count = block.call.num_samples // num_steps
    calls = [block.call.rows(slice(step * count, (step + 1) * count)) for step in range(num_steps)]
    exact = [block.run({}, call) for call in calls]
    energy = max(sum(x.double().square().sum().item() for x in exact), 1e-30)
    errors = {}
    for layer in block.layers:
        weight = block.dequantized(layer.name, *round_weight(layer.name, block.weight(layer.name)))
        with nullcontext() if weights_only else _input_on_a_grid(block.layer_module(layer.name), layer.affine):
            outputs = [block.run({layer.name: weight}, call) for call in calls]
        distances = (x - y for x, y in zip(outputs, exact, strict=True))
        errors[layer.name] = sum(x.double().square().sum().item() for x in distances) / energy
    return errors


@contextmanager
def _input_on_a_grid(module: nn.Module, affine: bool) -> Iterator[None]:
    """The module reads its input rounded to the finest 8-bit grid that holds all of it."""

    def quantize(x: Tensor) -> Tensor:
        grid = quantizer_from_range(x.min().item(), x.max().item(), affine=affine)
        return quantize_dequantize(x, grid.scale, grid.zero_point)

    handle = on_input(module, quantize)
    try:
        yield
    finally:
        handle.remove()
