"""The graphs that `relaxed_forms.py` builds: one network, one table of scales, written in each form, and run to see that they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from diffusers import UNet2DConditionModel
from random_unets import write_random_unet
from relaxed_form_passes import LENGTH_APART, NORMAL, PLANES, RELAXED, TWO_PROFILES, WHOLE_IF, register_forms
from sdxl_full_size import RELAXED as RELAXED_TABLE
from sdxl_full_size import denoiser_of, example_of, scale_tables
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_export.calibrate.layers import find_layers
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.recipe import SKIPPED_BY_DEFAULT
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

SHIPPED = "tensorrt"
EVERY_NTH = 5  # of the 50 steps of the full-size benchmark: 10 are left, 2 of them relaxed
DATA = ("sample", "encoder_hidden_states")  # inputs in float16
MARGIN_DB = 3.0  # two draws of the same rounding noise differ by less than 1 dB here
SMALL: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 256,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 320,
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to hold both kinds of steps."""

    title: str
    dialect: str = SHIPPED
    scales: str = RELAXED  # which of `tables`


FORMS = {
    "none": Form(title="no relaxed step", scales=NORMAL),
    "length": Form(title="length of a vector (shipped)"),
    "apart": Form(title="the same, step apart from the length", dialect=LENGTH_APART),
    "profiles": Form(title="two profiles, one more input", dialect=TWO_PROFILES),
    "if": Form(title="If around the network", dialect=WHOLE_IF),
    "static": Form(title="static scales", scales="static"),
}


def tables(layers: list[Layer], seed: int) -> dict[str, StepScales]:
    """Made-up scales of 10 steps: the first two at 10 bit; the same at 8 bit throughout; the last step's alone."""
    full = scale_tables(layers, "first:20%", seed)[RELAXED_TABLE]

    def rows(which: slice) -> StepScales:
        columns = ("scale", "zero_point", "bits", "timesteps")
        return replace(full, **{name: getattr(full, name)[which] for name in columns})

    relaxed = rows(slice(None, None, EVERY_NTH))
    last = rows(slice(-EVERY_NTH, None, EVERY_NTH))
    return {RELAXED: relaxed, NORMAL: replace(relaxed, bits=np.full_like(relaxed.bits, 8)), "static": last}


def export(model: str, folder: Path, names: Sequence[str], seed: int) -> list[str]:
    """Trace the network once and write each form's graph; the quantized layers."""
    register_forms()
    torch.manual_seed(seed)
    if model == "small":
        network = UNet2DConditionModel(**SMALL).eval()
    else:
        write_random_unet(model, folder / "unet", seed)
        network = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
    denoiser, example = denoiser_of(network.requires_grad_(False)), example_of(network.config)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # no weight is read
        layers = find_layers(denoiser, {k: fake.from_tensor(x) for k, x in example.items()}, SKIPPED_BY_DEFAULT)
    float_model, scales = trace_float_onnx(denoiser, example), tables(layers, seed)
    for name in names:
        form = FORMS[name]
        quantize_onnx(float_model, scales[form.scales], layers, graph_path(folder, name), dialect=form.dialect)
    return [layer.name for layer in layers if layer.site]


def graph_path(folder: Path, name: str) -> Path:
    """Where a form's graph goes."""
    return folder / "forms" / name / "model.onnx"


def compare(folder: Path, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Run every form on onnxruntime at a relaxed and at an 8-bit step; how far each is from the shipped one.

    Rounding that flips in one layer flips more in the next, so forms are held to what float16's rounding of the inputs does to
    the shipped form. A form without relaxed steps is held at the 8-bit step alone; at the relaxed one it shows what would be missed.
    Raises RuntimeError where a form differs by more.
    """
    torch.manual_seed(seed)
    feed = {key: value.numpy() for key, value in example_of(UNet2DConditionModel(**SMALL).config).items()}
    timesteps = {RELAXED: np.array(981, np.float32), NORMAL: np.array(1, np.float32)}
    wanted = _run(graph_path(folder, "length"), feed, timesteps)
    rounded = _run(graph_path(folder, "length"), _disturb(feed, seed), timesteps)
    floor = {step: _sqnr_db(wanted[step], rounded[step]) for step in timesteps}
    found = []
    for name in names:
        outputs = _run(graph_path(folder, name), feed, timesteps)
        for step, y in outputs.items():
            sqnr, held = _sqnr_db(wanted[step], y), step == NORMAL or FORMS[name].scales == RELAXED
            found.append({"form": name, "step": step, "sqnr_db": sqnr, "rounding_db": floor[step], "must_agree": held})
            if held and not sqnr > floor[step] - MARGIN_DB:
                raise RuntimeError(f"{name} differs from the shipped form at the {step} step: {found[-1]}")
    return found


def _disturb(feed: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The inputs, each number moved by half a unit in float16's last place."""
    random = np.random.default_rng(seed)
    moved = {name: feed[name] * (1 + random.choice([-1, 1], feed[name].shape) * 2.0**-11) for name in DATA}
    return {**feed, **{name: x.astype(np.float32) for name, x in moved.items()}}


def _sqnr_db(reference: np.ndarray, y: np.ndarray) -> float:
    noise = np.square(reference - y, dtype=np.float64).sum()
    signal = np.square(reference, dtype=np.float64).sum()
    return round(float(10 * np.log10(signal / max(noise, signal * 1e-20))), 2)  # 200: the same bits


def _run(path: Path, feed: dict[str, np.ndarray], timesteps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = {}
    for step, timestep in timesteps.items():
        inputs = {**feed, "timestep": timestep, PLANES: np.arange(2 if step == RELAXED else 1)}
        outputs[step] = session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})[0]
    return outputs
