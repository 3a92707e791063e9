"""What stands between 4-bit and 8-bit weights: images of the reference model by mean bits per weight, and the anatomy of the UNet's error.

    python benchmarks/weight_bits.py --out DIR --json FILE

Every row is an exported artifact with GPTQ's weights: uniform bits, 4 bits with some layers kept at 8 (`--keep`), and a second round of
learning. The anatomy is of the weights alone, activations float, on the float model's trajectories: the root mean square error of
the UNet's unconditional and conditional output, of their difference, and of what guidance makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pcr_export.calibrate.simulate import Simulation
from pcr_export.export_job import Exported
from pcr_export.models.denoiser import Inputs, sample
from pcr_export.progress import silent
from pcr_export.prompts import REFERENCE, prompt_seeds
from pcr_export.qdiffbench.schemes import SCHEMES
from pcr_export.stages import Facts
from pcr_export.study import Study, export_scheme, run_scheme
from pcr_export.study_table import StudyRequest, open_study
from pcr_export.write_files import write_json

BEST = SCHEMES["pcr-last-20-split"]
GPTQ: Mapping[str, Any] = {**BEST, "weights": "gptq"}
ROWS: Mapping[str, Mapping[str, Any]] = {
    "w8": BEST,
    "w6": {**GPTQ, "weight_bits": 6},
    "w5": {**GPTQ, "weight_bits": 5},
    "w4-keep-6bit": {**GPTQ, "weight_bits": 4, "keep": "6bit"},
    "w4-keep-5bit": {**GPTQ, "weight_bits": 4, "keep": "5bit"},
    "w4-keep-4.5bit": {**GPTQ, "weight_bits": 4, "keep": "4.5bit"},
    "w4": {**GPTQ, "weight_bits": 4},
    "w4-two-rounds": {**GPTQ, "weight_bits": 4, "weight_rounds": 2},
    "w4-adaround": {**GPTQ, "weight_bits": 4, "weights": "adaround"},
    "w4-rtn": {**BEST, "weight_bits": 4},
}
ANATOMY_PROMPTS = 16
PSNR_OF_ANOTHER_PICTURE = 30.0  # dB, and below
SHOWN = (
    "mean_weight_bits",
    "fid_to_fp32",
    "psnr_db",
    "other_pictures",
    "unconditional",
    "conditional",
    "difference",
    "guided",
    "between_steps",
)


def mean_weight_bits(exported: Exported, bits: int) -> float:
    """Over the weights of all quantized layers."""
    total = weighted = 0
    for layer in exported.layers:
        if layer.site is not None:
            count = exported.denoiser.network.get_submodule(layer.name).get_parameter("weight").numel()
            total += count
            weighted += count * exported.weights["layers"].get(layer.name, {"bits": bits})["bits"]
    return weighted / total


def layer_errors(exported: Exported) -> Facts:
    """Mean over the layers of the error of their output, learned and to nearest, relative to its energy; None where none was learned."""
    layers = exported.weights["layers"].values()
    return {
        name: sum(each[name] for each in layers) / len(layers) if layers else None for name in ("error", "rtn_error")
    }


def other_pictures(study: Study, folder: str) -> int:
    """Images that are not FP32's with an error but another picture."""
    per_image = json.loads((study.folder / "images" / study.domains[0].name / folder / "per_image.json").read_text())
    return sum(psnr < PSNR_OF_ANOTHER_PICTURE for psnr in per_image["psnr_db"])


def float_trajectory(study: Study, prompts: Sequence[str]) -> list[tuple[Inputs, Tensor]]:
    """The UNet's inputs and outputs at every step of the float model, unconditional rows first."""
    denoiser, calls = study.model.denoiser(), []

    @torch.inference_mode()
    def call(inputs: Inputs) -> Tensor:
        calls.append((inputs, denoiser(inputs)))
        return calls[-1][1]

    sample(denoiser, call, prompts, prompt_seeds(prompts, 0))
    return calls


def anatomy(exported: Exported, trajectory: Sequence[tuple[Inputs, Tensor]], guidance_scale: float) -> Facts:
    """Root mean square errors of the UNet's output by part, and the correlation of the guided error between neighbouring steps."""
    with Simulation(exported.denoiser, exported.layers, exported.rounding) as simulation:
        errors = torch.stack([simulation.run(inputs) - output for inputs, output in trajectory])
    unconditional, conditional = errors.chunk(2, dim=1)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    parts = {
        "unconditional": unconditional,
        "conditional": conditional,
        "difference": conditional - unconditional,
        "guided": guided,
    }
    near, far = guided[1:], guided[:-1]
    return {
        **{name: float(x.square().mean().sqrt()) for name, x in parts.items()},
        "between_steps": float((near * far).sum() / (near.norm() * far.norm())),
    }


def show(rows: Sequence[Facts]) -> None:
    """A line per row."""
    table = Table("weights", *(name.replace("_", " ") for name in SHOWN))
    for row in rows:
        table.add_row(row["weights"], *(f"{row[name]:.3g}" for name in SHOWN))
    Console().print(table)


def main(
    out: Annotated[Path, typer.Option(help="where exports and images are kept")] = Path("engines"),
    images: Annotated[int, typer.Option(help="of each row, in domain")] = 512,
    only: Annotated[str, typer.Option(help="some of the rows, with commas between")] = ",".join(ROWS),
    json_file: Annotated[Path | None, typer.Option("--json", help="where the rows are kept")] = None,
) -> None:
    """Export and score every row, then show and keep the table."""
    study = open_study(StudyRequest(model=REFERENCE, out=out), {}, silent, Console().print)
    study = replace(study, domains=[replace(study.domains[0], scored=images)])
    trajectory = float_trajectory(study, study.domains[0].prompts[:ANATOMY_PROMPTS])
    rows = []
    for name in only.split(","):
        recipe = replace(study.base, **ROWS[name])
        exported = export_scheme(study, study.folder / "schemes" / f"{name}-{recipe.seed}", recipe, study.calibration)
        (row,) = run_scheme(study, name, recipe)
        figures = {
            each: row[each]
            for each in ("n_images", "fid_to_fp32", "clip_score", "psnr_db", "onnx_bytes", "calibration_seconds")
        }
        bits = {"mean_weight_bits": mean_weight_bits(exported, recipe.weight_bits)}
        bits["other_pictures"] = other_pictures(study, f"{name}-{recipe.seed}-first-{images}")
        parts = anatomy(exported, trajectory, recipe.guidance_scale)
        rows.append({"weights": name, **bits, **figures, **layer_errors(exported), **parts})
        if json_file:
            write_json(json_file, {"threads": study.workers.threads, "rows": rows})
    show(rows)


if __name__ == "__main__":
    typer.run(main)
