"""What makes images: the float model, an artifact's UNet, a whole exported folder, or the simulation; plain data until opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.learn_weights import rounding_of
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.deploy.run import load_exported_model
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import Denoiser, Inputs, sample
from pcr_export.models.load import load_model
from pcr_export.models.lora_file import LoraFile
from pcr_export.progress import Track, silent
from pcr_export.qdiffbench.images import missing_chunks, to_uint8, write_chunk
from pcr_export.qdiffbench.workers import ONE_PROCESS, Part, Workers, compute_parts, torch_threads
from pcr_export.recipe import Recipe, read_recipe
from pcr_export.step_scales import read_step_scales

Paint = Callable[[Sequence[str], Sequence[int]], np.ndarray]  # prompts, seeds -> uint8 [batch, height, width, 3]


class Painter(Protocol):
    """Says how images are made: a Task."""

    def open(self, threads: int) -> AbstractContextManager[Paint]:
        """The function that paints a batch, with `threads` threads. Raises PcrExportError where the model can't be loaded."""


def paint_images(
    painter: Painter,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    chunk: int,
    workers: Workers = ONE_PROCESS,
    description: str,
    track: Track = silent,
) -> None:
    """Image i of prompt i and seed i, as `generate_images` does it, by `workers`; this process alone writes files.

    Raises PcrExportError as `compute_parts` does; images that are finished stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = missing_chunks(folder, len(prompts), chunk)
    parts = [Part(indices=each, args=([prompts[i] for i in each], [seeds[i] for i in each])) for each in chunks]
    with track(description, len(prompts)) as advance:
        advance(len(prompts) - sum(map(len, chunks)))
        if parts:
            for indices, pixels in compute_parts(painter, parts, workers):
                write_chunk(pixels, folder, indices)
                advance(len(indices))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model and how it is sampled, as an export's recipe has it."""

    model: str
    num_inference_steps: int
    guidance_scale: float
    height: int  # pixels
    width: int  # pixels
    guidance_rescale: float = 0.0
    scheduler: str | None = None  # None: the model's own
    lora: tuple[LoraFile, ...] = ()  # fused into it

    def load(self) -> Denoiser:
        """The float model as a Denoiser."""
        names = ("num_inference_steps", "guidance_scale", "height", "width", "guidance_rescale")
        entry = replace(resolve(self.model), lora=self.lora, **{name: getattr(self, name) for name in names})
        entry = entry if self.scheduler is None else replace(entry, scheduler=self.scheduler)
        return load_model(entry).denoiser()


def settings_of(recipe: Recipe) -> ModelSettings:
    """The model of a recipe and how it is sampled."""
    names = ("model", "num_inference_steps", "guidance_scale", "height", "width", "guidance_rescale", "scheduler")
    return ModelSettings(**{name: getattr(recipe, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class FloatPainter:
    """The FP32 model."""

    settings: ModelSettings

    @contextmanager
    def open(self, threads: int) -> Iterator[Paint]:
        """As Painter says."""
        with torch_threads(threads):
            denoiser = self.settings.load()
            yield paint_with(denoiser, denoiser)


@dataclass(frozen=True, kw_only=True)
class UnetPainter:
    """The float model with an ONNX graph in the place of its UNet."""

    settings: ModelSettings
    onnx_path: Path

    @contextmanager
    def open(self, threads: int) -> Iterator[Paint]:
        """As Painter says."""
        with torch_threads(threads), OnnxRuntimeEngine(self.onnx_path, threads=threads) as engine:
            yield paint_with(self.settings.load(), engine_call(engine))


@dataclass(frozen=True, kw_only=True)
class FolderPainter:
    """An exported folder alone: nothing of the float model is read."""

    folder: Path

    @contextmanager
    def open(self, threads: int) -> Iterator[Paint]:
        """As Painter says."""
        with torch_threads(threads):
            denoiser = load_exported_model(self.folder, threads).denoiser()
            yield paint_with(denoiser, denoiser)


@dataclass(frozen=True, kw_only=True)
class SimulationPainter:
    """The float model computing with the arithmetic of the quantized graph of an exported folder."""

    settings: ModelSettings
    folder: Path

    @contextmanager
    def open(self, threads: int) -> Iterator[Paint]:
        """As Painter says."""
        with torch_threads(threads):
            denoiser = self.settings.load()
            recipe = read_recipe(self.folder)
            scales = read_step_scales(self.folder / "step_scales.safetensors")
            if not set(scales.layers) <= {name for name, _ in denoiser.network.named_modules()}:
                raise PcrExportError(
                    f"{self.folder} quantizes a rewritten network, which is simulated only while it is calibrated: "
                    "score the artifact"
                )
            example = next(denoiser.walk(["", ""], [0, 1]))
            quantized = [layer.name for layer in find_layers(denoiser, example, recipe.skip) if layer.site]
            searched = [name for name in quantized if name not in scales.layers]  # those of --skip auto:N
            layers = find_layers(denoiser, example, (*recipe.skip, *searched))
            with Simulation(denoiser, layers, rounding_of(recipe, self.folder)) as simulation:
                yield paint_with(denoiser, simulated_call(simulation, scales, denoiser.timestep))


def engine_call(engine: OnnxRuntimeEngine) -> Callable[[Inputs], torch.Tensor]:
    """An engine as the network of a walk."""
    return lambda inputs: torch.from_numpy(engine.run({name: x.numpy() for name, x in inputs.items()}))


def paint_with(denoiser: Denoiser, call: Callable[[Inputs], torch.Tensor]) -> Paint:
    """Paint with `call` as the denoiser's network. Raises ValueError where the denoiser has no `decode`."""
    if denoiser.decode is None:
        raise ValueError("a denoiser without decode makes no images")
    decode = denoiser.decode

    def paint(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        latents = sample(denoiser, call, prompts, seeds)
        with torch.inference_mode():
            return to_uint8(decode(latents))

    return paint
