"""How a step's ranges are found, and what that does to the final latents: schemes x range estimators x activation bits, simulated.

    python benchmarks/calibration_order.py tiny-sdxl --bits 8 --json benchmarks/results/calibration_order.json
    python benchmarks/calibration_order.py noise:FOLDER flow:FOLDER --bits 8,6,4 --json ...

A model is one of the catalog, or a UNet2DModel's folder that scripts/train_tiny_unconditional.py wrote. "one-pass" is no setting of the
package: each layer is observed behind layers of the same step that are quantized already. A row that the file holds is not made again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcr_export.calibrate.canonical_batches import canonical_batches
from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.range_search import RangeSearch
from pcr_export.calibrate.ranges import (
    CLIP_RATIOS,
    ActivationHistogram,
    Quantizer,
    find_quantizer,
    minmax_range,
    percentile_range,
    quantize,
)
from pcr_export.calibrate.simulate import Simulation, Visit
from pcr_export.calibrate.site_observer import Histograms, Observe, count_activations
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import Denoiser, Inputs, Walk, sample
from pcr_export.models.load import load_model
from pcr_export.prompts import own_prompt_sets, prompt_seeds, read_prompts
from pcr_export.recipe import ESTIMATORS, Recipe
from pcr_export.sites import Layer
from pcr_export.stages import Facts
from pcr_export.write_files import write_json

SCHEMES = ("float-trajectory", "one-pass", "observe-advance", "static")
UNCONDITIONAL_STEPS = {"noise": 30, "flow": 20}
Row = dict[str, Quantizer]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with what it is calibrated on and what it is judged by."""

    name: str
    denoiser: Denoiser
    layers: Sequence[Layer]
    recipe: Recipe
    calibration: Sequence[tuple[Sequence[Any], Sequence[int]]]  # batches of conditions and seeds
    evaluation: Sequence[tuple[Sequence[Any], Sequence[int]]]

    @property
    def affine(self) -> dict[str, bool]:
        """Site -> whether it can have a zero point."""
        return {layer.site: layer.affine for layer in self.layers if layer.site is not None}

    def final_latents(self, call: Callable[[Inputs], Tensor]) -> Tensor:
        """float32 [samples, ...] of the evaluation set with `call` as the network."""
        return torch.cat([sample(self.denoiser, call, *batch) for batch in self.evaluation])


def open_case(name: str, calibration: int, evaluation: int) -> Case:
    """A catalog model, or "noise:FOLDER" or "flow:FOLDER"."""
    kind, _, folder = name.partition(":")
    if folder:
        denoiser, size = unconditional_denoiser(Path(folder), kind)
        recipe = Recipe(model=kind, num_inference_steps=len(denoiser.timesteps), guidance_scale=1.0, **size)
        conditions: Sequence[Any] = [None] * (calibration + evaluation)
        seeds = list(range(len(conditions)))
        sets = [(conditions[:calibration], seeds[:calibration]), (conditions[calibration:], seeds[calibration:])]
    else:
        entry = resolve(name)
        denoiser, own = load_model(entry).denoiser(), own_prompt_sets(name)
        size = {"height": int(entry.height or 0), "width": int(entry.width or 0)}
        recipe = Recipe(model=name, num_inference_steps=len(denoiser.timesteps), guidance_scale=1.0, **size)
        prompts = read_prompts(own.calibration)[:calibration], read_prompts(own.in_domain)[:evaluation]
        sets = [(each, prompt_seeds(each, 0)) for each in prompts]
    batches = [canonical_batches(*each, recipe) for each in sets]
    example = next(denoiser.walk(*batches[0][0]))
    layers = find_layers(denoiser, example, ("conv_in", "conv_out"))
    return Case(
        name=kind, denoiser=denoiser, layers=layers, recipe=recipe, calibration=batches[0], evaluation=batches[1]
    )


def unconditional_denoiser(folder: Path, kind: str) -> tuple[Denoiser, dict[str, int]]:
    """A UNet2DModel that predicts noise, walked by DDPM's ancestral sampler, or a velocity, walked by Euler steps."""
    from diffusers import UNet2DModel

    network: Any = UNet2DModel.from_pretrained(folder).eval()
    size, steps = int(network.config.sample_size), UNCONDITIONAL_STEPS[kind]
    walk, timesteps = (ancestral_walk if kind == "noise" else euler_walk)(size, network.config.in_channels, steps)
    denoiser = Denoiser(
        network=network,
        call=lambda network, inputs: network(inputs["x"], inputs["t"], return_dict=False)[0],
        walk=walk,
        timesteps=timesteps,
        timestep="t",
        dynamic_axes={"x": {0: "batch"}, "t": {}},
    )
    return denoiser, {"height": size, "width": size}


def ancestral_walk(size: int, channels: int, steps: int) -> tuple[Callable[..., Walk], tuple[float, ...]]:
    """DDPM's walk (arXiv 2006.11239), and its timesteps."""
    from diffusers import DDPMScheduler

    def scheduler() -> Any:
        made: Any = DDPMScheduler(beta_schedule="linear", clip_sample=True)
        made.set_timesteps(steps)
        return made

    def walk(_conditions: Sequence[Any], seeds: Sequence[int]) -> Walk:
        own, generators = scheduler(), [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(channels, size, size, generator=each) for each in generators])
        for timestep in own.timesteps:
            output = yield {"x": x, "t": timestep.float()}
            x = own.step(output, timestep, x, generator=generators, return_dict=False)[0]
        return x

    return walk, tuple(float(timestep) for timestep in scheduler().timesteps)


def euler_walk(size: int, channels: int, steps: int) -> tuple[Callable[..., Walk], tuple[float, ...]]:
    """Flow matching from noise (t = 1) to the picture (t = 0), and its timesteps, 1000 t."""
    times = torch.linspace(1, 0, steps + 1)

    def walk(_conditions: Sequence[Any], seeds: Sequence[int]) -> Walk:
        x = torch.stack(
            [torch.randn(channels, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        for now, following in itertools.pairwise(times):
            x = x + (following - now) * (yield {"x": x, "t": now * 1000})
        return x

    return walk, tuple(float(time * 1000) for time in times[:-1])


def grid_quantizer(low: float, high: float, affine: bool, bits: int) -> Quantizer:
    """The finest grid of `bits` bits that holds [low, high] and 0."""
    low, high, half = min(low, 0.0), max(high, 0.0), 2 ** (bits - 1)
    scale = (high - low) / (2 * half - 1) if affine else max(-low / half, high / (half - 1))
    scale = max(scale, 1e-30)
    return Quantizer(scale, round(-low / scale) if affine else half)


def on_grid(x: Tensor, quantizer: Quantizer, bits: int) -> Tensor:
    """x in units of the scale, an integer; as `ranges.quantize`, for fewer than 8 bits as well."""
    if bits >= 8:
        return quantize(x, quantizer.scale, quantizer.zero_point, bits)
    zero = quantizer.zero_point
    return (x / quantizer.scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)


def find(histogram: ActivationHistogram, ranges: str, affine: bool, bits: int) -> Quantizer:
    """The package's quantizer; below 8 bits the same estimators on a coarser grid."""
    if bits >= 8:
        return find_quantizer(histogram, ranges=ranges, affine=affine, bits=bits)
    low, high = percentile_range(histogram, 99.99) if ranges == "percentile" else minmax_range(histogram)
    if ranges != "mse":
        return grid_quantizer(low, high, affine, bits)
    values, counts = histogram.values_and_counts()

    def error(ends: tuple[float, float]) -> float:
        quantizer = grid_quantizer(*ends, affine, bits)
        return float(((on_grid(values, quantizer, bits) * quantizer.scale - values).square() @ counts).item())

    ratios = CLIP_RATIOS.tolist()
    if not affine:
        return grid_quantizer(*min(((low * r, high * r) for r in ratios), key=error), affine, bits)
    for end in ("high", "low") if high >= -low else ("low", "high"):
        low, high = min(((low * r, high) if end == "low" else (low, high * r) for r in ratios), key=error)
    return grid_quantizer(low, high, affine, bits)


def visit_row(row: Row, bits: int) -> Visit:
    """Quantize every site with one step's row."""
    return lambda site, x: (on_grid(x, row[site], bits), row[site].scale)


def find_row(case: Case, histograms: Histograms, ranges: str, bits: int) -> Row:
    """A quantizer per site."""
    return {site: find(histograms[site], ranges, affine, bits) for site, affine in case.affine.items()}


def float_histograms(case: Case) -> list[Histograms]:
    """Of each step, on the float model's trajectories."""
    found: list[Histograms] = [{} for _ in case.denoiser.timesteps]
    with Simulation(case.denoiser, case.layers, None) as simulation:
        for batch in case.calibration:
            for step, (inputs, advance) in enumerate(steps_of(case.denoiser, batch)):
                advance(simulation.run(inputs, Observe(found[step], step)))
    return found


def steps_of(denoiser: Denoiser, batch: Any) -> Iterator[tuple[Inputs, Callable[[Tensor], None]]]:
    """The inputs of every call of a walk, each with the function that takes its output."""
    walk = denoiser.walk(*batch)
    outputs: list[Tensor] = []
    inputs = next(walk)
    for _ in denoiser.timesteps:
        yield inputs, outputs.append
        try:
            inputs = walk.send(outputs.pop())
        except StopIteration:
            return


def progressive(case: Case, simulation: Simulation, ranges: str, bits: int, one_pass: bool) -> list[Row]:
    """A row for each step, while the steps before it run quantized."""
    walks = [case.denoiser.walk(*batch) for batch in case.calibration]
    inputs, rows = [next(walk) for walk in walks], []
    for step, _ in enumerate(case.denoiser.timesteps):
        row = (one_pass_row if one_pass else observed_row)(case, simulation, inputs, ranges, bits, step)
        rows.append(row)
        if step < len(case.denoiser.timesteps) - 1:
            outputs = [simulation.run(batch, visit_row(row, bits)) for batch in inputs]
            inputs = [walk.send(output) for walk, output in zip(walks, outputs, strict=True)]
    return rows


def observed_row(case: Case, simulation: Simulation, inputs: list[Inputs], ranges: str, bits: int, step: int) -> Row:
    """Integer weights, float activations."""
    histograms: Histograms = {}
    for batch in inputs:
        simulation.run(batch, Observe(histograms, step))
    return find_row(case, histograms, ranges, bits)


def one_pass_row(case: Case, simulation: Simulation, inputs: list[Inputs], ranges: str, bits: int, step: int) -> Row:
    """Every site behind sites of the same step that are quantized already; all batches in one call."""
    row: Row = {}

    def visit(site: str, x: Tensor) -> tuple[Tensor, float]:
        if site not in row:
            histogram = ActivationHistogram()
            count_activations(histogram, site, step, x)
            row[site] = find(histogram, ranges, case.affine[site], bits)
        return on_grid(x, row[site], bits), row[site].scale

    simulation.run({name: _together([batch[name] for batch in inputs]) for name in inputs[0]}, visit)
    return row


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts[0].ndim else parts[0]


def call_with(case: Case, simulation: Simulation, rows: list[Row], bits: int) -> Callable[[Inputs], Tensor]:
    """The simulated network as a function of its inputs."""
    steps = {timestep: step for step, timestep in enumerate(case.denoiser.timesteps)}

    def call(inputs: Inputs) -> Tensor:
        return simulation.run(inputs, visit_row(rows[steps[float(inputs[case.denoiser.timestep])]], bits))

    return call


def decibels(reference: Tensor, found: Tensor) -> Facts:
    """SQNR of all final latents together, and of the median sample."""
    error = (found - reference).double().square().flatten(1).sum(1)
    energy = reference.double().square().flatten(1).sum(1)
    together = 10 * torch.log10(energy.sum() / error.sum())
    return {
        "sqnr_db": round(together.item(), 3),
        "median_db": round((10 * torch.log10(energy / error)).median().item(), 3),
    }


def merged(histograms: Sequence[Histograms]) -> Histograms:
    """All steps' counts together."""
    total: Histograms = {}
    for each in histograms:
        for site, histogram in each.items():
            into = total.setdefault(site, ActivationHistogram())
            into.counts += histogram.counts
            into.minimum = min(into.minimum, histogram.minimum)
            into.maximum = max(into.maximum, histogram.maximum)
    return total


class Table:
    """The rows of the JSON file; it is written again after each."""

    def __init__(self, path: Path, counts: Facts) -> None:
        self._path = path
        self._counts = counts
        self.rows: list[Facts] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, about: Facts, make: Callable[[], Facts]) -> Facts:
        """The row of `about`; made unless the file holds it."""
        about = {**about, **self._counts}
        for row in self.rows:
            if about.items() <= row.items():
                return row
        start = time.process_time()
        row = {**about, **make(), "cpu_seconds": round(time.process_time() - start, 1)}
        self.rows.append(row)
        write_json(self._path, {"rows": self.rows})
        print(row, flush=True)
        return row


def measure(case: Case, table: Table, arguments: argparse.Namespace) -> None:
    """Every row of a model that was asked for."""
    reference = functools.cache(lambda: case.final_latents(case.denoiser))
    histograms = functools.cache(lambda: float_histograms(case))

    def score(scheme: str, ranges: str, bits: int) -> Facts:
        observed = histograms() if scheme in ("float-trajectory", "static") else []  # of float weights
        expected = reference()
        with Simulation(case.denoiser, case.layers, NEAREST_8) as simulation:
            rows = rows_of(case, simulation, scheme, ranges, bits, observed)
            return decibels(expected, case.final_latents(call_with(case, simulation, rows, bits)))

    for bits in map(int, arguments.bits.split(",")):
        for scheme in arguments.schemes.split(","):
            about = {"model": case.name, "scheme": scheme, "activation_bits": bits}
            for ranges in arguments.ranges.split(","):
                make = functools.partial(score, scheme=scheme, ranges=ranges, bits=bits)
                table.add({**about, "ranges": ranges}, make)
    if arguments.auto:
        table.add({"model": case.name, "ranges": "auto"}, functools.partial(search, case))


def search(case: Case) -> Facts:
    """What `--ranges auto` finds: from two thirds of the calibration set, judged by the rest."""
    conditions, seeds = ([x for batch in case.calibration for x in batch[i]] for i in (0, 1))
    cut = len(seeds) * 2 // 3
    with tempfile.TemporaryDirectory() as folder:
        found = RangeSearch(
            denoiser=case.denoiser,
            layers=case.layers,
            observed=(conditions[:cut], seeds[:cut]),
            judged=(conditions[cut:], seeds[cut:]),
            recipe=replace(case.recipe, ranges="auto"),
            folder=Path(folder),
            key={},
        ).run()
    return {"chosen": found["ranges"], "range_sqnr_db": found["range_sqnr_db"]}


def rows_of(
    case: Case,
    simulation: Simulation,
    scheme: str,
    ranges: str,
    bits: int,
    histograms: Sequence[Histograms],
) -> list[Row]:
    """A quantizer for each step and site, by one of SCHEMES. `histograms` are those of the float trajectories, with float weights."""
    if scheme == "float-trajectory":
        return [find_row(case, each, ranges, bits) for each in histograms]
    if scheme == "static":
        return [find_row(case, merged(histograms), ranges, bits)] * len(case.denoiser.timesteps)
    return progressive(case, simulation, ranges, bits, scheme == "one-pass")


def main() -> None:
    """Read the arguments, measure each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", default="8", help="of activations, separated by commas; weights have 8")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--ranges", default=",".join(ESTIMATORS))
    parser.add_argument("--auto", action="store_true", help="also what --ranges auto finds")
    parser.add_argument("--calibration", type=int, default=32, help="samples")
    parser.add_argument("--evaluation", type=int, default=64, help="samples")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    counts = {"calibration": arguments.calibration, "evaluation": arguments.evaluation}
    for name in arguments.models:
        measure(open_case(name, arguments.calibration, arguments.evaluation), Table(arguments.json, counts), arguments)


if __name__ == "__main__":
    main()
