"""What all tests share: an exported folder, and how pytest's workers (`-n`, by file) share the machine."""

import os
from pathlib import Path

import pytest
from shared_folder import make_once

LONGEST_FIRST = (  # the first two export what others share; a long file at the end would leave one worker alone with it
    "deploy/test_exported_graphs.py",
    "deploy/test_folder.py",
    "test_hub_cache.py",
    "graph/test_quantize.py",
    "deploy/test_pipeline.py",
    "test_cli.py",
    "graph/test_to_onnx.py",
    "graph/test_tensorrt_dialect.py",
    "test_export.py",
    "test_bad_days_cache.py",
    "test_bad_days_disk.py",
    "test_export_engines.py",
    "qdiffbench/test_evaluate.py",
    "deploy/test_run.py",
    "engines/test_compare.py",
)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported random pipeline with images and an engine, to read only."""
    from exported_tiny_sdxl import export_tiny_sdxl  # torch: the process that only starts workers needs none

    return make_once(tmp_path_factory, "exported", export_tiny_sdxl) / "engines" / "random-w8a8"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take the files in this order."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core that this process may use, where it has 2 GiB; pytest-xdist would count the cores of the machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """One thread for each worker and for each program that it starts: they share the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
