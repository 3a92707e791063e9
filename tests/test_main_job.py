"""The main job on the trained reference model, as a user runs it. Minutes: `pytest -m slow`."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcr_export.deploy.triton_repository import check_triton_repository

pytestmark = pytest.mark.slow

NAME = "tiny-sdxl-w8a8"
FILES = (
    "step_scales.safetensors",
    "recipe.json",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "vae_decoder/model.onnx_data",
)


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pcr_export", "tiny-sdxl", "--bits", "w8a8", "--out", str(out), *options]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    start = time.monotonic()
    subprocess.run(command(out), check=True, capture_output=True)
    assert time.monotonic() - start < 600  # the promise of the README, not a speed test
    return out / NAME


def test_report_holds_up(exported):
    report = json.loads((exported / "report.json").read_text())
    assert report["calibration"] | {"prompts": 64, "steps": 20, "unet_batches": 4 * 39} == report["calibration"]
    assert report["fidelity"]["artifact_vs_simulation_sqnr_db"] > 40
    quality = report["quality"]
    assert quality["n_images"] == 128
    assert quality["psnr_db"] > 35
    assert abs(quality["clip_score"] - quality["clip_score_fp32"]) < 1
    assert "biased" in quality["warning"]
    assert sum(site["quantized"] for site in report["sites"]) > 150


def test_triton_repository_fits(exported):
    check_triton_repository(exported)
    assert (exported / "triton" / "pipeline" / "config.pbtxt").is_file()


def test_killed_twice_it_ends_with_the_same_bytes(exported, tmp_path):
    states = tmp_path / NAME / ".stages" / "calibration"
    for call in (2, 11):
        process = subprocess.Popen(
            command(tmp_path, "--no-validate"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (states / f"call_{call:05d}.safetensors").exists():
            assert process.poll() is None, "the export ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path, "--no-validate"), check=True, capture_output=True)
    for name in FILES:
        assert (tmp_path / NAME / name).read_bytes() == (exported / name).read_bytes(), name


def test_picture_from_the_folder_alone(exported, tmp_path):
    picture = tmp_path / "out.png"
    prompt = "a red circle above a blue square"
    arguments = ["generate", str(exported), prompt, "--seed", "1", "-o", str(picture)]
    subprocess.run([sys.executable, "-m", "pcr_export", *arguments], check=True, capture_output=True)
    assert Image.open(picture).size == (64, 64)


def test_the_readme_draws_the_same_picture_in_diffusers(exported, tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_pipeline(" in each]
    (tmp_path / "engines").symlink_to(exported.parent)
    program = f"{block}\nimage.save('diffusers.png'); redrawn.save('redrawn.png')\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stderr.count("ScheduleWarning: timestep") == 1
    arguments = ["generate", str(exported), "a red circle above a blue square", "--seed", "1", "-o", "generate.png"]
    subprocess.run([sys.executable, "-m", "pcr_export", *arguments], cwd=tmp_path, check=True, capture_output=True)
    pictures = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("diffusers", "generate", "redrawn")}
    assert np.array_equal(pictures["diffusers"], pictures["generate"])
    assert pictures["redrawn"].shape == (64, 64, 3)
    assert not np.array_equal(pictures["redrawn"], pictures["diffusers"])


def test_engines_for_three_gpus_are_int8_site_by_site(exported):
    """On top of the export: nothing is calibrated again."""
    options = ("--backend", "tensorrt-rtx", "--target", "sm86,sm89,sm120", "--no-validate")
    subprocess.run(command(exported.parent, *options), check=True, capture_output=True)
    report = json.loads((exported / "report.json").read_text())
    layers = {site["name"] for site in report["sites"] if site["quantized"]}
    for target in ("sm86", "sm89", "sm120"):
        record = json.loads((exported / "unet" / f"{target}.json").read_text())
        assert record["sites"] == dict.fromkeys(layers, "int8")
    assert [engine["target"] for engine in report["engines"]] == ["sm86", "sm89", "sm120"]
