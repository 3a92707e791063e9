"""A pipeline whose networks are calls of other models gives the image of the folder's own sessions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
from deploy.conftest import ExportedFolder

from pcr_export.deploy.run import generate
from pcr_export.deploy.triton_config import read_config
from pcr_export.deploy.triton_repository import write_triton_repository
from pcr_export.deploy.triton_requests import Picture, load_served_model, paint_requests

TYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}


def test_calls_fit_the_configs_and_give_the_same_image(sdxl: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "exported"))
    write_triton_repository(folder)
    called = []

    def call(name: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """What a server does: it holds the inputs to config.pbtxt, and hands its model a scalar where that has one."""
        called.append(name)
        home = folder / "triton" / name
        config = read_config(home / "config.pbtxt")
        assert list(outputs) == list(config.outputs)
        for port, array in inputs.items():
            kind, dims = config.inputs[port]
            assert array.dtype == TYPES[kind]
            assert all(dim in (-1, size) for size, dim in zip(array.shape, dims, strict=True))
        session = onnxruntime.InferenceSession(home / "1" / "model.onnx" / "model.onnx")
        ranks = {value.name: len(value.shape) for value in session.get_inputs()}
        feed = {port: array if ranks[port] else array.reshape(()) for port, array in inputs.items()}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    model = load_served_model(folder, {"networks": "triton"}, call)
    picture = Picture(prompt="a red star", negative_prompt="blue", seed=5, steps=2, guidance_scale=5.0)
    (images,) = paint_requests(model, [[picture]], lambda _request: False)
    expected = generate(folder, "a red star", seed=5, steps=2, guidance_scale=5.0, negative_prompt="blue")
    np.testing.assert_array_equal(images, expected[None])
    assert called.count("unet") == 2
    assert set(called) == {"unet", "text_encoder", "text_encoder_2", "vae_decoder"}
