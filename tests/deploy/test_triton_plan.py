"""The graph that Triton's plans are built from computes what TensorRT's dialect computes, with a timestep of [1]."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from deploy.conftest import ExportedFolder
from engines.small_qdq import save_small_graph

from pcr_export.deploy.triton_config import read_config, triton_ports
from pcr_export.deploy.triton_plan import find_plans, plan_onnx, write_plan_onnx
from pcr_export.deploy.triton_repository import check_triton_repository, write_triton_repository
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.errors import PcrExportError


def test_same_outputs_from_the_same_weights(tmp_path: Path) -> None:
    source = save_small_graph(tensorrt_onnx(tmp_path))
    write_plan_onnx(tmp_path)
    path = plan_onnx(tmp_path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx_data", "triton.onnx"]
    assert triton_ports(path)[0]["timestep"] == ("TYPE_FP32", (1,))
    onnx.checker.check_model(path)
    sample = np.random.default_rng(0).standard_normal((2, 32, 4, 4), np.float32)
    (expected,) = onnxruntime.InferenceSession(source).run(
        None, {"sample": sample, "timestep": np.array(0.5, np.float32)}
    )
    feed = {"sample": sample, "timestep": np.full(1, 0.5, np.float32)}
    (output,) = onnxruntime.InferenceSession(path).run(None, feed)
    np.testing.assert_array_equal(output, expected)
    assert np.abs(output).max() > 0


def test_written_again_the_same(tmp_path: Path) -> None:
    save_small_graph(tensorrt_onnx(tmp_path))
    write_plan_onnx(tmp_path)
    before = plan_onnx(tmp_path).read_bytes()
    write_plan_onnx(tmp_path)
    assert plan_onnx(tmp_path).read_bytes() == before


def test_plans_by_compute_capability(tmp_path: Path) -> None:
    assert find_plans(tmp_path) == {}
    for name in ("sm89.plan", "sm120.plan", "sm86.txt"):
        (tmp_path / name).touch()
    assert find_plans(tmp_path) == {"12.0": "sm120.plan", "8.9": "sm89.plan"}
    (tmp_path / "mine.plan").touch()
    with pytest.raises(PcrExportError, match=r"mine is no target: write sm86"):
        find_plans(tmp_path)


def test_a_plan_is_served_in_place_of_the_onnx(sdxl: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "exported"))
    save_small_graph(tensorrt_onnx(folder))
    write_triton_repository(folder)
    path = folder / "triton" / "unet" / "config.pbtxt"
    assert read_config(path).backend == "onnxruntime"
    (folder / "triton" / "unet" / "1" / "sm89.plan").touch()
    with pytest.raises(PcrExportError, match="triton/unet: backend is onnxruntime, the model's is tensorrt"):
        check_triton_repository(folder)
    write_triton_repository(folder)
    config = read_config(path)
    assert 'platform: "tensorrt_plan"' in path.read_text("utf-8")
    assert config.plans == {"8.9": "sm89.plan"}
    assert config.inputs == {"sample": ("TYPE_FP32", (-1, 32, -1, -1)), "timestep": ("TYPE_FP32", (1,))}
    assert not config.cpu
