"""A folder that came from elsewhere, with links where an export or an evaluation writes: nothing outside the folder changes."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from class_conditional import class_conditional_denoiser
from exported_tiny_sdxl import export_tiny_sdxl

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import hold_folder, lock_file
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.qdiffbench.evaluate import Evaluation, evaluate_folder
from pcr_export.qdiffbench.images import write_png
from pcr_export.write_files import new_file, new_folder, refuse_linked_folders, sweep, write_bytes, write_text

MINE = "a file of the user's\n"


@functools.cache
def float_graph() -> ir.Model:
    denoiser = class_conditional_denoiser()
    return trace_float_onnx(denoiser, next(denoiser.walk([0, 1], [0, 1])))


def export(folder: Path) -> None:
    sampling = {"num_inference_steps": 5, "guidance_scale": 1.0, "height": 16, "width": 16, "min_sqnr_db": 0.0}
    job = Job(
        denoiser=class_conditional_denoiser(),
        recipe=Recipe(model="toy", **sampling),  # type: ignore[arg-type]
        conditions=[0, 1, 2, 3],
        folder=folder,
        validate=False,
        float_graph=float_graph,
    )
    export_denoiser(job)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "mine" / "notes.txt"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def is_untouched(victim: Path) -> bool:
    return files(victim.parent) == {"notes.txt": MINE.encode()}


def test_an_export_writes_no_file_through_a_link(tmp_path: Path, victim: Path) -> None:
    """Links lie where each file of an export, and each of its old temporary names, is to be."""
    export(tmp_path / "before")
    names = set(files(tmp_path / "before")) - {".stages/lock"}
    out = tmp_path / "out"
    for link in (link for name in names for link in (name, f"{name}.tmp", f"{name}.saving")):
        path = out / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(victim)
    export(out)
    assert is_untouched(victim)
    for name in (each for each in names if not each.endswith(".json")):  # which hold times
        assert (out / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert not any((out / name).is_symlink() for name in names)


@pytest.mark.parametrize("lies", ["link", "dangling link", "hard link", "pipe"])
def test_a_lock_that_is_no_file_of_the_folder_makes_way(lies: str, tmp_path: Path, victim: Path) -> None:
    path = lock_file(tmp_path)
    path.parent.mkdir(parents=True)
    match lies:
        case "link":  # as a snapshot of the hub's cache has it
            path.symlink_to(victim)
        case "dangling link":
            path.symlink_to(victim.with_name("new.txt"))
        case "hard link":  # as backups have it
            os.link(victim, path)
        case "pipe":
            os.mkfifo(path)
    with hold_folder(tmp_path):
        assert stat.S_ISREG(path.lstat().st_mode)
    assert is_untouched(victim)


def test_a_lock_that_is_a_folder_is_refused(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    lock_file(tmp_path).mkdir(parents=True)
    with pytest.raises(PcrExportError, match=r"can't be written to \(lock: Is a directory\)") as refused:
        export(tmp_path)
    record_property("line", str(refused.value).replace(str(tmp_path), "."))


@pytest.mark.parametrize("name", [".stages", "unet", "images", "evaluation", "triton", "unet/tensorrt", ".stages/skip"])
def test_a_linked_folder_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, victim: Path, record_property: Callable[[str, object], None]
) -> None:
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim.parent)
    there = files(tmp_path / "out")
    with pytest.raises(PcrExportError, match=f"{re.escape(name)} is a link to another folder") as refused:
        export(tmp_path / "out")
    record_property("line", str(refused.value).replace(str(tmp_path), "."))
    assert is_untouched(victim)
    assert files(tmp_path / "out") == there


def test_links_of_triton_stay_and_others_in_their_place_are_refused(tmp_path: Path, victim: Path) -> None:
    version = tmp_path / "triton" / "unet" / "1"
    version.mkdir(parents=True)
    (tmp_path / "unet").mkdir()
    (version / "model.onnx").symlink_to("../../../unet")
    refuse_linked_folders(tmp_path)
    with hold_folder(tmp_path):
        pass
    (version / "model.onnx").unlink()
    (version / "model.onnx").symlink_to(victim.parent)
    with pytest.raises(PcrExportError, match="is a link to another folder"):
        refuse_linked_folders(tmp_path)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    export(tmp_path / "out")
    assert (tmp_path / "disk" / "manifest.json").is_file()


@pytest.mark.slow
def test_an_evaluation_writes_no_file_through_a_link(tmp_path: Path, victim: Path) -> None:
    folder = export_tiny_sdxl(tmp_path / "models")
    prompts = tmp_path / "two.txt"
    prompts.write_text("a cat\na dog\n")
    names = ["evaluation.json", "report.html", "evaluation/two/per_image.json", ".stages/evaluation/two/scores.json"]
    for link in (link for name in names for link in (name, f"{name}.tmp")):
        path = folder / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
    evaluate_folder(Evaluation(folder=folder, prompts=(prompts,)), None)
    assert is_untouched(victim)
    assert not any((folder / name).is_symlink() for name in names)


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b"x"), lambda path: write_text(path, "x")])
def test_what_is_written_replaces_a_link(write: Callable[[Path], None], tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    write(link)
    assert link.read_bytes() == b"x"
    assert not link.is_symlink()
    assert is_untouched(victim)


def test_a_picture_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "x.png").symlink_to(victim)
    write_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "x.png")
    assert is_untouched(victim)


def test_a_write_that_fails_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    with pytest.raises(TypeError), new_file(tmp_path / "x") as file:
        file.writelines([b"after", None])  # type: ignore[list-item]
    assert files(tmp_path) == {"x": b"before"}
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as failed:
        write_text(tmp_path / "folder", "x")
    assert failed.value.filename == str(tmp_path / "folder")
    assert files(tmp_path) == {"x": b"before"}


def test_what_a_killed_process_left_is_swept_by_the_next_holder(tmp_path: Path) -> None:
    left = []
    for opened in (new_file(tmp_path / "a" / "x"), new_folder(tmp_path / "y")):
        opened.__enter__()
        left.append(opened)  # as a kill leaves it
    (tmp_path / "notes.tmp").write_text(MINE)
    assert len(list(tmp_path.rglob(".pcr-*.tmp"))) == 2
    sweep(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "notes.tmp"}
