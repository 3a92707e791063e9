"""People's files come through the hub's cache, where every file is a link: pipelines to export, and exported folders that come back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_cache import cache_of
from models.tiny_pipelines import tiny_sd

from pcr_export.cli import main
from pcr_export.deploy.inspect_folder import inspect_folder
from pcr_export.deploy.run import generate
from pcr_export.deploy.verify import verify_folder
from pcr_export.errors import PcrExportError
from pcr_export.stages import hash_file

FEW = ("--steps", "2", "--calib-size", "2", "--images", "2", "--strip-encoders")
TABLE = "simulation against FP32"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in HF_HOME/hub, and no other copy of it."""
    home = tmp_path_factory.mktemp("home") / "a cache, 'quoted' #1 é"
    source = tiny_sd(home.parent / "source")
    folder = cache_of(home / "hub", "org/tiny", source)
    shutil.rmtree(source)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pcr-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)


def test_a_hub_id_and_its_snapshot_end_with_the_table(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home = snapshot.parents[3]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pcr_export", "org/tiny", *FEW, "--out", str(tmp_path / "by id")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TABLE in done.stdout
    shutil.copytree(tmp_path / "by id", tmp_path / "by folder")  # what is the same is not done again
    run(monkeypatch, snapshot, *FEW, "--out", tmp_path / "by folder")
    assert TABLE in capsys.readouterr().out
    graphs = [tmp_path / out / "tiny-w8a8" / "unet" / "model.onnx" for out in ("by id", "by folder")]
    assert hash_file(graphs[0]) == hash_file(graphs[1])
    assert not graphs[0].is_symlink()


@pytest.fixture(scope="module")
def returned(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder as it was pushed to the hub and fetched again."""
    return cache_of(tmp_path_factory.mktemp("hub"), "org/tiny-w8a8", exported)


def test_an_exported_folder_that_comes_back_generates_the_same(exported: Path, returned: Path) -> None:
    assert (returned / "unet" / "model.onnx_data").is_symlink()
    here, there = (generate(folder, "a red star", seed=3) for folder in (exported, returned))
    assert np.array_equal(here, there)


def test_an_exported_folder_that_comes_back_is_verified(exported: Path, returned: Path) -> None:
    checks = list(verify_folder(returned))
    assert [name for name, _ in checks] == [name for name, _ in verify_folder(exported, paint=False)]
    assert inspect_folder(returned)["files"] == inspect_folder(exported)["files"]


def test_a_changed_blob_is_found(returned: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(returned.parents[1], tmp_path / "copy", symlinks=True)) / "snapshots" / returned.name
    blob = (copy / "unet" / "model.onnx_data").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(PcrExportError, match=r"unet/model.onnx_data has sha256"):
        list(verify_folder(copy))


def test_an_exported_folder_that_comes_back_is_evaluated(
    returned: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    copy = Path(shutil.copytree(returned.parents[1], tmp_path / "copy", symlinks=True)) / "snapshots" / returned.name
    run(monkeypatch, "evaluate", copy, "--images", "2", "--prompts", _prompts(tmp_path))
    assert "PSNR" in capsys.readouterr().out
    assert (copy / "evaluation.json").is_file()


def _prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a red star\na cat\n", "utf-8")
    return path
