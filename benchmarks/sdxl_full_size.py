"""The whole way to an engine at full size: SDXL's UNet with random weights, exported W8A8 with step scales, built for a GPU.

    python benchmarks/sdxl_full_size.py --work DIR --json FILE
    python benchmarks/sdxl_full_size.py --model sd15 --work DIR --json FILE

Every phase runs in a process of its own, whose memory is sampled: writing the weights (once), exporting and quantizing as a user
does, the graphs to compare with, building one engine per graph. Three graphs differ in their scales alone: one per site, one per
site and step, the same with relaxed steps. The fourth is static Q/DQ as other quantizers write it. Scales are made up: no figure
here speaks of images. Needs about 45 GB in DIR for SDXL, and `pip install 'pcr-export[rtx]'`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import UNet2DConditionModel
from phase_memory import Phase, measure_phase
from random_unets import write_random_unet
from rich.console import Console
from rich.table import Table
from static_qdq import STATIC_QDQ
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_export.calibrate.layers import find_layers
from pcr_export.engines.tensorrt import BuildRequest, build_engine
from pcr_export.errors import PcrExportError
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.models.pipelines import call_unet
from pcr_export.recipe import SKIPPED_BY_DEFAULT
from pcr_export.relaxed_steps import parse_relaxed_steps
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales
from pcr_export.write_files import write_json

CONVENTIONAL = "static Q/DQ, per-channel weights"
STATIC, PER_STEP, RELAXED = "static scales", "step scales", "step scales, relaxed steps"
STEPS, RELAXED_BITS, BATCH = 50, 10, 2
PIXELS = {"sdxl": 1024, "sd15": 512}
TOKENS, LATENT = 77, 16  # of the example that is traced; the graph takes any batch, height and width
GIB, GB = 2**30, 1e9
WIDTH = 120  # of the tables, in characters


def export(folder: Path, out: Path, relax: str, seed: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Trace the network in `folder` once and quantize the graph with the scales of these names; seconds, counts and sizes."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        network = UNet2DConditionModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    denoiser, example = denoiser_of(network), example_of(network.config)
    with timed(seconds, "find layers"), FakeTensorMode(allow_non_fake_inputs=True) as fake:  # no weight is read
        layers = find_layers(denoiser, {k: fake.from_tensor(x) for k, x in example.items()}, SKIPPED_BY_DEFAULT)
    with timed(seconds, "trace"):
        model = trace_float_onnx(denoiser, example)
    graphs, tables = {}, scale_tables(layers, relax, seed)
    for name in names:
        dialect = STATIC_QDQ if name == CONVENTIONAL else "tensorrt"
        with timed(seconds, f"quantize: {name}"):
            report = quantize_onnx(model, tables[name], layers, graph_path(out, name), dialect)
        graphs[name] = {"quantizers": report.quantizers, "onnx_bytes": report.onnx_bytes}
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "quantized": list(report.layers),
        "float": {layer.name: layer.reason for layer in layers if layer.reason},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "graphs": graphs,
    }


def build(onnx: Path, flavour: str, target: str, latent: int, layers: list[str]) -> dict[str, Any]:
    """Build one engine; what its record says, the sites summed up, or the builder's error."""
    request = BuildRequest(
        onnx_path=onnx,
        engine_path=onnx.parent / f"{target}.engine",
        flavour=flavour,
        target=target,
        axes={"batch": (BATCH,) * 3, "height": (latent,) * 3, "width": (latent,) * 3},
        layers=tuple(layers),
        allow_float_fallback=True,
    )
    try:
        record = build_engine(request)
    except PcrExportError as error:
        return {"error": str(error)}
    int8 = sum(count for _, reads, _, count in record.kernel_table if reads == "Int8 x Int8")
    kept = ("version", "kernels", "pointwise_kernels", "weight_bytes", "activation_bytes", "engine_bytes")
    facts = {name: getattr(record, name) for name in (*kept, "parse_seconds", "build_seconds", "kernel_table")}
    return {**facts, "int8_kernels": int8, "layers_in_int8": len(layers) - len(record.floats), "floats": record.floats}


def denoiser_of(network: UNet2DConditionModel) -> Denoiser:
    """The network with its inputs as in a pipeline, to be traced and never walked."""
    batch = {0: "batch"}
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {}, "encoder_hidden_states": batch}
    if network.config.addition_embed_type == "text_time":
        axes |= {"text_embeds": batch, "time_ids": batch}
    return Denoiser(network=network, call=call_unet, walk=lambda *_: iter(()), timesteps=(), dynamic_axes=axes)


def example_of(config: Any) -> Inputs:
    """Inputs of the least size."""
    inputs = {
        "sample": torch.randn(BATCH, config.in_channels, LATENT, LATENT),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(BATCH, width), "time_ids": torch.full((BATCH, 6), 8.0 * LATENT)}
    return inputs


def scale_tables(layers: list[Layer], relax: str, seed: int) -> dict[str, StepScales]:
    """Made-up scales for every site, 0.02 to 0.1, changing from step to step, with zero points where a site may have them.

    The residual blocks read the same time embedding, so calibration finds them the same scale: here too.
    """
    affine = {str(layer.site): layer.affine for layer in layers if layer.site}
    random = np.random.default_rng(seed)
    base = np.exp(random.uniform(np.log(0.02), np.log(0.1), len(affine)))
    scale = (base * random.uniform(0.7, 1.3, (STEPS, len(affine)))).astype(np.float32)
    zero = np.where(list(affine.values()), random.integers(20, 129, scale.shape), 128).astype(np.uint8)
    embeddings = [i for i, site in enumerate(affine) if site.endswith("time_emb_proj")]
    scale[:, embeddings], zero[:, embeddings] = scale[:, embeddings[:1]], zero[:, embeddings[:1]]
    timesteps = np.linspace(981, 1, STEPS, dtype=np.float32)
    bits = np.full(STEPS, 8, np.uint8)
    relaxed = bits.copy()
    relaxed[list(parse_relaxed_steps(relax, STEPS))] = RELAXED_BITS
    sites, of_layer = tuple(affine), {layer.name: str(layer.site) for layer in layers if layer.site}

    def table(rows: slice, bits: np.ndarray) -> StepScales:
        return StepScales(
            scale=scale[rows],
            zero_point=zero[rows],
            bits=bits[rows],
            timesteps=timesteps[rows],
            sites=sites,
            layers=of_layer,
        )

    every = slice(None)
    static = table(slice(1), bits)
    return {CONVENTIONAL: static, STATIC: static, PER_STEP: table(every, bits), RELAXED: table(every, relaxed)}


def graph_path(out: Path, name: str) -> Path:
    """Where the graph with these scales goes."""
    return out / name.replace(",", "").replace(" ", "-").replace("/", "") / "model.onnx"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def show(facts: dict[str, Any], phases: list[Phase], engines: dict[str, dict[str, Any]]) -> None:
    """Memory by phase and the engines side by side, on the terminal."""
    table = Table(
        "phase", title=f"{facts['parameters'] / 1e9:.3f} B parameters, {len(facts['quantized'])} layers in INT8"
    )
    for column in ("seconds", "anonymous GiB", "mapped GiB"):
        table.add_column(column, justify="right")
    for phase in phases:
        sizes = (phase.peak_anonymous_bytes / GIB, phase.peak_file_bytes / GIB)
        table.add_row(phase.name, f"{phase.seconds:.1f}", *(f"{size:.2f}" for size in sizes))
    console = Console(width=WIDTH)
    console.print(table)
    console.print({"seconds of export": facts["seconds"], **facts["graphs"]})
    table = Table("graph", title="engines")
    for column in (
        "INT8 layers",
        "INT8 kernels",
        "pointwise",
        "to static",
        "weights GB",
        "engine GB",
        "parse s",
        "build s",
    ):
        table.add_column(column, justify="right")
    for name, engine in engines.items():
        if "error" in engine:
            table.add_row(f"{name}: {engine['error']}")
            continue
        counts = (engine["layers_in_int8"], engine["int8_kernels"], engine["pointwise_kernels"])
        ratio = engine["pointwise_kernels"] / engines[STATIC].get("pointwise_kernels", np.nan)
        sizes = [(engine[each] or 0) / GB for each in ("weight_bytes", "engine_bytes")]
        times = (engine["parse_seconds"], engine["build_seconds"])
        cells = [*map(str, counts), f"{ratio:.3f}", *(f"{x:.3f}" for x in sizes), *(f"{x:.0f}" for x in times)]
        table.add_row(name, *cells)
    if engines:
        console.print(table)


def main(
    model: Annotated[str, typer.Option(help="sdxl or sd15")] = "sdxl",
    work: Annotated[Path, typer.Option(help="folder for weights, graphs and engines")] = Path("engines/full-size"),
    relax: str = "first:20%",
    backend: Annotated[str, typer.Option(help="tensorrt-rtx, tensorrt, or none: build no engine")] = "tensorrt-rtx",
    target: str = "sm89",
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Run the phases one after the other, print and write the figures."""
    unet, out = work / model / "unet", work / model / "graphs"
    _, written = measure_phase("write", write_random_unet, model, unet, seed)
    facts, exported = measure_phase("export", export, unet, out, relax, seed, (RELAXED,))
    others, compared = measure_phase("other graphs", export, unet, out, relax, seed, (CONVENTIONAL, STATIC, PER_STEP))
    facts["graphs"] = {**others["graphs"], **facts["graphs"]}
    phases, engines = [written, exported, compared], {}
    for name in facts["graphs"] if backend != "none" else ():
        arguments = (graph_path(out, name), backend, target, PIXELS[model] // 8, facts["quantized"])
        engines[name], phase = measure_phase(f"build: {name}", build, *arguments)
        phases.append(phase)
    show(facts, phases, engines)
    if json_file:
        content = {**facts, "phases": [asdict(phase) for phase in phases], "engines": engines}
        write_json(json_file, {"model": model, "relax": relax, "backend": backend, "target": target, **content})


if __name__ == "__main__":
    typer.run(main)
