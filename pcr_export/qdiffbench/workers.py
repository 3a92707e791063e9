"""Images painted by many processes on one machine or several (Ray), the same bytes as one process makes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcr_export.errors import PcrExportError
from pcr_export.progress import Track, silent
from pcr_export.qdiffbench.images import generate_images, missing_chunks, write_chunk
from pcr_export.qdiffbench.painters import Paint, Painter

RETRIES_PER_CHUNK = 3  # workers that may die over one chunk
SHOWN_LETTERS = 200  # of Ray's reason for a worker's death
CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 2**28  # of a cluster of our own: a few chunks of pixels on their way to the driver
_START_RAY = "start one with ray start --head, or leave out --address to use this machine alone"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that paint. Raises PcrExportError for fewer than one."""

    count: int = 1
    threads: int = 1  # of each; the last digits of float sums depend on it
    address: str | None = None  # of a Ray cluster, HOST:PORT, from outside it ray://HOST:PORT; None: this machine

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.count), ("--threads", self.threads)):
            if value < 1:
                raise PcrExportError(f"{flag} must be at least 1, got {value}")

    @property
    def none_needed(self) -> bool:
        """This process paints alone."""
        return self.count == 1 and self.address is None


ONE_PROCESS = Workers()


def paint_images(
    painter: Painter,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    chunk: int,
    workers: Workers = ONE_PROCESS,
    description: str,
    track: Track = silent,
) -> None:
    """Image i of prompt i and seed i, as `generate_images` does it, by `workers`.

    Chunks are cut by index and every process computes with the same number of threads: the images depend on neither the number
    of workers nor on who paints what. A worker that dies is replaced and its chunk painted again. Only this process
    writes files, so that the machines of a cluster need no common folder; what the painter reads (an exported folder, a model)
    must lie under the same absolute path on each of them.

    Raises PcrExportError where Ray is missing, the cluster can't be reached or is too small, or a chunk outlived all of its
    workers; images that are finished stay.
    """
    if workers.none_needed:
        if missing_chunks(folder, len(prompts), chunk):
            with painter.open(workers.threads) as paint:
                generate_images(paint, prompts, seeds, folder, chunk=chunk, description=description, track=track)
        return
    folder.mkdir(parents=True, exist_ok=True)
    chunks = missing_chunks(folder, len(prompts), chunk)
    with track(description, len(prompts)) as advance:
        advance(len(prompts) - sum(map(len, chunks)))
        if not chunks:
            return
        with ray_cluster(workers):
            for indices, pixels in _paint_chunks(painter, prompts, seeds, chunks, workers):
                write_chunk(pixels, folder, indices)
                advance(len(indices))


def worker_processes(workers: Workers) -> AbstractContextManager[None]:
    """Several calls of `paint_images` inside share one start of Ray; nothing is started for a single process."""
    return nullcontext() if workers.none_needed else ray_cluster(workers)


@contextmanager
def ray_cluster(workers: Workers) -> Iterator[None]:
    """Ray inside: the cluster at `workers.address`, or processes of this machine. One that is running already is used and left running.

    Raises PcrExportError where Ray is missing, the cluster can't be reached, or it has fewer CPUs than the workers have threads.
    """
    ray, address, needed = _import_ray(), workers.address, workers.count * workers.threads
    ours = not ray.is_initialized()
    if ours:
        if address is not None:
            _check_address(address)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "pcr-export"}
        try:
            if address is None:
                ray.init(
                    "local",
                    num_cpus=needed,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
            else:
                ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise PcrExportError(f"Ray can't be started or joined ({reason}): {_START_RAY}") from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < needed:
            raise PcrExportError(
                f"the cluster has {cpus} CPUs, {workers.count} workers of {workers.threads} threads need {needed}: "
                f"use --workers {max(1, cpus // workers.threads)}"
            )
        yield
    finally:
        if ours:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raise PcrExportError where nobody listens there, within seconds: Ray itself knocks for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not (separator and host and port.isdigit()):
        raise PcrExportError(f"--address {address} is not understood: write HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise PcrExportError(f"no Ray cluster answers at --address {address} ({error}): {_START_RAY}") from error


class _PaintingWorker:
    """What a worker process runs. It opens its painter with the first chunk, so that what fails there is told as it is."""

    def __init__(self, painter: Painter, threads: int) -> None:
        self._painter = painter
        self._threads = threads
        self._open = ExitStack()
        self._paint: Paint | None = None

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """uint8 [len(prompts), height, width, 3]."""
        if self._paint is None:
            self._paint = self._open.enter_context(self._painter.open(self._threads))
        return self._paint(prompts, seeds)


def _paint_chunks(
    painter: Painter, prompts: Sequence[str], seeds: Sequence[int], chunks: Sequence[range], workers: Workers
) -> Iterator[tuple[range, np.ndarray]]:
    """Chunks and their pixels as they are finished; one chunk at a time for each worker."""
    ray = _import_ray()
    worker_class = ray.remote(_PaintingWorker).options(
        num_cpus=workers.threads,
        max_restarts=-1,  # as often as it takes: the retries of a chunk are what is counted
        max_task_retries=RETRIES_PER_CHUNK,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(workers.threads)}},
    )
    processes = [worker_class.remote(painter, workers.threads) for _ in range(min(workers.count, len(chunks)))]
    waiting = iter(chunks)
    running: dict[Any, tuple[Any, range]] = {}

    def start_next(worker: Any) -> None:
        if indices := next(waiting, None):
            task = worker.paint.remote([prompts[i] for i in indices], [seeds[i] for i in indices])
            running[task] = (worker, indices)

    for worker in processes:
        start_next(worker)
    while running:
        (task,), _ = ray.wait(list(running), num_returns=1)
        worker, indices = running.pop(task)
        start_next(worker)
        yield indices, _pixels(ray, task, indices)


def _pixels(ray: Any, task: Any, indices: range) -> np.ndarray:
    """What a worker painted; its own PcrExportError where it has one to tell."""
    try:
        pixels: np.ndarray = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PcrExportError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[-1][:SHOWN_LETTERS]
        raise PcrExportError(
            f"images {indices.start} to {indices.stop - 1}: {1 + RETRIES_PER_CHUNK} workers died one after another ({reason}): "
            "use fewer --workers if memory is short; the same command goes on from here",
            exit_code=3,
        ) from error
    return pixels


def _import_ray() -> Any:
    """Ray, with its usage statistics off. Raises PcrExportError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise PcrExportError("several workers need Ray: pip install 'pcr-export[cluster]'") from error
    return ray
