"""A random SDXL pipeline with a CLIP of its own, exported within seconds: what an evaluation needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from models.tiny_pipelines import POOLED, tiny_sdxl
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pcr_export.models.catalog import REFERENCE_MODEL

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZE = 16  # pixels a side


def export_tiny_sdxl(parent: Path) -> Path:
    """Write the model to parent/models and its export to parent/engines; the export's folder."""
    source = tiny_sdxl(parent / "models" / "random")
    add_clip(source / "clip_vision")
    return export_from(source, parent / "engines")


def export_from(source: Path, out: Path, *options: str) -> Path:
    """Export a model of 16x16 pictures to out/NAME-w8a8, with two images, an engine and one relaxed step of four."""
    settings = {"steps": 4, "calib-size": 4, "images": 2, "height": SIZE, "width": SIZE, "relax": "last:25%"}
    settings |= {"backend": "tensorrt-rtx", "target": "sm89", "out": out}
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "pcr_export", str(source), *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    (out / "terminal.txt").write_text(done.stdout, "utf-8")  # what the command showed
    return out / f"{source.name}-w8a8"


def add_clip(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=4,
            projection_dim=POOLED,
        )
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
    shutil.copy(REFERENCE_MODEL / "clip_vision" / "preprocessor_config.json", folder)
