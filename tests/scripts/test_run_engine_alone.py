"""The script for machines with TensorRT and Python alone never ran on a GPU here: that every name it uses exists is checked."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_engine_alone.py"


def missing_names(source: str, trt: ModuleType) -> set[str]:
    """The attributes of TensorRT's module and objects that `source` uses and the library does not have."""
    homes = {
        "trt": trt,
        "self.engine": trt.ICudaEngine,
        "self.context": trt.IExecutionContext,
        "self.runtime": trt.Runtime,
        "trt.Logger": trt.Logger,
        "trt.TensorIOMode": trt.TensorIOMode,
        "trt.TensorLocation": trt.TensorLocation,
    }
    used = {
        (ast.unparse(node.value), node.attr) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
    }
    return {f"{place}.{name}" for place, name in used if place in homes and not hasattr(homes[place], name)}


def test_every_name_of_tensorrt_exists() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    source = SCRIPT.read_text("utf-8")
    assert source.count("self.engine.") >= 6
    assert source.count("self.context.") >= 4
    assert missing_names(source, trt) == set()
    assert missing_names("self.context.execute_v9(); trt.Loger()", trt) == {"self.context.execute_v9", "trt.Loger"}
    wrong = "trt.TensorIOMode.IN; self.engine.tensors"
    assert missing_names(wrong, trt) == {"trt.TensorIOMode.IN", "self.engine.tensors"}


def test_it_needs_nothing_of_this_package() -> None:
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree)
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert modules == {"sys", "time", "pathlib", "typing", "numpy", "cuda.bindings", "tensorrt", "tensorrt_rtx"}
