"""Learn the rounding of a denoiser's weights, block by block, from what the blocks see while every step runs quantized."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.sensitive_layers import layer_errors
from pcr_export.calibrate.state import CalibrationState
from pcr_export.calibrate.weights.adaround import AdaRoundSettings
from pcr_export.calibrate.weights.block import Block, read_block
from pcr_export.calibrate.weights.block_inputs import BlockRecorder, find_blocks
from pcr_export.calibrate.weights.keep import choose_kept
from pcr_export.calibrate.weights.rounding import (
    NEAREST_8,
    LearnedRounding,
    NearestRounding,
    RoundWeight,
    write_rounded,
)
from pcr_export.models.denoiser import Denoiser
from pcr_export.progress import Advance, Track, silent
from pcr_export.recipe import Recipe
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages, key_hash


def learns_weights(recipe: Recipe) -> bool:
    """Whether `WeightLearning` has anything to do for a recipe; otherwise weights are rounded to nearest as they are needed."""
    return recipe.weights != "rtn" or recipe.keep != "none"


def weights_folder(folder: Path) -> Path:
    """Where an exported folder keeps learned weights."""
    return folder / ".stages" / "weights"


def rounding_of(recipe: Recipe, folder: Path) -> RoundWeight:
    """What gave the layers of an exported folder their integer weights."""
    if not learns_weights(recipe):
        return NearestRounding(recipe.weight_bits)
    return LearnedRounding(weights_folder(folder) / f"round_{recipe.weight_rounds - 1}")


@dataclass(frozen=True, kw_only=True)
class WeightLearning:
    """One learning: the network, the calibration set, and where it keeps what is done.

    The blocks' inputs come from one pass of the progressive calibration, whose latents the quantized network makes (with 8-bit
    weights at first, with those of the round before in every further one); each block is given the inputs that the float network has
    there, and learns to give the float network's output. Blocks know nothing of each other, so a stopped run goes on with the next.
    """

    denoiser: Denoiser
    layers: Sequence[Layer]
    conditions: Sequence[Any]
    seeds: Sequence[int]
    recipe: Recipe
    folder: Path
    key: Key
    resume: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def run(self) -> tuple[RoundWeight, Facts]:
        """The learned rounding, and {"seconds", "layers"}.

        "layers" has {bits, error, rtn_error} of each, an error being the squared error of its output relative to its energy, and
        with --keep its sensitivity: that error of its block's output with the layer alone rounded to nearest.
        """
        rounding: RoundWeight = NEAREST_8
        facts: Facts = {}
        seconds = 0.0
        for index in range(self.recipe.weight_rounds):
            a_round = _Round(self, self.folder / f"round_{index}", rounding)
            facts = a_round.run()
            seconds += facts["seconds"]
            rounding = LearnedRounding(a_round.folder)
        return rounding, {**facts, "seconds": round(seconds, 1)}

    @functools.cached_property
    def blocks(self) -> dict[str, list[str]]:
        """Blocks and their layers."""
        return find_blocks(self.denoiser.network, self.layers)


class _Round:
    """One pass over the trajectory, and every block learned from it."""

    def __init__(self, learning: WeightLearning, folder: Path, rounding: RoundWeight) -> None:
        self.folder = folder
        self._learning = learning
        self._rounding = rounding  # of the network that makes the latents
        self._stages = Stages(folder, resume=learning.resume, log=learning.log)
        self._recorded = False
        self._inputs = folder / f"inputs-{key_hash(learning.key)[:16]}"

    def run(self) -> Facts:
        learning, recipe = self._learning, self._learning.recipe
        sensitivities = self._sensitivities() if recipe.keep != "none" else {}
        kept = choose_kept(sensitivities, recipe.keep, recipe.weight_bits) if sensitivities else {}
        steps = recipe.adaround_iterations if recipe.weights == "adaround" else 1
        layer_facts: Facts = {}
        seconds = 0.0
        with learning.track(f"learning weights ({recipe.weights})", steps * len(learning.blocks)) as advance:
            for index, (name, layers) in enumerate(learning.blocks.items()):
                path = self.folder / f"block_{index:05d}.safetensors"
                counted = _Counter(advance)
                bits = {layer: kept.get(layer, recipe.weight_bits) for layer in layers}
                learn = functools.partial(self._learn, name, bits, path, index, counted)
                facts = self._stages.run(f"block_{index:05d}", self._key(bits), [path], learn)
                for layer, each in facts["layers"].items():
                    layer_facts[layer] = {**each, "sensitivity": sensitivities.get(layer, {}).get("error")}
                seconds += facts["seconds"]
                counted.finish(steps)
        shutil.rmtree(self._inputs, ignore_errors=True)
        return {"layers": layer_facts, "seconds": seconds}

    def _key(self, bits: Mapping[str, int]) -> Key:
        return {**self._learning.key, "bits": " ".join(f"{layer}={each}" for layer, each in bits.items())}

    def _learn(self, name: str, bits: Mapping[str, int], path: Path, index: int, advance: Advance) -> Facts:
        recipe, start = self._learning.recipe, time.monotonic()
        block = self._open(name)
        nearest = {layer: NearestRounding(bits[layer])(layer, block.weight(layer)) for layer in bits}
        if recipe.weights == "adaround":
            settings = AdaRoundSettings(iterations=recipe.adaround_iterations)
            rounded = block.adaround(bits, settings, seed=recipe.seed + index, advance=advance)
        elif recipe.weights == "gptq":
            rounded = block.gptq(bits)
        else:
            rounded = nearest
        write_rounded(rounded, path)
        layers = {
            layer: {
                "bits": bits[layer],
                "error": block.relative_error(layer, *rounded[layer]),
                "rtn_error": block.relative_error(layer, *nearest[layer]),
            }
            for layer in bits
        }
        return {"layers": layers, "seconds": time.monotonic() - start}

    def _open(self, name: str) -> Block:
        learning = self._learning
        if not self._recorded:
            self._record()
            self._recorded = True
        return read_block(learning.denoiser.network, name, learning.layers, self._inputs)

    def _sensitivities(self) -> Facts:
        """Layer -> {error, weights}, as `choose_kept` takes them."""
        learning = self._learning
        facts: Facts = {}
        with learning.track("sensitivity of each layer", len(learning.blocks)) as advance:
            for index, name in enumerate(learning.blocks):
                measure = functools.partial(self._measure, name)
                facts |= self._stages.run(f"sensitivity_{index:05d}", learning.key, [], measure)
                advance(1)
        return facts

    def _measure(self, name: str) -> Facts:
        block, learning = self._open(name), self._learning
        rounding = NearestRounding(learning.recipe.weight_bits)
        errors = layer_errors(block, rounding, len(learning.denoiser.timesteps), weights_only=True)
        return {layer: {"error": error, "weights": block.weight(layer).size} for layer, error in errors.items()}

    def _record(self) -> None:
        """Walk the trajectory once and keep samples of every block's inputs."""
        learning, recipe = self._learning, self._learning.recipe
        for other in self.folder.glob("inputs-*"):
            if other != self._inputs:
                shutil.rmtree(other)

        def walk() -> Facts:
            samples = recipe.weight_samples
            recorder = BlockRecorder(learning.denoiser, list(learning.blocks), self._inputs, samples, recipe.seed)
            state = CalibrationState(self._inputs / "calls", key_hash(learning.key))
            calibrate(
                learning.denoiser,
                learning.layers,
                learning.conditions,
                learning.seeds,
                replace(recipe, scheme="progressive", observed_steps="all", reduce="pooled"),
                round_weight=self._rounding,
                state=state,
                on_call=recorder,
                track=learning.track,
            )
            state.clear()
            return {}

        self._stages.run("inputs", learning.key, [self._inputs], walk)


class _Counter:
    """Counts what a block advanced, so that a block that was done before is counted as well."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._count = 0

    def __call__(self, count: int) -> None:
        self._count += count
        self._advance(count)

    def finish(self, total: int) -> None:
        self._advance(total - self._count)
