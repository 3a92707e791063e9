"""What all tests share: an exported folder, and how pytest's workers (`-n`, by file) share the machine."""

import os
from pathlib import Path

import pytest
from exported_tiny_sdxl import export_tiny_sdxl
from shared_folder import make_once


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported random pipeline with images and an engine, to read only."""
    return make_once(tmp_path_factory, "exported", export_tiny_sdxl) / "engines" / "random-w8a8"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core that this process may use; pytest-xdist would count those of the machine."""
    return len(os.sched_getaffinity(0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """One thread for each worker and for each program that it starts: they share the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
