"""An export's Triton pipeline under many clients, beside one client that sends one request after another.

    export PCR_EXPORT_TRITON_VENV=triton-venv      # see benchmarks/local_triton.py
    python benchmarks/triton_serving.py engines/tiny-sdxl-w8a8 --json benchmarks/results/triton_serving.json

A real tritonserver on loopback, requests of one image each. The single client sends half of its requests before and half after the many
clients, so that what else the machine does falls on both. Latencies are in medians of the single client's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from local_triton import LocalTriton, find_triton
from rich.console import Console
from rich.table import Table

from pcr_export.deploy.run import generate
from pcr_export.deploy.triton_repository import MAX_QUEUE, check_triton_repository
from pcr_export.recipe import read_recipe
from pcr_export.write_files import write_json

PERCENTILES = (50, 95, 99)
CHECKED = 8  # images compared with those of `generate`


def main(
    folder: Annotated[Path, typer.Argument(help="an exported folder")],
    clients: Annotated[int, typer.Option(min=1, max=MAX_QUEUE, help="that send one request each, at once")] = 200,
    alone: Annotated[int, typer.Option(help="requests of the single client")] = 40,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Measure `folder` on a tritonserver of this machine."""
    packages = find_triton()
    if packages is None:
        raise SystemExit("no tritonserver: see benchmarks/local_triton.py for how to get one")
    check_triton_repository(folder)
    with LocalTriton(folder / "triton", packages) as server:

        def client(seed: int) -> np.ndarray:
            return server.paint("a red circle above a blue square", seed=[seed], timeout=3600)[0]

        client(0)  # the first call is slower
        half = alone // 2
        _, before, seconds_before = _measure(client, half, 1)
        images, many, seconds_many = _measure(client, clients, clients)
        _, after, seconds_after = _measure(client, half, 1)
    single = np.array([*before, *after])
    rate_alone, rate_many = 2 * half / (seconds_before + seconds_after), clients / seconds_many
    recipe, median = read_recipe(folder), float(np.median(single))
    content = {
        "model": recipe.model,
        "steps": recipe.num_inference_steps,
        "height": recipe.height,
        "width": recipe.width,
        "clients": clients,
        "requests_alone": 2 * half,
        "rate_to_alone": round(rate_many / rate_alone, 2),
        "latency_alone": _percentiles(single, median),
        "latency_many": _percentiles(np.array(many), median),
        "largest_pixel_difference": _difference(folder, images[:CHECKED]),
        "images_compared": CHECKED,
    }
    _show(content)
    if json_file is not None:
        write_json(json_file, content)


def _measure(
    client: Callable[[int], np.ndarray], requests: int, at_once: int
) -> tuple[list[np.ndarray], list[float], float]:
    """Images, seconds of each request, and seconds of them all."""

    def timed(seed: int) -> tuple[np.ndarray, float]:
        start = time.monotonic()
        return client(seed), time.monotonic() - start

    start = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(timed, range(requests)))
    return [image for image, _ in results], [seconds for _, seconds in results], time.monotonic() - start


def _percentiles(seconds: np.ndarray, unit: float) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds, p)) / unit, 2) for p in PERCENTILES}


def _difference(folder: Path, images: list[np.ndarray]) -> int:
    expected = [generate(folder, "a red circle above a blue square", seed=seed) for seed in range(len(images))]
    return int(np.abs(np.stack(images).astype(int) - np.stack(expected).astype(int)).max())


def _show(content: dict[str, object]) -> None:
    table = Table("figure", "value")
    for name, value in content.items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
