"""A job's denoiser tried before anything long begins: its walk, one call of its network, and the tracing of its graph."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pcr_export import __version__
from pcr_export.calibrate.trace_network import Trace, trace_network
from pcr_export.export_job import Job
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.check_denoiser import (
    check_network,
    check_output,
    check_timesteps,
    hold_to_timesteps,
    told,
    try_inputs,
    try_walk,
)
from pcr_export.models.denoiser import Inputs
from pcr_export.models.hash_weights import hash_weights
from pcr_export.stages import Facts, Stages

if TYPE_CHECKING:
    import onnx_ir as ir


def try_denoiser(job: Job) -> tuple[Job, Inputs, Trace]:
    """Try all that a denoiser must keep to, with one call of its network and a walk that makes none.

    Returns the job with no more conditions than calib_size, its walk held to its timesteps and hashed, the inputs of that call and
    what it did. Raises PcrExportError that says what is wrong.
    """
    job = job.within_calib_size()
    denoiser, seeds = job.denoiser, job.noise_seeds()
    check_network(denoiser.network)
    check_timesteps(denoiser)
    example = try_inputs(denoiser, job.conditions, seeds)
    with told("the denoiser's call"):
        trace = trace_network(denoiser, example)
    check_output(denoiser, example, trace.output)
    walk = try_walk(denoiser, job.conditions, seeds, trace.output.shape)
    return replace(job, denoiser=hold_to_timesteps(denoiser), walk_key={**job.walk_key, "walk": walk}), example, trace


def try_tracing(job: Job, example: Inputs, stages: Stages) -> Callable[[], ir.Model]:
    """The float graph, traced now, before anything long, unless an earlier run has traced the same network."""
    if job.float_graph is not None:
        return job.float_graph
    float_graph = lazy_float_graph(job, example)
    axes = {
        name: {str(axis): label for axis, label in each.items()} for name, each in job.denoiser.dynamic_axes.items()
    }
    key = {
        "weights": hash_weights(job.denoiser.network),
        "torch": torch.__version__,
        "version": __version__,
        **job.walk_key,
        "axes": json.dumps(axes),
    }

    def trace() -> Facts:
        float_graph()
        return {}

    stages.run("trace", key, [], trace)
    return float_graph


def lazy_float_graph(job: Job, example: Inputs) -> Callable[[], ir.Model]:
    """The float graph of the job's network, traced once, where it is first asked for."""
    return functools.cache(functools.partial(_trace, job, example))


def _trace(job: Job, example: Inputs) -> ir.Model:
    with job.track("tracing the float graph", 1) as advance:
        model = trace_float_onnx(job.denoiser, example)
        advance(1)
    return model
