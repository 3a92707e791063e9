"""Forms in which one engine holds 8-bit and relaxed steps, each built by TensorRT-RTX from the same network and scales.

    python benchmarks/relaxed_forms.py --work DIR --json FILE
    python benchmarks/relaxed_forms.py --model sdxl --work DIR --json FILE --forms length,none --limit 900

small is an SDXL-like UNet of 8 M parameters; there the forms are run on onnxruntime as well and must agree. sdxl is the UNet at
full size with random weights. Scales are made up: no figure here speaks of images. Rows of an earlier run stay in the JSON file.
"""

from __future__ import annotations

import json
import signal as signals
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from phase_memory import measure_phase
from relaxed_form_graphs import FORMS, compare, export, graph_path
from relaxed_form_passes import NORMAL, PLANES, RELAXED
from rich.console import Console
from rich.table import Table
from sdxl_full_size import BATCH

from pcr_export.engines.layer_dump import HOST_JUMPS, POINTWISE, Kernel, count_kernels, prove_int8
from pcr_export.engines.onnx_files import input_shapes
from pcr_export.engines.tensorrt import BuildRequest, build_engine
from pcr_export.errors import PcrExportError
from pcr_export.write_files import write_json

LATENT = {"small": 32, "sdxl": 128}
GIB, MB = 2**30, 1e6


def build(name: str, folder: Path, model: str, target: str, layers: list[str], limit: int) -> dict[str, Any]:
    """Build one form's engine; its row, or that it was not finished in `limit` seconds, or the builder's error."""
    onnx, row = graph_path(folder, name), {"form": name, "title": FORMS[name].title}
    axes = {"batch": (BATCH,) * 3, "height": (LATENT[model],) * 3, "width": (LATENT[model],) * 3}
    branches = (NORMAL, RELAXED) if name == "if" else ()
    names = tuple(f"{branch}/{layer}" for branch in branches for layer in layers) or tuple(layers)
    try:
        with time_limit(limit):
            if name == "profiles":
                return {**row, **build_profiles(onnx, axes, target, names)}
            request = BuildRequest(
                onnx_path=onnx,
                engine_path=onnx.parent / f"{target}.engine",
                flavour="tensorrt-rtx",
                target=target,
                axes=axes,
                layers=names,
                allow_float_fallback=True,
            )
            record = build_engine(request)
    except TimeoutError:
        return {**row, "not_finished_in_seconds": limit}
    except PcrExportError as error:
        return {**row, "error": str(error)}
    return {**row, **summary(vars(record), [record.kernel_table], record.floats, len(names))}


def build_profiles(
    onnx: Path, axes: dict[str, tuple[int, int, int]], target: str, layers: tuple[str, ...]
) -> dict[str, Any]:
    """Build the engine with a profile for one plane and one for two, in a process of its own; its row."""
    profiles = [input_shapes(onnx, {**axes, PLANES: (planes,) * 3}) for planes in (1, 2)]
    with tempfile.TemporaryDirectory(dir=onnx.parent) as scratch:
        job = {
            "flavour": "tensorrt-rtx",
            "target": target,
            "onnx": str(onnx),
            "engine": str(onnx.parent / f"{target}.engine"),
            "profiles": profiles,
            "facts": f"{scratch}/facts.json",
            "timing_cache": None,
            "stream": True,
        }
        command = [sys.executable, str(Path(__file__).with_name("build_two_profiles.py"))]
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
        if done.returncode:
            raise PcrExportError(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        facts = json.loads(Path(job["facts"]).read_text())
    kernels = [[Kernel(**kernel) for kernel in profile] for profile in facts["kernels"]]
    proofs = [prove_int8(profile, layers) for profile in kernels]
    floats = {layer: reason for proof in proofs for layer, reason in proof.items() if reason}
    return {
        **summary(facts, [count_kernels(each) for each in kernels], floats, len(layers)),
        "told_by_profile": facts["told"],
    }


def summary(
    facts: dict[str, Any], profiles: Sequence[Sequence[Sequence[Any]]], floats: dict[str, str], count: int
) -> dict[str, Any]:
    """What the table shows of an engine with one kernel table (kind, reads, writes, count) per profile."""
    kept = ("version", "parse_seconds", "build_seconds", "peak_bytes", "engine_bytes", "weight_bytes")
    reads: Counter[str] = Counter()
    for kind, _, _, number in (line for lines in profiles for line in lines):
        reads[kind] += number if kind in HOST_JUMPS else 0
    return {
        **{name: facts[name] for name in (*kept, "activation_bytes")},
        "pointwise_kernels": [sum(n for kind, _, _, n in lines if kind == POINTWISE) for lines in profiles],
        "int8_kernels": [sum(n for _, read, _, n in lines if read == "Int8 x Int8") for lines in profiles],
        "products": count,
        "products_in_int8": count - len(floats),
        "why_not_int8": dict(Counter(floats.values())),
        "host_reads": {kind: number for kind, number in reads.items() if number},
    }


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block once `seconds` have passed; 0: no limit."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signals.signal(signals.SIGALRM, stop)
    signals.alarm(seconds)
    try:
        yield
    finally:
        signals.alarm(0)
        signals.signal(signals.SIGALRM, before)


def show(model: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows on the terminal."""
    table = Table("form", title=f"{model}: 8-bit and relaxed steps in one engine")
    columns = ("parse s", "build s", "peak GiB", "engine MB", "weights MB", "activations MB")
    for column in (*columns, "pointwise", "INT8 kernels", "proven INT8", "host reads"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["title"], *cells(row))
    Console(width=180).print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """A row's figures as text."""
    if "error" in row:
        return [row["error"]]
    if "not_finished_in_seconds" in row:
        return [f"not finished in {row['not_finished_in_seconds']} s"]
    return [
        f"{row['parse_seconds']:.1f}",
        f"{row['build_seconds']:.1f}",
        f"{row['peak_bytes'] / GIB:.2f}",
        *(f"{(row[name] or 0) / MB:.1f}" for name in ("engine_bytes", "weight_bytes", "activation_bytes")),
        " + ".join(map(str, row["pointwise_kernels"])),
        " + ".join(map(str, row["int8_kernels"])),
        f"{row['products_in_int8']}/{row['products']}",
        ", ".join(f"{number} {kind}" for kind, number in row["host_reads"].items()) or "0",
    ]


def main(
    model: Annotated[str, typer.Option(help="small or sdxl")] = "small",
    work: Annotated[Path, typer.Option(help="folder for weights, graphs and engines")] = Path("engines/relaxed-forms"),
    forms: Annotated[str, typer.Option(help=f"of {','.join(FORMS)}, in the order in which they are built")] = ",".join(
        FORMS
    ),
    target: str = "sm89",
    limit: Annotated[int, typer.Option(help="seconds for each engine; 0: none")] = 0,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Export, compare and build the forms; print and write the table."""
    names, folder = forms.split(","), work / model
    layers, _ = measure_phase("export", export, model, folder, names, seed)
    content: dict[str, Any] = {"model": model, "target": target, "batch": BATCH, "latent": LATENT[model], "rows": []}
    if json_file and json_file.exists():
        content |= json.loads(json_file.read_text())
    if model == "small" and "length" in names:
        content["agreement"] = compare(folder, names, seed)
        Console().print(content["agreement"])
    for name in names:
        row = build(name, folder, model, target, layers, limit)
        by_form = {each["form"]: each for each in (*content["rows"], row)}
        content["rows"] = [by_form[each] for each in FORMS if each in by_form]
        show(model, content["rows"])
        if json_file:
            write_json(json_file, content)


if __name__ == "__main__":
    typer.run(main)
