"""The calibration schemes that QDiffBench compares: what each changes of a model's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_MINMAX: Mapping[str, Any] = {"scheme": "static", "ranges": "minmax", "affine": False}
_STATIC_MSE: Mapping[str, Any] = {"scheme": "static"}
_PER_STEP_FLOAT: Mapping[str, Any] = {"scheme": "float-trajectory"}

# What is simplified against the originals; all have this package's weights (per channel, clipped by MSE).
# static-modelopt: ModelOpt's diffusers example. Linears have min-max after smoothing, convolutions min-mean over steps with the true mean.
# static-q-diffusion: ranges and the split; its learned rounding is not among them.
# static-ptq4dm: 64 seeded draws of the step from a normal distribution towards the last steps, the same for all prompts.
# per-step-float: the activations of TFMQ-DM; its reconstruction of weights is not among them.

# ModelOpt's example keeps these float; it calibrates with batches of two prompts.
_MODELOPT_SKIP = tuple(
    f"*{name}*" for name in ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut", "add_embedding")
)
_MODELOPT: Mapping[str, Any] = {
    **_MINMAX,
    "reduce": "min-mean",
    "smooth_quant": 0.8,
    "calib_batch": 2,
    "skip": _MODELOPT_SKIP,
}

_BEST: Mapping[str, Any] = {"split_shortcut": True, "relax": "last:20%"}  # the best of PCR with 8-bit weights

# Name -> changes, for dataclasses.replace(recipe, **changes) on a recipe of the defaults.
SCHEMES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "static-minmax": _MINMAX,
        "static-mse": _STATIC_MSE,
        "static-modelopt": _MODELOPT,
        "static-q-diffusion": {**_STATIC_MSE, "observed_steps": "uniform:10", "split_shortcut": True},
        "static-ptq4dm": {**_STATIC_MSE, "observed_steps": "normal:64"},
        "per-step-float": _PER_STEP_FLOAT,
        "pcr-symmetric": {"affine": False},
        "pcr-affine": {},
        "pcr-minmax": {"ranges": "minmax"},
        "pcr-first-5": {"relax": "first:5%"},
        "pcr-first-10": {"relax": "first:10%"},
        "pcr-first-20": {"relax": "first:20%"},
        "pcr-last-5": {"relax": "last:5%"},
        "pcr-last-10": {"relax": "last:10%"},
        "pcr-last-20": {"relax": "last:20%"},
        "pcr-auto-8.4": {"relax": "auto:8.4"},
        "pcr-split": {"split_shortcut": True},
        "pcr-last-20-split": _BEST,
        "pcr-all-10bit": {"relax": "first:100%", "relax_bits": 10},
        "static-minmax-w4a8": {**_MINMAX, "weight_bits": 4},
        "per-step-float-w4a8": {**_PER_STEP_FLOAT, "weight_bits": 4},
        "pcr-affine-w4a8": {"weight_bits": 4},
        "pcr-last-20-w4a8": {"weight_bits": 4, "relax": "last:20%"},
        "pcr-last-20-split-rtn-w4a8": {**_BEST, "weight_bits": 4},
        "pcr-last-20-split-gptq-w4a8": {**_BEST, "weight_bits": 4, "weights": "gptq"},
        "pcr-last-20-split-adaround-w4a8": {**_BEST, "weight_bits": 4, "weights": "adaround"},
    }
)
