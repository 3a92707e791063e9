"""A folder whose export has not ended, or that holds a file of another export: every reader refuses it with one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pcr_export import cli
from pcr_export.deploy.inspect_folder import inspect_folder
from pcr_export.deploy.pipeline import load_pipeline
from pcr_export.deploy.run import generate
from pcr_export.deploy.triton_requests import load_served_model
from pcr_export.deploy.verify import verify_folder
from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import lock_file
from pcr_export.manifest import NAME, check_finished
from pcr_export.qdiffbench.evaluate import Evaluation

READERS: dict[str, Callable[[Path], object]] = {
    "generate": lambda folder: generate(folder, "a cat"),
    "load_pipeline": load_pipeline,
    "inspect": inspect_folder,
    "evaluate": lambda folder: Evaluation(folder=folder).domains(),
    "Triton": lambda folder: load_served_model(folder, {}, lambda *_arguments: {}),
    "compare": lambda folder: cli.compare(folder, target=None, runs=1, verbose=False),
    "verify": lambda folder: list(verify_folder(folder, paint=False)),
}


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy", symlinks=True))


@pytest.mark.parametrize("reader", READERS)
def test_an_export_that_was_killed_is_named_with_its_command(reader: str, copy: Path) -> None:
    (copy / NAME).unlink()
    lock_file(copy).write_text("4711 pcr-export tiny-sdxl --bits w8a8\n")
    with pytest.raises(PcrExportError, match=r"not finished .*: run `pcr-export tiny-sdxl --bits w8a8` again, or wait"):
        READERS[reader](copy)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["step_scales.safetensors", "unet/model.onnx", "scheduler/scheduler_config.json"])
def test_a_small_file_of_another_export_is_named(name: str, reader: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(PcrExportError, match=f"{name} has sha256 .*: copy the folder again"):
        READERS[reader](copy)


def test_a_large_file_of_another_size_is_named(copy: Path) -> None:
    with (copy / "unet" / "model.onnx_data").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PcrExportError, match=r"unet/model.onnx_data has [0-9]+ bytes, not [0-9]+: copy"):
        check_finished(copy)


def test_what_people_change_for_a_deployment_is_no_matter(copy: Path) -> None:
    config = copy / "triton" / "pipeline" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 2"))
    (copy / "unet" / "sm89.engine").unlink()
    shutil.rmtree(copy / "images")
    check_finished(copy)


def test_a_folder_that_is_no_export_is_called_none(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="is no exported folder: make one with `pcr-export MODEL`"):
        check_finished(tmp_path)
