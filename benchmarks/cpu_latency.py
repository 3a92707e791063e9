"""One UNet on one CPU, by every way to run it: onnxruntime, its own quantize_static, OpenVINO, and the artifact.

    python benchmarks/cpu_latency.py engines/tiny-sdxl-w8a8 --json FILE
    python benchmarks/cpu_latency.py --float float/model.onnx --int8 unet/model.onnx

All in one run: each round times every runner once, in turn, so that what else the machine does falls on all of them. Prints the
median milliseconds, the ratio to onnxruntime FP32, and the SQNR of the output to onnxruntime FP32's. OpenVINO's rows need
`pip install openvino nncf`, which the project itself does not.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine

Feed = dict[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]
CALIBRATION_TIMESTEPS = np.linspace(950, 1, 8, dtype=np.float32)
PAUSE_S = 0.1  # before every timed call: idle threads of the runner before it stop spinning
FLOAT_MODULES = ("conv_in", "conv_out")  # left float by every quantizer here, as in the artifact
STATIC = "onnxruntime quantize_static (Q/DQ, u8 x s8, per channel, min-max; Conv, MatMul, Gemm)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One runner's result."""

    name: str
    median_ms: float
    p95_ms: float
    ratio: float  # onnxruntime FP32's median over this one
    sqnr_db: float | None  # of the output to onnxruntime FP32's; None for that one itself


def main(
    folder: Annotated[Path | None, typer.Argument(help="An exported folder: its UNet and its float graph.")] = None,
    float_path: Annotated[Path | None, typer.Option("--float", help="The float ONNX graph.")] = None,
    int8_path: Annotated[Path | None, typer.Option("--int8", help="The artifact made from it.")] = None,
    batch: Annotated[int, typer.Option(help="Batch of every call.")] = 32,
    size: Annotated[int, typer.Option(help="Height and width of the latents.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of each runner.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed calls of each runner.")] = 20,
    timestep: Annotated[float, typer.Option(help="The timestep of the timed calls.")] = 500.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here as well.")] = None,
) -> None:
    """Time one UNet by every way to run it."""
    if folder is not None:
        float_path = float_path or folder / ".stages" / "float" / "model.onnx"
        int8_path = int8_path or folder / "unet" / "model.onnx"
    if float_path is None or int8_path is None:
        raise typer.BadParameter("give an exported folder, or --float and --int8")
    for path in (float_path, int8_path):
        if not path.is_file():
            raise typer.BadParameter(f"{path} does not exist: export the model first")
    with tempfile.TemporaryDirectory() as scratch:
        runners = dict(make_runners(float_path, int8_path, threads, batch, size, Path(scratch)))
        feed = make_feed(float_path, batch, size, timestep, seed=0)
        rows = measure(runners, feed, rounds)
    show(rows, f"batch {batch}, latents {size}x{size}, {threads} threads, median of {rounds} interleaved rounds")
    if json_path is not None:
        settings = {"batch": batch, "size": size, "threads": threads, "rounds": rounds, "timestep": timestep}
        temporary = json_path.with_name(json_path.name + ".tmp")
        temporary.write_text(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        os.replace(temporary, json_path)


def make_feed(path: Path, batch: int, size: int, timestep: float, seed: int) -> Feed:
    """Random inputs of the graph's shapes: normal floats, the timestep, sizes in `time_ids`, zeros for integers."""
    generator = np.random.default_rng(seed)
    free = {"batch": batch, "height": size, "width": size}
    feed: Feed = {}
    for each in onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs():
        shape = [free[dim] if isinstance(dim, str) else dim for dim in each.shape]
        if not shape:
            feed[each.name] = np.array(timestep, np.float32)
        elif each.name == "time_ids":
            feed[each.name] = np.tile(np.array([4 * size, 4 * size, 0, 0, 4 * size, 4 * size], np.float32), (batch, 1))
        elif each.type == "tensor(float)":
            feed[each.name] = generator.standard_normal(shape, np.float32)
        else:
            feed[each.name] = np.zeros(shape, np.int64)
    return feed


def make_runners(
    float_path: Path, int8_path: Path, threads: int, batch: int, size: int, scratch: Path
) -> Iterator[tuple[str, Run]]:
    """Every runner by name, onnxruntime FP32 first."""
    calibration = [make_feed(float_path, 4, size, t, seed=i + 1) for i, t in enumerate(CALIBRATION_TIMESTEPS)]
    yield "onnxruntime FP32", onnxruntime_run(float_path, threads)
    yield STATIC, onnxruntime_run(make_static(float_path, calibration, scratch), threads)
    shapes = {name: list(value.shape) for name, value in make_feed(float_path, batch, size, 0.0, seed=0).items()}
    yield from openvino_runs(float_path, calibration, threads, shapes)
    yield "this artifact (onnxruntime, step-factored INT8)", onnxruntime_run(int8_path, threads)


def onnxruntime_run(path: Path, threads: int) -> Run:
    """The graph in a session that lives as long as the function."""
    return OnnxRuntimeEngine(path, threads).__enter__().run


class Reader(CalibrationDataReader):
    """Hands the calibration inputs to onnxruntime one by one."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """The next inputs, None at the end."""
        return next(self._feeds, None)


def make_static(path: Path, calibration: list[Feed], scratch: Path) -> Path:
    """onnxruntime's own static quantization, as its documentation has it for CPUs with VNNI: Q/DQ, u8 activations, s8 weights."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    float_nodes = [
        node.name
        for node in nodes
        if any(each.key == "pcr.module" and each.value in FLOAT_MODULES for each in node.metadata_props)
    ]
    quantize_static(
        path,
        scratch / "static.onnx",
        Reader(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=float_nodes,
    )
    return scratch / "static.onnx"


def openvino_runs(
    path: Path, calibration: list[Feed], threads: int, shapes: dict[str, list[int]]
) -> Iterator[tuple[str, Run]]:
    """OpenVINO in FP32, BF16 and INT8 by NNCF, compiled for fixed shapes, which suits it best.

    Nothing where the two packages are not installed.
    """
    try:
        import nncf
        import openvino
    except ImportError:
        Console(stderr=True).print("openvino or nncf is missing: their rows are left out (pip install openvino nncf)")
        return
    core = openvino.Core()

    def compiled(model: openvino.Model, precision: str) -> Run:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        model.reshape(shapes)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda feed: np.array(request.infer(feed)[0])

    yield "OpenVINO FP32", compiled(core.read_model(path), "f32")
    yield "OpenVINO BF16", compiled(core.read_model(path), "bf16")
    nncf.set_log_level(40)
    quantized = nncf.quantize(
        core.read_model(path),
        nncf.Dataset(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
    )
    yield "OpenVINO INT8 (NNCF, transformer preset)", compiled(quantized, "f32")


def measure(runners: dict[str, Run], feed: Feed, rounds: int) -> list[Row]:
    """Interleaved rounds after two that warm up; rows in the runners' order."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    outputs = {name: [run(feed) for _ in range(2)][-1] for name, run in runners.items()}
    for _ in track(range(rounds), "timing", console=Console(stderr=True)):
        for name, run in runners.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            run(feed)
            times[name].append(1000 * (time.perf_counter() - start))
    first = next(iter(runners))
    reference, base = outputs[first], float(np.median(times[first]))
    return [
        Row(
            name=name,
            median_ms=float(np.median(taken)),
            p95_ms=float(np.percentile(taken, 95)),
            ratio=base / float(np.median(taken)),
            sqnr_db=None if name == first else sqnr_db(reference, outputs[name]),
        )
        for name, taken in times.items()
    ]


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Signal to noise ratio of `value` in dB."""
    noise = np.square(reference - value, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / max(noise, np.finfo(np.float64).tiny)))


def show(rows: list[Row], title: str) -> None:
    """The rows as a table on the terminal."""
    table = Table("runner", title=title)
    for column in ("ms (p50)", "ms (p95)", "times FP32", "SQNR dB"):
        table.add_column(column, justify="right")
    for row in rows:
        distance = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        table.add_row(row.name, f"{row.median_ms:.1f}", f"{row.p95_ms:.1f}", f"{row.ratio:.2f}", distance)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
