"""config.pbtxt says what the model's signature says, in the text format that Triton reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import onnx.parser
import pytest
from deploy.conftest import TOY_UNET, ExportedFolder

from pcr_export.deploy.triton_config import ModelConfig, differences, read_config, triton_ports, write_config
from pcr_export.errors import PcrExportError


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    onnx.save(onnx.parser.parse_model(TOY_UNET), tmp_path / "model.onnx")
    inputs, outputs = triton_ports(tmp_path / "model.onnx")
    return ModelConfig(name="unet", backend="onnxruntime", max_batch_size=0, inputs=inputs, outputs=outputs)


def test_ports_of_a_unet(config: ModelConfig) -> None:
    assert config.inputs == {
        "sample": ("TYPE_FP32", (-1, 4, -1, -1)),
        "timestep": ("TYPE_FP32", (1,)),  # rank 0 in the model
        "encoder_hidden_states": ("TYPE_FP32", (-1, -1, 32)),
        "timestep_cond": ("TYPE_FP32", (-1, 24)),
    }
    assert config.outputs == {"out_sample": ("TYPE_FP32", (-1, 4, -1, -1))}


def test_ports_of_a_text_encoder(sdxl: ExportedFolder) -> None:
    inputs, outputs = triton_ports(sdxl.folder / "text_encoder_2" / "model.onnx")
    assert inputs == {"input_ids": ("TYPE_INT64", (-1, 16))}
    assert outputs["text_embeds"] == ("TYPE_FP32", (-1, 32))


def test_text_is_tritons(config: ModelConfig, tmp_path: Path) -> None:
    write_config(tmp_path / "config.pbtxt", replace(config, inputs={"t": ("TYPE_FP32", (1,))}, outputs={}), "a note")
    expected = """\
# a note
name: "unet"
backend: "onnxruntime"
max_batch_size: 0
input {
  name: "t"
  data_type: TYPE_FP32
  dims: [1]
}
"""
    assert (tmp_path / "config.pbtxt").read_text("utf-8") == expected


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "python"])
def test_what_is_written_is_read(config: ModelConfig, tmp_path: Path, backend: str) -> None:
    written = replace(
        config,
        backend=backend,
        max_batch_size=4,
        optional=frozenset({"timestep"}),
        cpu=True,
        dynamic_batching=True,
        max_queue_size=7,
        plans={"8.9": "sm89.plan"},
        parameters={"threads": "2"},
    )
    write_config(tmp_path / "config.pbtxt", written)
    assert read_config(tmp_path / "config.pbtxt") == written


def test_what_a_user_adds_is_passed_over(config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    write_config(path, config)
    path.write_text(path.read_text("utf-8") + "version_policy { latest { num_versions: 1 } }\n", "utf-8")
    assert read_config(path) == config


def test_the_queue_is_bounded_in_tritons_words_and_the_users_to_change(config: ModelConfig, tmp_path: Path) -> None:
    path, batched = tmp_path / "config.pbtxt", replace(config, dynamic_batching=True, max_queue_size=7)
    write_config(path, batched)
    text = path.read_text("utf-8")
    assert "dynamic_batching {\n  default_queue_policy {\n    max_queue_size: 7\n  }\n}\n" in text
    timed = "max_queue_size: 9 timeout_action: DELAY default_timeout_microseconds: 5"
    path.write_text(text.replace("max_queue_size: 7", timed), "utf-8")
    assert read_config(path) == replace(batched, max_queue_size=9)
    assert differences(read_config(path), batched) == []


def test_every_difference_is_named(config: ModelConfig) -> None:
    ports = {**config.inputs, "sample": ("TYPE_FP16", (-1, 4, -1, -1)), "extra": ("TYPE_FP32", (1,))}
    del ports["timestep_cond"]
    found = replace(config, backend="python", inputs=ports, outputs={"out_sample": ("TYPE_FP32", (-1, 4, 8, 8))})
    assert differences(found, config) == [
        "backend is python, the model's is onnxruntime",
        "input extra is TYPE_FP32 [1], the model's is absent",
        "input sample is TYPE_FP16 [-1, 4, -1, -1], the model's is TYPE_FP32 [-1, 4, -1, -1]",
        "input timestep_cond is absent, the model's is TYPE_FP32 [-1, 24]",
        "output out_sample is TYPE_FP32 [-1, 4, 8, 8], the model's is TYPE_FP32 [-1, 4, -1, -1]",
    ]
    assert differences(config, config) == []


@pytest.mark.parametrize(
    "text",
    [
        "name: ",
        "input { dims: -1 ",
        "input { data_type: TYPE_FP33 }",
        "name: 3",
        "dynamic_batching { default_queue_policy { max_queue_size: -1 } }",
    ],
)
def test_text_that_triton_would_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.pbtxt").write_text(text, "utf-8")
    with pytest.raises(PcrExportError, match=r"is no config\.pbtxt .*: export again"):
        read_config(tmp_path / "config.pbtxt")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b"\xff\xfe")
    with pytest.raises(PcrExportError, match="can't be read"):
        read_config(tmp_path / "config.pbtxt")


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="is missing: export the model again"):
        triton_ports(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(PcrExportError, match="is no ONNX file"):
        triton_ports(tmp_path / "model.onnx")
