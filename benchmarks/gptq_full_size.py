"""GPTQ at full size: seconds and memory of each kind of block of SDXL's UNet, with random weights and synthetic inputs.

    python benchmarks/gptq_full_size.py --json FILE
    python benchmarks/gptq_full_size.py --model sd15 --samples 4 --json FILE

Blocks of one class with equal shapes cost the same, so one of each kind is measured, in a process of its own: the Hessians of
its layers, whose time grows with the samples, and the rounding, whose time does not. The last lines add up what the whole UNet would
take: that sum is arithmetic, not a measurement.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from phase_memory import measure_phase
from random_unets import CONFIGURATIONS
from rich.console import Console
from rich.table import Table
from sdxl_full_size import GIB, PIXELS, denoiser_of, example_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.weights.block import Block
from pcr_export.calibrate.weights.block_inputs import BlockCall, find_blocks
from pcr_export.recipe import SKIPPED_BY_DEFAULT
from pcr_export.sites import Layer
from pcr_export.write_files import write_json

LATENT_FACTOR = 8  # pixels of a latent's side
ROUNDED_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Blocks that cost the same."""

    block: str  # the first of them
    count: int
    layers: tuple[Layer, ...]  # of the first
    args: tuple[Any, ...]  # shapes of tensors without the batch, and plain values
    kwargs: dict[str, Any]


def find_kinds(model: str) -> list[Kind]:
    """Every kind of block, found in one call of a network without numbers at the model's own size."""
    blocks: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
    with FakeTensorMode():
        network = UNet2DConditionModel(**CONFIGURATIONS[model]).eval()
        inputs = example_of(network.config)
        side = PIXELS[model] // LATENT_FACTOR
        inputs["sample"] = torch.randn(len(inputs["sample"]), network.config.in_channels, side, side)
        layers = find_layers(denoiser_of(network), inputs, SKIPPED_BY_DEFAULT)
        by_block = find_blocks(network, layers)

        def keep(block: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = (tuple(map(_shape, args)), {name: _shape(value) for name, value in kwargs.items()})
            weights = tuple((name, tuple(x.shape)) for name, x in module.named_parameters())
            blocks[(type(module).__name__, weights, repr(call))].append((block, call))

        for block in by_block:
            network.get_submodule(block).register_forward_pre_hook(
                lambda module, args, kwargs, block=block: keep(block, module, args, kwargs), with_kwargs=True
            )
        denoiser_of(network)(inputs)
    found = []
    for alike in blocks.values():
        block, (args, kwargs) = alike[0]
        own = tuple(layer for layer in layers if layer.name in by_block[block])
        found.append(Kind(block=block, count=len(alike), layers=own, args=args, kwargs=kwargs))
    return found


def _shape(value: Any) -> Any:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else value


def round_block(model: str, kind: Kind, samples: int, seed: int) -> dict[str, float]:
    """Round one block of random weights on random inputs: its largest fan-in, seconds of the Hessians and of the rounding."""
    with torch.device("meta"):
        module = UNet2DConditionModel(**CONFIGURATIONS[model]).get_submodule(kind.block)
    module = module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(generator=generator).mul_(fan_in**-0.5)

    def draw(value: Any) -> Any:
        return torch.randn(samples, *value, generator=generator) if isinstance(value, tuple) else value

    call = BlockCall(args=[draw(value) for value in kind.args], kwargs={k: draw(v) for k, v in kind.kwargs.items()})
    block = Block(kind.block, module, kind.layers, call)
    start = time.perf_counter()
    fan_in = max(len(hessian) for hessian in block.hessians.values())
    middle = time.perf_counter()
    block.gptq({layer.name: ROUNDED_BITS for layer in kind.layers})
    return {
        "fan_in": fan_in,
        "hessian_seconds": round(middle - start, 2),
        "rounding_seconds": round(time.perf_counter() - middle, 2),
    }


def show(facts: dict[str, Any]) -> None:
    """The table, and the sums for the whole UNet."""
    table = Table(title=f"{facts['model']}: GPTQ of each kind of block, {facts['samples']} samples", width=120)
    for name in (
        "first block",
        "blocks",
        "layers",
        "largest fan-in",
        "Hessians, s a sample",
        "rounding, s",
        "peak GiB",
    ):
        table.add_column(name, justify="left" if name == "first block" else "right")
    for row in facts["rows"]:
        per_sample = row["hessian_seconds"] / facts["samples"]
        numbers = (f"{per_sample:.2f}", f"{row['rounding_seconds']:.1f}", f"{row['peak_anonymous_bytes'] / GIB:.2f}")
        table.add_row(row["block"], str(row["count"]), str(row["layers"]), str(row["fan_in"]), *numbers)
    console = Console()
    console.print(table)
    console.print(
        f"whole UNet: {facts['hours_of_rounding']:.2f} h of rounding + {facts['hours_per_64_samples']:.2f} h of Hessians for each "
        f"64 samples; {facts['threads']} threads"
    )


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(CONFIGURATIONS)}")] = "sdxl",
    samples: Annotated[int, typer.Option(help="synthetic inputs of each block")] = 2,
    seed: Annotated[int, typer.Option(help="of weights and inputs")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the rows are kept")] = None,
) -> None:
    """Measure every kind of block, then show and keep the table."""
    rows: list[dict[str, Any]] = []
    for kind in find_kinds(model):
        result, phase = measure_phase(kind.block, round_block, model, kind, samples, seed)
        rows.append({"block": kind.block, "count": kind.count, "layers": len(kind.layers), **result, **asdict(phase)})
        Console().print(f"{kind.block}: {rows[-1]['seconds']} s")
        facts = {
            "model": model,
            "samples": samples,
            "threads": torch.get_num_threads(),
            "bits": ROUNDED_BITS,
            **sums(rows, samples),
        }
        if json_file:
            write_json(json_file, facts)
    show(facts)


def sums(rows: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """The rows, and what they come to for all blocks that they stand for."""
    per_sample = sum(row["count"] * row["hessian_seconds"] for row in rows) / samples
    return {
        "rows": rows,
        "hours_of_rounding": sum(row["count"] * row["rounding_seconds"] for row in rows) / 3600,
        "hours_per_64_samples": 64 * per_sample / 3600,
        "peak_anonymous_bytes": max(row["peak_anonymous_bytes"] for row in rows),
    }


if __name__ == "__main__":
    typer.run(main)
