"""A denoiser of each kind with its float graph, its inputs and its scales."""

from pathlib import Path

import torch
from class_conditional import class_conditional_denoiser
from min_max import min_max_scales
from small_denoisers import unet_denoiser, unet_inputs

from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

TIMESTEPS = (900.0, 500.0, 100.0)
RELAXED = (10, 8, 8)


def write_float(kind: str, folder: Path) -> None:
    """Export the denoiser of a kind to folder/model.onnx."""
    denoiser = denoiser_of(kind)
    export_float_onnx(denoiser, example_inputs(denoiser), folder / "model.onnx")


def denoiser_of(kind: str) -> Denoiser:
    return class_conditional_denoiser() if kind == "class" else unet_denoiser(kind)


def example_inputs(denoiser: Denoiser, batch: int = 2, size: int = 8) -> Inputs:
    if denoiser.timestep == "timestep":
        return unet_inputs(denoiser, batch, size)
    x = torch.randn(batch, 3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(batch))
    return {"x": x, "t": torch.tensor(500.0), "label": torch.arange(batch) % 5}


class Case:
    """A denoiser, its inputs, and what the graph is made from: a float graph to read, a folder to write to."""

    def __init__(self, kind: str, float_folder: Path, folder: Path) -> None:
        self.denoiser = denoiser_of(kind)
        self.float_path = float_folder / "model.onnx"
        self.folder = folder
        self.scales, self.layers = self.calibrate(None)

    def inputs(self, batch: int = 2, size: int = 8) -> Inputs:
        return example_inputs(self.denoiser, batch, size)

    def calibrate(self, bits: tuple[int, ...] | None) -> tuple[StepScales, list[Layer]]:
        return min_max_scales(self.denoiser, self.inputs(), TIMESTEPS, bits=bits)
