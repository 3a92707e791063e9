"""Painting by several processes of Ray, on this machine: the bytes of one process, whoever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from qdiffbench.process_tree import descendants, listeners

from pcr_export.errors import PcrExportError
from pcr_export.prompts import prompt_seeds
from pcr_export.qdiffbench.painters import FloatPainter, FolderPainter, Painter, paint_images, settings_of
from pcr_export.qdiffbench.workers import Workers, ray_cluster
from pcr_export.recipe import read_recipe

PROMPTS = ["a red cat", "a dog", "re", "a red cat", "nothing", "the moon", "a boat", "x", "a house"]


@pytest.fixture(scope="module", autouse=True)
def _workers_find_this_file() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module")
def cluster(_workers_find_this_file) -> Iterator[None]:
    """Ray for several tests; `paint_images` leaves it running."""
    with ray_cluster(Workers(count=2)):
        yield


def paint(painter: Painter, out: Path, **options) -> dict[str, bytes]:
    """The files of painting PROMPTS in chunks of 2."""
    paint_images(painter, PROMPTS, prompt_seeds(PROMPTS, 0), out, chunk=2, description="images", **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def float_painter(exported: Path) -> FloatPainter:
    return FloatPainter(settings=settings_of(read_recipe(exported)))


@dataclass(frozen=True)
class Slowly:
    """Another painter, with a rest in front of every chunk."""

    painter: Painter
    seconds: float

    @contextmanager
    def open(self, threads: int) -> Iterator:
        with self.painter.open(threads) as paint_chunk:

            def paint_late(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
                time.sleep(self.seconds)
                return paint_chunk(prompts, seeds)

            yield paint_late


@dataclass(frozen=True)
class Deadly:
    """Kills the process that opens it."""

    @contextmanager
    def open(self, threads: int) -> Iterator:
        os.kill(os.getpid(), signal.SIGKILL)
        yield None


def kill_one_worker(out: Path, killed: list[int]) -> None:
    """Wait until two images are there, then SIGKILL a process that paints."""
    while len(list(out.glob("*.png"))) < 2:
        time.sleep(0.02)
    worker = next(pid for pid, name in descendants(os.getpid()).items() if name.startswith("ray::_Worker"))
    os.kill(worker, signal.SIGKILL)
    killed.append(worker)


@pytest.mark.slow
def test_two_workers_paint_the_bytes_of_one_though_one_is_killed(exported, tmp_path):
    whole = paint(FolderPainter(folder=exported), tmp_path / "one")
    assert len(whole) == len(PROMPTS)
    killed: list[int] = []
    killer = Thread(target=kill_one_worker, args=(tmp_path / "two", killed))
    killer.start()
    assert paint(Slowly(FolderPainter(folder=exported), 0.3), tmp_path / "two", workers=Workers(count=2)) == whole
    killer.join(5)
    assert killed
    assert not any(name.startswith("ray::_Worker") for name in descendants(os.getpid()).values())


def test_one_worker_goes_on_where_two_were_stopped(exported, tmp_path):
    painter = FolderPainter(folder=exported)
    whole = paint(painter, tmp_path / "images")
    for index in (3, 8):
        (tmp_path / "images" / f"{index:05d}.png").unlink()
    assert paint(painter, tmp_path / "images") == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_float_model_and_artifact_with_more_workers(workers, exported, tmp_path):
    for name, painter in (("float", float_painter(exported)), ("artifact", FolderPainter(folder=exported))):
        assert paint(painter, tmp_path / f"{name}-n", workers=Workers(count=workers)) == paint(
            painter, tmp_path / f"{name}-1"
        )


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1:1", "no Ray cluster answers"), ("somewhere", "write HOST:PORT")]
)
def test_a_cluster_that_is_not_there(address, expected, tmp_path):
    with pytest.raises(PcrExportError, match=expected):
        paint(Deadly(), tmp_path / "images", workers=Workers(address=address))


@pytest.mark.slow
def test_a_chunk_that_kills_every_worker_ends_the_run_with_one_line(cluster, tmp_path):
    with pytest.raises(PcrExportError, match=r"images 0 to 1: 4 workers died .*use fewer --workers") as failure:
        paint_images(Deadly(), PROMPTS[:2], [0, 1], tmp_path, chunk=2, workers=Workers(count=2), description="images")
    assert "No module" not in str(failure.value)  # they died as Deadly has it
    assert "\n" not in str(failure.value)


def test_what_a_worker_refuses_is_told_as_it_is(cluster, tmp_path):
    with pytest.raises(PcrExportError, match="is no folder: give one that an export wrote") as refusal:
        paint(FolderPainter(folder=tmp_path / "none"), tmp_path / "images", workers=Workers(count=2))
    assert "\n" not in str(refusal.value)


def test_more_workers_than_a_cluster_has_room_for(cluster, tmp_path):
    with pytest.raises(PcrExportError, match="has 2 CPUs, 3 workers of 1 threads need 3: use --workers 2"):
        paint(Deadly(), tmp_path / "images", workers=Workers(count=3))


STRANGER = """
import sys, ray
ray.init(sys.argv[1])
print("JOINED", ray.cluster_resources())
"""


def test_a_stranger_of_the_same_machine_cannot_join(cluster):
    """Not even one who has the token that Ray keeps for a user."""
    import ray

    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    stranger = {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray looks elsewhere than on loopback
        "RAY_NUM_REDIS_GET_RETRIES": "1",  # it gives up sooner
    }
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", STRANGER, address]
    done = subprocess.run(command, env={**others, **stranger}, capture_output=True, text=True, timeout=60)
    assert "JOINED" not in done.stdout
    assert "uthentication" in done.stderr  # it was heard, and refused


def test_a_cluster_of_our_own_listens_on_loopback_alone(cluster):
    found = listeners([os.getpid(), *descendants(os.getpid())])
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same as IPv6 writes it
    assert found


def test_the_token_is_told_to_nobody(cluster):
    import ray

    token = os.environ["RAY_AUTH_TOKEN"].encode()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(os.getpid())]
    assert lines
    assert not any(token in line for line in lines)
    home = Path(ray._private.worker._global_node.get_session_dir_path()).parents[1]
    assert home.stat().st_mode & 0o777 == 0o700
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files
    assert not any(token in path.read_bytes() for path in files)


@pytest.mark.parametrize(("changed", "flag"), [({"count": 0}, "--workers"), ({"threads": 0}, "--threads")])
def test_fewer_than_one_is_refused(changed, flag):
    with pytest.raises(PcrExportError, match=f"{flag} must be at least 1, got 0"):
        Workers(**changed)
