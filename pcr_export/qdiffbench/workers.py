"""Work on images cut into parts, by many processes on one machine or several (Ray): the same bytes as one process makes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pcr_export.errors import PcrExportError, first_line
from pcr_export.qdiffbench.own_ray import check_loopback, own_ray
from pcr_export.stop_signals import keep_handlers, quiet_stderr

RETRIES_PER_PART = 3  # workers that may die over one part
SHOWN_LETTERS = 200  # of Ray's reason for a worker's death
CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 2**28  # of a cluster of our own: a few parts' pixels on their way
_START_RAY = "start one with ray start --head, or leave out --address to use this machine alone"
TOKEN_OF_ONE = "one that has a token asks for RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that paint and score. Raises PcrExportError for fewer than one."""

    count: int = 1
    threads: int = 1  # of each; the last digits of float sums depend on it
    address: str | None = None  # of a Ray cluster, HOST:PORT, from outside it ray://HOST:PORT; None: this machine

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.count), ("--threads", self.threads)):
            if value < 1:
                raise PcrExportError(f"{flag} must be at least 1, got {value}")

    @property
    def none_needed(self) -> bool:
        """This process works alone."""
        return self.count == 1 and self.address is None


ONE_PROCESS = Workers()


class Task(Protocol):
    """Says what is computed. It can be pickled: a worker process opens it for itself."""

    def open(self, threads: int) -> AbstractContextManager[Callable[..., Any]]:
        """The function that computes a part, with `threads` threads. Raises PcrExportError where what it needs can't be loaded."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some images of a task, and what its function is called with for them."""

    indices: range
    args: tuple[Any, ...]


def compute_parts(task: Task, parts: Iterable[Part], workers: Workers) -> Iterator[tuple[range, Any]]:
    """The images and the result of each part as they are finished, in any order.

    Parts are cut by index and every process computes with the same number of threads: results depend neither on the number of workers
    nor on who computes what. A worker that dies is replaced and its part computed again. The arguments travel with the part, so that
    the machines of a cluster need no common folder; what the task opens (an exported folder, a model) must lie under the same
    absolute path on each of them. At most one part per worker is in memory.

    Raises PcrExportError where Ray is missing, the cluster can't be reached or is too small, or a part outlived all of its workers.
    """
    if workers.none_needed:
        with task.open(workers.threads) as compute:
            for part in parts:
                yield part.indices, compute(*part.args)
    else:
        with ray_cluster(workers):
            yield from _compute_with_ray(task, parts, workers)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """`count` threads of torch inside, as many as before outside. Float sums differ in the last digit with their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worker_processes(workers: Workers) -> AbstractContextManager[None]:
    """Several calls of `compute_parts` inside share one start of Ray; nothing is started for a single process."""
    return nullcontext() if workers.none_needed else ray_cluster(workers)


@contextmanager
def ray_cluster(workers: Workers) -> Iterator[None]:
    """Ray inside: the cluster at `workers.address`, or processes of this machine that no other can reach.

    One that is running already is used and left running.

    Raises PcrExportError where Ray is missing, the cluster can't be reached, or it has fewer CPUs than the workers have threads.
    """
    ray, needed = _import_ray(), workers.count * workers.threads
    with ExitStack() as stack:
        if not ray.is_initialized():
            _start_ray(ray, workers, stack)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < needed:
            raise PcrExportError(
                f"the cluster has {cpus} CPUs, {workers.count} workers of {workers.threads} threads need {needed}: "
                f"use --workers {max(1, cpus // workers.threads)}"
            )
        yield


def _start_ray(ray: Any, workers: Workers, stack: ExitStack) -> None:
    """Start or join Ray; `stack` ends or leaves it. Raises PcrExportError where that fails."""
    if workers.address is not None:
        _check_address(workers.address)
        options: dict[str, Any] = {"address": workers.address}  # with the token of the user's own settings
    else:
        cpus = {"num_cpus": workers.count * workers.threads, "object_store_memory": OBJECT_STORE_BYTES}
        options = {"address": "local", **cpus, **stack.enter_context(own_ray(ray))}
    stack.callback(_shut_down, ray)
    try:
        with keep_handlers():  # with Ray's own, SIGTERM aborts the process
            context = ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, namespace="pcr-export")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        advice = "use --workers 1" if workers.address is None else f"{_START_RAY}; {TOKEN_OF_ONE}"
        raise PcrExportError(f"Ray can't be started or joined ({first_line(error)}): {advice}") from error
    if workers.address is None:
        check_loopback(ray, context)


def _shut_down(ray: Any) -> None:
    with quiet_stderr():  # Ray tells of tasks that end with it
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


class _Worker:
    """What a worker process runs. It opens its task with the first part, so that what fails there is told as it is."""

    def __init__(self, task: Task, threads: int) -> None:
        self._task = task
        self._threads = threads
        self._open = ExitStack()
        self._compute: Callable[..., Any] | None = None

    def compute(self, *args: Any) -> Any:
        if self._compute is None:
            self._compute = self._open.enter_context(self._task.open(self._threads))
        return self._compute(*args)


def _compute_with_ray(task: Task, parts: Iterable[Part], workers: Workers) -> Iterator[tuple[range, Any]]:
    ray = _import_ray()
    worker_class = ray.remote(_Worker).options(
        num_cpus=workers.threads,
        max_restarts=-1,  # as often as it takes: the retries of a part are what is counted
        max_task_retries=RETRIES_PER_PART,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(workers.threads)}},
    )
    waiting = iter(parts)
    running: dict[Any, tuple[Any, range]] = {}

    def start_next(worker: Any = None) -> None:
        if part := next(waiting, None):
            worker = worker or worker_class.remote(task, workers.threads)
            running[worker.compute.remote(*part.args)] = (worker, part.indices)

    for _ in range(workers.count):
        start_next()
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        worker, indices = running.pop(finished)
        start_next(worker)
        yield indices, _result(ray, finished, indices)


def _result(ray: Any, finished: Any, indices: range) -> Any:
    """What a worker computed; its own PcrExportError where it has one to tell."""
    try:
        return ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PcrExportError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[-1][:SHOWN_LETTERS]
        raise PcrExportError(
            f"images {indices.start} to {indices.stop - 1}: {1 + RETRIES_PER_PART} workers died one after another ({reason}): "
            "use fewer --workers if memory is short; the same command goes on from here",
            exit_code=3,
        ) from error


def _import_ray() -> Any:
    """Ray, with its usage statistics off. Raises PcrExportError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # which would abort the process on SIGTERM
    try:
        import ray
    except ImportError as error:
        raise PcrExportError("several workers need Ray: pip install 'pcr-export[cluster]'") from error
    return ray
