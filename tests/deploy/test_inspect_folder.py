"""What `inspect` says of an exported folder, without torch, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pcr_export.deploy.inspect_folder import inspect_folder, scale_groups
from pcr_export.errors import PcrExportError
from pcr_export.manifest import write_manifest
from pcr_export.stages import hash_file
from pcr_export.step_scales import StepScales, read_step_scales
from pcr_export.write_files import write_json


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_facts_are_those_of_the_files(exported: Path) -> None:
    facts, report = inspect_folder(exported), json.loads((exported / "report.json").read_text())
    assert facts["pipeline"] == "StableDiffusionXLPipeline"
    assert facts["layers"] == report["sites"]
    assert facts["versions"] == report["environment"]
    assert facts["float"] == {f"skipped by name ({name})": [name] for name in ("conv_in", "conv_out")}
    assert sum(facts["weights"]["layers_by_bits"].values()) == len(report["sites"])
    assert facts["activations"] == {"bits": [8, 8, 8, 10], "mean_bits": 8.5, "relaxed_steps": [3]}
    assert facts["files"]["unet/model.onnx"]["sha256"] == hash_file(exported / "unet" / "model.onnx")
    assert facts["parts"]["unet"] == sum(
        path.stat().st_size for path in (exported / "unet").rglob("*") if path.is_file() and path.suffix != ".txt"
    )
    cpu, engine = facts["engines"]
    assert (cpu["backend"], engine["backend"], engine["target"]) == ("onnxruntime", "tensorrt-rtx", "sm89")
    assert engine["engine_bytes"] == (exported / "unet" / "sm89.engine").stat().st_size
    assert engine["activation_bytes"] > 0
    assert (engine["int8_layers"], engine["float_layers"]) == (facts["weights"]["layers_by_bits"]["w8a8"], {})


def test_scales_by_part_of_the_network(exported: Path) -> None:
    scales = read_step_scales(exported / "step_scales.safetensors")
    groups = {group["name"]: group for group in inspect_folder(exported)["scales"]["groups"]}
    assert sum(group["sites"] for group in groups.values()) == len(scales.sites)
    index = scales.sites.index("up_blocks.0.upsamplers.0.conv")
    expected = np.log2(scales.scale[:, index]) - np.log2(scales.scale[:, index]).mean()
    np.testing.assert_allclose(groups["up.0.upsamplers"]["log2"], expected, atol=1e-4)  # written with four digits


def test_many_parts_are_joined_to_blocks() -> None:
    sites = tuple(f"down_blocks.{block}.part{part}.conv" for block in range(4) for part in range(20))
    scales = StepScales(
        scale=np.full((2, 80), 0.5, np.float32),
        zero_point=np.full((2, 80), 128, np.uint8),
        bits=np.array([8, 8], np.uint8),
        timesteps=np.array([2, 1], np.float32),
        sites=sites,
        layers={},
    )
    assert [(group["name"], group["sites"]) for group in scale_groups(scales)] == [(f"down.{i}", 20) for i in range(4)]


def test_the_command_prints_it_within_80_columns_and_without_torch(exported: Path) -> None:
    code = "import sys; from pcr_export.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    ran = [
        subprocess.run(
            [sys.executable, "-c", code, "inspect", str(exported), *options],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "80", "PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"},
        )
        for options in ([], ["--json"])
    ]
    assert [each.stderr.splitlines()[-1] for each in ran] == ["False", "False"]
    lines = ran[0].stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for words in (
        "relaxed steps │ 3 (10 bits)",
        "up.0.attentions",
        "skipped by name (conv_in)",
        "sm89",
        "unet/model.onnx",
    ):
        assert any(words in line for line in lines), words
    assert json.loads(ran[1].stdout) == inspect_folder(exported)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("report.json", "report.json is missing: copy the folder again"),
        ("step_scales.safetensors", "step_scales.safetensors is missing: copy the folder again"),
        ("unet/sm89.json", "build the engine first"),
    ],
)
def test_missing_files_are_named(name: str, expected: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(PcrExportError, match=expected):
        inspect_folder(copy)


def test_reports_that_are_none(copy: Path, tmp_path: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    for value, expected in (
        ({**report, "format": 2}, "has format 2, this version reads 1"),
        ({**report, "sites": None}, r"report.json is damaged \(Expected `array`, got `null`"),
        (
            {name: report[name] for name in report if name != "graph"},
            r"report.json is damaged \(Object missing required field `graph`",
        ),
    ):
        write_json(copy / "report.json", value)
        write_manifest(copy)
        with pytest.raises(PcrExportError, match=expected):
            inspect_folder(copy)
    with pytest.raises(PcrExportError, match="is no folder"):
        inspect_folder(tmp_path / "nowhere")
