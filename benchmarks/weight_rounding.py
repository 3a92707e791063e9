"""What each rounding method does to the outputs of whole blocks of the reference model, on inputs that it did not learn from.

    python benchmarks/weight_rounding.py --json FILE

The inputs are recorded as the export records them. A quarter of them is held out; the error is the squared error of the block's
output on those, relative to its energy, with all weights of the block rounded. Blocks of Linears alone are given to ModelOpt's methods
too, with one scale per output channel as the others; its SVDQuant keeps 32 ranks of every weight in float beside it.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import modelopt.torch.quantization as mtq
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.weights.adaround import AdaRoundSettings
from pcr_export.calibrate.weights.block import Block, Rounded, read_block
from pcr_export.calibrate.weights.block_inputs import BlockCall, BlockRecorder
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.prompts import REFERENCE, choose_prompts, own_prompt_sets, prompt_seeds, read_prompts
from pcr_export.recipe import Recipe
from pcr_export.write_files import write_json

BLOCKS = (
    "down_blocks.1.resnets.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.resnets.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
)
PUBLISHED = AdaRoundSettings(iterations=2000, learning_rate=1e-3, weight_of_regularizer=0.01)
HELD_OUT = 0.25
MODELOPT = {
    "ModelOpt, MSE": "mse",
    "ModelOpt, AWQ": "awq_lite",
    "ModelOpt, GPTQ": "gptq",
    "ModelOpt, SVDQuant": "svdquant",
}
SAMPLES_PER_CALL = 32


def record(folder: Path, prompts: int, samples: int, seed: int) -> dict[str, Block]:
    """Record the blocks' inputs along a progressive trajectory; each block with all of them."""
    model = load_model(resolve(REFERENCE))
    denoiser, entry = model.denoiser(), model.entry
    conditions = choose_prompts(read_prompts(own_prompt_sets(REFERENCE).calibration), prompts, seed)
    seeds = prompt_seeds(conditions, seed)
    recipe = Recipe(
        model=REFERENCE,
        num_inference_steps=int(entry.num_inference_steps or 0),
        guidance_scale=float(entry.guidance_scale or 0),
        height=int(entry.height or 0),
        width=int(entry.width or 0),
        calib_size=prompts,
    )
    layers = find_layers(denoiser, next(denoiser.walk(conditions[:2], seeds[:2])), recipe.skip)
    recorder = BlockRecorder(denoiser, BLOCKS, folder, samples, seed)
    calibrate(denoiser, layers, conditions, seeds, recipe, round_weight=NEAREST_8, on_call=recorder)
    return {name: read_block(denoiser.network, name, layers, folder) for name in BLOCKS}


def split(call: BlockCall, seed: int) -> tuple[BlockCall, BlockCall]:
    """The samples to learn from and those that are held out."""
    order = torch.randperm(call.num_samples, generator=torch.Generator().manual_seed(seed))
    count = int(call.num_samples * (1 - HELD_OUT))
    return call.rows(order[:count]), call.rows(order[count:])


def methods(block: Block, bits: int, seed: int) -> dict[str, Callable[[], Block]]:
    """Name -> the block with every layer rounded."""
    each = {layer.name: bits for layer in block.layers}
    ours: dict[str, Callable[[], Rounded]] = {
        "to nearest": lambda: {layer: quantize_weight(block.weight(layer), bits) for layer in each},
        "AdaRound as published (2 000 iterations)": lambda: block.adaround(each, PUBLISHED, seed=seed, from_gptq=False),
        "GPTQ": lambda: block.gptq(each),
        "AdaRound from GPTQ (500 iterations)": lambda: block.adaround(each, AdaRoundSettings(), seed=seed),
    }
    found = {name: functools.partial(with_weights, block, make) for name, make in ours.items()}
    if any(isinstance(module, nn.Conv2d) for module in block.module.modules()):
        return found
    return found | {name: functools.partial(by_modelopt, block, bits, method) for name, method in MODELOPT.items()}


def with_weights(block: Block, make: Callable[[], Rounded]) -> Block:
    """The block with these weights in its module."""
    module = copy.deepcopy(block.module)
    rounded = replace(block, module=module)
    for layer, integers in make().items():
        rounded.layer_module(layer).get_parameter("weight").data = block.dequantized(layer, *integers)
    return rounded


def by_modelopt(block: Block, bits: int, method: str) -> Block:
    """The block with its module quantized by one of ModelOpt's algorithms: weights only, one scale per output channel."""

    @torch.no_grad()
    def run(module: nn.Module) -> None:
        for start in range(0, block.call.num_samples, SAMPLES_PER_CALL):
            call = block.call.rows(slice(start, start + SAMPLES_PER_CALL))
            module(*call.args, **call.kwargs)

    quantizers = {"*weight_quantizer": {"num_bits": bits, "axis": 0}, "*input_quantizer": {"enable": False}}
    config = {"quant_cfg": quantizers, "algorithm": {"method": method}}
    return replace(block, module=mtq.quantize(copy.deepcopy(block.module), config, run))


def held_out_error(float_block: Block, rounded: Block) -> float:
    """Relative squared error of the block's output on the samples of `float_block`."""
    exact = float_block.outputs({})
    outputs: Tensor = replace(float_block, module=rounded.module).outputs({})
    return ((outputs - exact).square().sum() / exact.square().sum()).item()


def main(
    prompts: Annotated[int, typer.Option(help="calibration prompts")] = 64,
    samples: Annotated[int, typer.Option(help="UNet inputs over all steps")] = 1024,
    bits: Annotated[int, typer.Option(help="of weights")] = 4,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the rows are kept")] = None,
) -> None:
    """Round each block by each method, then show and keep the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, whole in record(Path(folder), prompts, samples, seed).items():
            learn, held_out = (replace(whole, call=call) for call in split(whole.call, seed))
            for method, make in methods(learn, bits, seed).items():
                start = time.perf_counter()
                rounded = make()
                seconds = round(time.perf_counter() - start, 1)
                row = {"block": name, "method": method, "error": held_out_error(held_out, rounded), "seconds": seconds}
                Console().print(row)
                rows.append(row)
    show(rows)
    if json_file:
        write_json(json_file, {"bits": bits, "samples": samples, "threads": torch.get_num_threads(), "rows": rows})


def show(rows: list[dict[str, Any]]) -> None:
    """A line per method, a column per block."""
    table = Table("method", *BLOCKS)
    cells = {(row["method"], row["block"]): f"{row['error']:.2e} ({row['seconds']} s)" for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        table.add_row(method, *(cells.get((method, block), "") for block in BLOCKS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
