"""One prompt and one seed through `pcr-export generate`, diffusers, optimum and Triton: the same image. Minutes: `pytest -m slow`.

PCR_EXPORT_OPTIMUM names the interpreter of an environment that has optimum-onnx 0.1.0; without it one is made, since
optimum-onnx wants transformers 4.57 and other libraries of that age. Triton: see benchmarks/local_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from PIL import Image

from benchmarks.local_triton import LocalTriton, find_triton
from pcr_export import load_pipeline
from pcr_export.recipe import Recipe, read_recipe

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
# Grey levels of 255. diffusers and Triton run the same code on the same graphs as `generate`. optimum's loop is that of another release
# of diffusers: float32 sums in another order may move an INT8 rounding. Images of different seeds are a hundred apart.
TOLERANCES = {"diffusers": 0, "triton": 0, "optimum": 2}


@pytest.fixture(scope="module")
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
    options = ["--calib-size", "4", "--no-validate", "--out", str(out)]
    options += ["--steps", "6"] if request.param in random else []
    subprocess.run([sys.executable, "-m", "pcr_export", model, *options], check=True, capture_output=True)
    return out / f"{request.param}-w8a8"


@pytest.fixture(scope="module")
def generated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, np.ndarray]:
    """What `pcr-export generate` draws, by seed: uint8 [height, width, 3]."""
    out = tmp_path_factory.mktemp("generated")
    for seed in SEEDS:
        options = ["--negative-prompt", NEGATIVE_PROMPT, "--seed", str(seed), "-o", str(out / f"{seed}.png")]
        command = [sys.executable, "-m", "pcr_export", "generate", str(folder), PROMPT, *options]
        subprocess.run(command, check=True, capture_output=True)
    return read_images(out)


@pytest.fixture
def untouched(folder: Path) -> Any:
    """Fails where the folder is not left as it was, but for the bytecode that Triton's Python keeps beside model.py."""

    def read() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    before = read()
    yield
    assert before == read()


def read_images(folder: Path) -> dict[int, np.ndarray]:
    return {seed: np.asarray(Image.open(folder / f"{seed}.png").convert("RGB")) for seed in SEEDS}


def with_diffusers(folder: Path, recipe: Recipe) -> dict[int, np.ndarray]:
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "negative_prompt": NEGATIVE_PROMPT,
        "num_inference_steps": recipe.num_inference_steps,
        "guidance_scale": recipe.guidance_scale,
        "height": recipe.height,
        "width": recipe.width,
    }
    images = {}
    for seed in SEEDS:
        (image,) = pipeline(PROMPT, generator=torch.Generator().manual_seed(seed), **settings).images
        images[seed] = np.asarray(image)
    return images


def with_optimum(folder: Path, recipe: Recipe, python: str, out: Path) -> dict[int, np.ndarray]:
    class_name = "ORTStableDiffusionXLPipeline" if "sdxl" in folder.name else "ORTStableDiffusionPipeline"
    size = (recipe.num_inference_steps, recipe.guidance_scale, recipe.height, recipe.width)
    words = [folder, class_name, PROMPT, NEGATIVE_PROMPT, *size, out, *SEEDS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("draw_with_optimum.py")
    done = subprocess.run([python, program, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return read_images(out)


def with_triton(folder: Path, packages: Path) -> dict[int, np.ndarray]:
    with LocalTriton(folder / "triton", packages) as server:
        return {seed: server.paint(PROMPT, seed=[seed], negative_prompt=[NEGATIVE_PROMPT])[0] for seed in SEEDS}


@pytest.mark.parametrize("way", TOLERANCES)
def test_it_is_the_image_of_generate(
    way: str,
    folder: Path,
    generated: dict[int, np.ndarray],
    untouched: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    recipe = read_recipe(folder)
    if way == "diffusers":
        images = with_diffusers(folder, recipe)
    elif way == "optimum":
        images = with_optimum(folder, recipe, request.getfixturevalue("optimum_python"), tmp_path)
    else:
        packages = find_triton()
        if packages is None:
            pytest.skip("no tritonserver: see benchmarks/local_triton.py for how to get one")
        images = with_triton(folder, packages)
    for seed, expected in generated.items():
        difference = np.abs(images[seed].astype(int) - expected)
        print(
            f"{folder.name}, {way}, seed {seed}: {difference.max()} grey levels, {(difference > 0).mean():.2%} of values"
        )
        assert difference.max() <= TOLERANCES[way]
    assert np.abs(images[0].astype(int) - images[1]).max() > 20  # another seed is another image
