"""The command line on small random pipelines: the whole job, its refusals, and a run killed in the middle."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models.small_lora import random_updates, save_as_diffusers
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from PIL import Image

from pcr_export.cli import main
from pcr_export.manifest import write_manifest
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_float_pipeline

SMALL = ("--steps", "4", "--calib-size", "4", "--images", "3", "--height", "16", "--width", "16")


def run(monkeypatch, *arguments) -> int:
    """Run the program in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["pcr-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line of a run that is refused, beside warnings of prompts that are too long for a tiny model."""
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "random-sdxl")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["sdxl", pytest.param("sd", marks=pytest.mark.slow)])
def finished(request, tmp_path, monkeypatch, capsys):
    """A folder that the whole job wrote, and what the terminal showed. That of SDXL is everybody's."""
    if request.param == "sdxl":
        folder = request.getfixturevalue("exported")
        return folder, (folder.parent / "terminal.txt").read_text("utf-8")
    assert run(monkeypatch, tiny_sd(tmp_path / "random"), "--out", tmp_path, *SMALL) == 0
    return tmp_path / "random-w8a8", capsys.readouterr().out


def test_the_main_job(finished, tmp_path, monkeypatch, capsys):
    folder, shown = finished
    capsys.readouterr()  # of writing the model, where this test is the first that needs it
    report = json.loads((folder / "report.json").read_text())
    assert report["quality"]["psnr_db"] > 15
    assert min(value or 99 for value in report["fidelity"]["per_step"]) > 30  # flips at rounding boundaries, no more
    assert "PSNR to FP32" in shown
    assert "<h1" in (folder / "report.html").read_text("utf-8")
    painted = sorted(path.name for path in (folder / "images" / "int8").glob("*.png"))
    assert painted == ["00000.png", "00001.png", "00002.png"][: report["quality"]["n_images"]]
    picture = tmp_path / "picture.png"
    assert run(monkeypatch, "generate", folder, "a cat", "--seed", "1", "-o", picture) == 0
    assert Image.open(picture).size == (16, 16)
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, "generate", folder, "a cat", "--steps", "3", "-o", picture) == 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: timestep ")


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.slow
def test_a_lora_is_fused_and_kept_in_the_recipe(sdxl_folder, tmp_path, monkeypatch, capsys):
    lora = tmp_path / "style.safetensors"
    save_as_diffusers(random_updates(load_float_pipeline(resolve(str(sdxl_folder)))), lora)
    options = ("--steps", "2", "--calib-size", "2", "--no-validate", "--out", tmp_path)
    assert run(monkeypatch, sdxl_folder, *options, "--lora", f"{lora}:0.5") == 0
    folder = tmp_path / "random-sdxl-w8a8"
    written = json.loads((folder / "recipe.json").read_text())["lora"]
    assert [each["name"] for each in written] == ["style.safetensors"]
    assert [each["scale"] for each in written] == [0.5]
    parts = ("unet", "text_encoder", "text_encoder_2", "vae_decoder")
    with_lora = {name: (folder / name / "model.onnx_data").read_bytes() for name in parts}
    assert run(monkeypatch, sdxl_folder, *options) == 0  # everything that depends on it is made again
    changed = {name for name, data in with_lora.items() if (folder / name / "model.onnx_data").read_bytes() != data}
    assert changed == {"unet", "text_encoder", "text_encoder_2"}


def test_dry_run_writes_nothing(sdxl_folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, sdxl_folder, "--out", tmp_path, "--dry-run") == 0
    assert "plan" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_help_answers_within_a_second():
    before = os.times()
    subprocess.run([sys.executable, "-m", "pcr_export", "--help"], check=True, capture_output=True)
    after = os.times()  # of the processor: on a busy machine it waits for its turn
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 5  # a second on an idle machine; the imports are held by test_architecture


def test_unknown_model(monkeypatch, capsys):
    assert "tiny-sdxl" in refused(monkeypatch, capsys, "tiny-sdlx")


def test_hub_out_of_reach(offline, monkeypatch, capsys, tmp_path):
    line = refused(monkeypatch, capsys, "nobody/no-such-model", "--out", tmp_path)
    assert "nobody/no-such-model" in line
    assert "hf download" in line


def test_folder_without_a_pipeline(tmp_path, monkeypatch, capsys):
    assert "model_index.json" in refused(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--bits", "w3a3", "use w8a8"),
        ("--bits", "int8", "as w8a8"),
        ("--ranges", "max", "choose one of"),
        ("--relax", "middle", "first:20%"),
        ("--calib-size", "0", "--calib-size must be at least 1"),
        ("--images", "1", "--no-validate"),
        ("--steps", "0", "steps"),
        ("--height", "13", "multiples"),
        ("--height", "16:8:32", "MIN <= OPT <= MAX"),
        ("--batch", "0", "--batch must be at least 1"),
        ("--backend", "trt", "choose one of onnxruntime, tensorrt-rtx, tensorrt"),
        ("--backend", "tensorrt", "build on another machine with the trtexec line"),
        ("--backend", "tensorrt-rtx", "name the GPUs, --target sm"),
        ("--lora", "nowhere.safetensors:0.5", "is no file: write FILE or FILE:SCALE"),
        ("--target", "sm89", "say --backend tensorrt-rtx"),
        ("--calib-batch", "2", "needs --reduce min-mean"),
    ],
)
def test_bad_settings(option, value, expected, sdxl_folder, tmp_path, monkeypatch, capsys):
    assert expected in refused(monkeypatch, capsys, sdxl_folder, "--out", tmp_path, option, value)


@pytest.mark.parametrize(
    ("target", "expected"), [("sm75", "name sm86 or newer"), ("sm86,sm90", "does not build for sm90"), ("rtx", "rtx")]
)
def test_targets_that_can_not_be_built_for(target, expected, sdxl_folder, tmp_path, monkeypatch, capsys):
    options = ("--backend", "tensorrt-rtx", "--target", target)
    assert expected in refused(monkeypatch, capsys, sdxl_folder, "--out", tmp_path, *options)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_size_between_two_latents(sdxl_folder, tmp_path, monkeypatch, capsys):
    options = ("--backend", "tensorrt-rtx", "--target", "sm89", "--height", "15:16:16", "--width", "16", "--steps", "4")
    assert "use multiples of" in refused(monkeypatch, capsys, sdxl_folder, "--out", tmp_path, *options)
    assert not (tmp_path / "random-sdxl-w8a8" / "step_scales.safetensors").exists()  # before the calibration


def test_a_folder_without_engines(tmp_path, monkeypatch, capsys):
    assert "is no exported folder" in refused(monkeypatch, capsys, "compare", tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    write_manifest(tmp_path)
    assert "export again with --backend tensorrt-rtx" in refused(monkeypatch, capsys, "compare", tmp_path)


@pytest.mark.slow
def test_an_engine_of_a_pipeline(sdxl_folder, tmp_path, monkeypatch, capsys):
    options = ("--backend", "tensorrt-rtx", "--target", "sm89", "--relax", "first:25%", "--no-validate")
    assert run(monkeypatch, sdxl_folder, "--out", tmp_path, *SMALL, *options) == 0
    assert "built, not run" in capsys.readouterr().out
    folder = tmp_path / "random-sdxl-w8a8"
    report = json.loads((folder / "report.json").read_text())
    (engine,) = report["engines"]
    assert engine["int8_layers"] == sum(site["quantized"] for site in report["sites"])
    assert engine["axes"]["batch"] == [2, 2, 2]  # guidance doubles the image
    assert run(monkeypatch, "compare", folder) == 0
    assert "no GPU here" in capsys.readouterr().out
    line = refused(monkeypatch, capsys, "generate", folder, "a cat", "--engine", "sm89", "-o", tmp_path / "out.png")
    assert "no CUDA GPU here" in line


def test_unwritable_out(sdxl_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert "choose another folder" in refused(monkeypatch, capsys, sdxl_folder, "--out", tmp_path / "file")


def test_empty_prompts_file(sdxl_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").touch()
    line = refused(monkeypatch, capsys, sdxl_folder, "--out", tmp_path, "--prompts-file", tmp_path / "prompts.txt")
    assert "holds no prompt" in line


def test_folder_that_is_no_export(sdxl_folder, monkeypatch, capsys):
    assert "no exported folder" in refused(monkeypatch, capsys, "generate", sdxl_folder, "a cat")


def command(source: Path, out: Path) -> list[str]:
    options = [
        "--steps",
        "6",
        "--calib-size",
        "16",
        "--height",
        "16",
        "--width",
        "16",
        "--no-validate",
    ]
    return [sys.executable, "-m", "pcr_export", str(source), "--out", str(out), *options]


@pytest.mark.slow
def test_killed_in_mid_calibration_resumes_with_the_same_bytes(sdxl_folder, tmp_path, monkeypatch, capsys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(sdxl_folder, tmp_path / "whole"), check=True, capture_output=True, env=environment)
    killed, whole = (tmp_path / name / "random-sdxl-w8a8" for name in ("killed", "whole"))
    process = subprocess.Popen(
        command(sdxl_folder, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    states = killed / ".stages" / "calibration"
    while not (states / "call_00001.safetensors").exists():
        assert process.poll() is None, "the export ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "step_scales.safetensors").exists()
    damaged = states / "call_00000.safetensors"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:50])
    assert "--no-resume" in refused(monkeypatch, capsys, *command(sdxl_folder, tmp_path / "killed")[3:])
    damaged.write_bytes(good)
    subprocess.run(command(sdxl_folder, tmp_path / "killed"), check=True, capture_output=True, env=environment)
    for name in ("step_scales.safetensors", "unet/model.onnx", "unet/model.onnx_data", "text_encoder/model.onnx"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_killed_in_mid_rounding_resumes_with_the_same_bytes(sdxl_folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--bits", "w4a8", "--weights", "adaround", "--adaround-iterations", "40", "--keep", "2"]
    for name in ("whole", "killed"):
        process = subprocess.Popen(
            [*command(sdxl_folder, tmp_path / name), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        learned = tmp_path / name / "random-sdxl-w4a8" / ".stages" / "weights" / "round_0"
        while name == "killed" and not (learned / "block_00003.safetensors").exists():
            assert process.poll() is None, "the export ended before it could be killed"
            time.sleep(0.002)
        if name == "killed":
            process.send_signal(signal.SIGKILL)
        process.wait()
    killed, whole = (tmp_path / name / "random-sdxl-w4a8" for name in ("killed", "whole"))
    assert not (killed / "step_scales.safetensors").exists()
    subprocess.run(
        [*command(sdxl_folder, tmp_path / "killed"), *options], check=True, capture_output=True, env=environment
    )
    for name in ("step_scales.safetensors", "unet/model.onnx", "unet/model.onnx_data"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
