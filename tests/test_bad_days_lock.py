"""Two writers and one folder: the second is refused by name, and a writer that is killed leaves no lock behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from class_conditional import class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import hold_folder, last_command, lock_file
from pcr_export.manifest import write_manifest
from pcr_export.qdiffbench.evaluate import Evaluation, evaluate_folder
from pcr_export.study_table import StudyRequest, run_study

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from pcr_export.folder_lock import hold_folder\n"
    "with hold_folder(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts a process that holds a folder."""
    holders = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
        holders.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in holders:
        process.kill()
        process.communicate()


def recipe() -> Recipe:
    return Recipe(model="tiny-sdxl", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)


def export(folder: Path) -> None:
    export_denoiser(
        Job(denoiser=class_conditional_denoiser(), recipe=recipe(), conditions=[0, 1], folder=folder, validate=False)
    )


def evaluate(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(recipe().to_json())
    (folder / "model_index.json").write_text("{}")
    write_manifest(folder)
    evaluate_folder(Evaluation(folder=folder, images=2), None)


def study(folder: Path) -> None:
    run_study(StudyRequest(model="tiny-sdxl", out=folder.parent, images=2))


@pytest.mark.parametrize(("name", "write"), [("toy", export), ("toy", evaluate), ("study-tiny-sdxl", study)])
def test_the_second_writer_is_refused(
    name: str, write: Callable[[Path], None], tmp_path: Path, hold: Callable, record_property: Callable
) -> None:
    holder = hold(tmp_path / name)
    with pytest.raises(
        PcrExportError, match=rf"is being written by process {holder.pid} \(.*\): wait for its end"
    ) as refused:
        write(tmp_path / name)
    record_property("line", str(refused.value).replace(str(tmp_path), "."))
    assert {path.name for path in (tmp_path / name).iterdir()} <= {
        ".stages",
        "recipe.json",
        "model_index.json",
        "manifest.json",
    }
    assert [path.name for path in (tmp_path / name / ".stages").iterdir()] == ["lock"]


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, hold: Callable) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_file(tmp_path).read_text().startswith(str(holder.pid))  # the file stays, and means nothing
    with hold_folder(tmp_path):
        assert lock_file(tmp_path).read_text().startswith(str(os.getpid()))


def test_the_lock_ends_with_the_work_and_tells_of_work_that_did_not_end(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
            raise ZeroDivisionError
        assert last_command(tmp_path).startswith((Path(sys.argv[0]).name, "python -m"))
    with hold_folder(tmp_path):
        pass
    assert lock_file(tmp_path).read_bytes() == b""  # so that equal exports are equal to the byte


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    won, refused = [], []
    together, done = threading.Barrier(8), threading.Barrier(8)

    def attempt() -> None:
        together.wait()
        try:
            with hold_folder(tmp_path):
                won.append(True)
                done.wait()
        except PcrExportError as error:
            refused.append(str(error))
            done.wait()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 7


@pytest.mark.slow
def test_two_exports_at_once_on_the_command_line(tmp_path: Path, record_property: Callable) -> None:
    from models.tiny_pipelines import tiny_sd

    source = tiny_sd(tmp_path / "random")
    small = ("--steps", "2", "--calib-size", "2", "--height", "16", "--width", "16", "--no-validate")
    command = [sys.executable, "-m", "pcr_export", str(source), "--out", str(tmp_path), *small]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate()[1].strip() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], lines
    line, winner = lines[codes.index(2)].splitlines()[-1], both[codes.index(0)]  # the lines before warn of prompts
    record_property("line", line.replace(str(tmp_path), "."))
    assert f"process {winner.pid} (python -m pcr_export " in line
    assert lines[codes.index(2)].count("error:") == 1
