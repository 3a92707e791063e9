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


class Case:
    """A denoiser, its inputs, and what the graph is made from."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.denoiser: Denoiser = class_conditional_denoiser() if kind == "class" else unet_denoiser(kind)
        self.folder = folder
        export_float_onnx(self.denoiser, self.inputs(), self.float_path)
        self.scales, self.layers = self.calibrate(None)

    @property
    def float_path(self) -> Path:
        return self.folder / "float" / "model.onnx"

    def inputs(self, batch: int = 2, size: int = 8) -> Inputs:
        if self.denoiser.timestep == "timestep":
            return unet_inputs(self.denoiser, batch, size)
        x = torch.randn(batch, 3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(batch))
        return {"x": x, "t": torch.tensor(500.0), "label": torch.arange(batch) % 5}

    def calibrate(self, bits: tuple[int, ...] | None) -> tuple[StepScales, list[Layer]]:
        return min_max_scales(self.denoiser, self.inputs(), TIMESTEPS, bits=bits)
