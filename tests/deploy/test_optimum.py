"""optimum-onnx loads the folder as it is and draws the images of `pcr-export generate`. Minutes: `pytest -m slow`.

PCR_EXPORT_OPTIMUM names the interpreter of an environment that has optimum-onnx 0.1.0; without it one is made, since
optimum-onnx wants transformers 4.57 and other libraries of that age.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from PIL import Image

from pcr_export.deploy.run import generate
from pcr_export.recipe import read_recipe

pytestmark = pytest.mark.slow

PACKAGES = (
    f"torch=={torch.__version__.split('+')[0]}",
    "optimum-onnx==0.1.0",
    "transformers==4.57.*",
    "huggingface_hub<1",
    "diffusers>=0.35",
    "onnxruntime",
    "accelerate",
    "pillow",
)
PROMPT, NEGATIVE_PROMPT = "a red circle above a blue square", "green"
SEEDS = (0, 1, 2)
# Noise, text and every ONNX graph are the same, the loop is that of another release of diffusers. Two grey levels of 255, for
# float32 sums in another order, which an INT8 rounding may carry on; the images of different seeds are a hundred apart.
TOLERANCE = 2


@pytest.fixture(scope="session")
def optimum_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("PCR_EXPORT_OPTIMUM")
    if named:
        return named
    folder = tmp_path_factory.mktemp("optimum")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for packages in (PACKAGES[:1], PACKAGES):
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"optimum-onnx can't be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module", params=["tiny-sdxl", "random-sdxl", "random-sd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    random = {"random-sdxl": tiny_sdxl, "random-sd": tiny_sd}
    model = str(random[request.param](out / request.param)) if request.param in random else request.param
    options = ["--calib-size", "4", "--no-validate", "--out", str(out)] + (
        ["--steps", "6"] if request.param in random else []
    )
    subprocess.run([sys.executable, "-m", "pcr_export", model, *options], check=True, capture_output=True)
    return out / f"{request.param}-w8a8"


def test_optimum_draws_what_generate_draws(folder: Path, optimum_python: str, tmp_path: Path) -> None:
    recipe = read_recipe(folder)
    class_name = "ORTStableDiffusionXLPipeline" if "sdxl" in folder.name else "ORTStableDiffusionPipeline"
    size = (recipe.num_inference_steps, recipe.guidance_scale, recipe.height, recipe.width)
    words = [folder, class_name, PROMPT, NEGATIVE_PROMPT, *size, tmp_path, *SEEDS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("draw_with_optimum.py")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = subprocess.run([optimum_python, program, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for seed in SEEDS:
        expected = generate(folder, PROMPT, seed=seed, negative_prompt=NEGATIVE_PROMPT).astype(int)
        found = np.asarray(Image.open(tmp_path / f"{seed}.png").convert("RGB")).astype(int)
        difference = np.abs(found - expected)
        print(
            f"{folder.name}, seed {seed}: {difference.max()} grey levels at most, {(difference > 0).mean():.2%} of the values"
        )
        assert difference.max() <= TOLERANCE
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # nothing was added
