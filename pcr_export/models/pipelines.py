"""diffusers' Stable Diffusion and SDXL pipelines as Denoisers: one walk for the float, simulated and exported network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, Walk
from pcr_export.models.picture_sizes import check_picture_size, size_factor
from pcr_export.models.schedulers import check_walk, make_scheduler, start, step_arguments
from pcr_export.prompts import check_prompt

Pipeline = Any  # a StableDiffusionPipeline or a StableDiffusionXLPipeline, whose parts diffusers leaves untyped


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a pipeline is sampled."""

    num_inference_steps: int
    guidance_scale: float
    height: int  # pixels
    width: int  # pixels
    negative_prompt: str = ""  # empty: the pipeline's own empty prompt
    guidance_rescale: float = 0.0  # phi of arXiv 2305.08891, section 3.4, in 0..1; 0: guidance as it is


def denoiser_from_pipeline(
    pipeline: Pipeline,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    scheduler: Any = None,
    negative_prompt: str = "",
    guidance_rescale: float = 0.0,
) -> Denoiser:
    """The pipeline's UNet with its trajectory: walked with the UNet itself it gives the latents of `pipeline(prompts, ...)`.

    Args:
        pipeline: float32, of any SD 1.x, SD 2.x or SDXL model.
        height, width: pixels.
        scheduler: a scheduler of diffusers, or NAME[:key=value,...] for one with the noise schedule of the pipeline's; None: the
            pipeline's own. It is copied for each walk.
        negative_prompt: empty for the pipeline's own empty prompt.
        guidance_rescale: 0..1, as diffusers' pipelines take it: how far the guided output is brought back to the deviation of the
            conditional one.

    Raises:
        PcrExportError: the steps, the scheduler, the guidance or the picture's size can't be sampled.
    """
    check_picture_size(height, width, size_factor(pipeline.unet.config, pipeline.vae_scale_factor))
    check_guidance(pipeline, guidance_scale, guidance_rescale)
    if isinstance(scheduler, str):
        own = pipeline.scheduler
        scheduler = make_scheduler(scheduler, own.config, type(own).__name__, type(pipeline))
    scheduler = copy.deepcopy(scheduler or pipeline.scheduler)
    timesteps = check_walk(scheduler, num_inference_steps, type(pipeline))
    sampling = Sampling(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_rescale=guidance_rescale,
    )
    return Denoiser(
        network=pipeline.unet,
        call=call_unet,
        walk=partial(walk_pipeline, pipeline, scheduler, sampling),
        timesteps=timesteps,
        dynamic_axes=unet_axes(pipeline),
        decode=partial(decode_latents, pipeline.vae),
    )


def check_guidance(pipeline: Pipeline, guidance_scale: float, guidance_rescale: float) -> None:
    """Raise PcrExportError where a guidance scale or its rescaling can't be sampled, or the rescaling would change nothing."""
    if not math.isfinite(guidance_scale):
        raise PcrExportError(f"a guidance scale of {guidance_scale} can't be sampled: give a finite number")
    if not 0 <= guidance_rescale <= 1:
        raise PcrExportError(f"a guidance rescale of {guidance_rescale} can't be sampled: give a number from 0 to 1")
    if guidance_rescale and not uses_guidance(pipeline, guidance_scale):
        raise PcrExportError(
            f"a guidance rescale of {guidance_rescale:g} changes nothing without guidance: give a guidance scale above 1, or 0 for it"
        )


def unet_axes(pipeline: Pipeline) -> Mapping[str, Mapping[int, str]]:
    """The UNet's inputs in call order with their axes of free size."""
    axes: dict[str, Mapping[int, str]] = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
    }
    if isinstance(pipeline, StableDiffusionXLPipeline):
        axes |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}
    if pipeline.unet.config.time_cond_proj_dim is not None:
        axes["timestep_cond"] = {0: "batch"}
    return axes


def call_unet(network: nn.Module, inputs: Inputs) -> Tensor:
    """Call a UNet2DConditionModel by its inputs' names; float32 [batch, channels, height / f, width / f] in and out."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    output: Tensor = network(
        inputs["sample"],
        inputs["timestep"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        timestep_cond=inputs.get("timestep_cond"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return output


@torch.no_grad()
def walk_pipeline(
    pipeline: Pipeline, scheduler: Any, sampling: Sampling, prompts: Sequence[str], seeds: Sequence[int]
) -> Walk:
    """Walk `prompts` from noise to latents: the denoising loop of diffusers' pipelines with the network's calls taken out.

    Classifier-free guidance (arXiv 2207.12598) doubles the batch, unconditional half first:  e = e_u + w (e_c - e_u).
    Each seed makes its prompt's initial noise and the noise its scheduler adds, whatever else is in the batch.

    Yields:
        sample float32 [batch, channels, height / f, width / f], timestep float32 [], encoder_hidden_states float32
        [batch, tokens, width], and where the UNet has them text_embeds float32 [batch, width], time_ids float32 [batch, 6]
        (height, width, top, left, height, width in pixels) and timestep_cond float32 [batch, width].

    Returns:
        The final latents, float32 [len(prompts), channels, height / f, width / f].
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise PcrExportError(f"a seed lies in 0..2**63-1, not {min(seeds)} to {max(seeds)}: give another")
    for prompt in (*prompts, sampling.negative_prompt):
        check_prompt(prompt, "a prompt")
    scheduler = copy.deepcopy(scheduler)
    guided = uses_guidance(pipeline, sampling.guidance_scale)
    conditions = encode_conditions(pipeline, sampling, list(prompts), guided)
    device = conditions["encoder_hidden_states"].device
    start(scheduler, sampling.num_inference_steps, type(pipeline), device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = initial_noise(pipeline, sampling, generators, device) * scheduler.init_noise_sigma
    arguments = step_arguments(scheduler, generators)
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        output = yield {"sample": sample, "timestep": timestep.to(device, torch.float32), **conditions}
        latents = scheduler.step(
            guide(output, sampling) if guided else output, timestep, latents, **arguments, return_dict=False
        )[0]
    return latents


def guide(output: Tensor, sampling: Sampling) -> Tensor:
    """The guided output, [batch, ...], of the unconditional and the conditional one, [2 batch, ...].

    Where sampling.guidance_rescale phi is not 0 (arXiv 2305.08891, section 3.4), std over all axes but the batch:

        e = e_u + w (e_c - e_u),    phi e std(e_c) / std(e) + (1 - phi) e
    """
    unconditional, conditional = output.chunk(2)
    guided: Tensor = unconditional + sampling.guidance_scale * (conditional - unconditional)
    if sampling.guidance_rescale > 0:
        guided = rescale_noise_cfg(guided, conditional, guidance_rescale=sampling.guidance_rescale)
    return guided


def uses_guidance(pipeline: Pipeline, guidance_scale: float) -> bool:
    """Whether the batch is doubled: not for w <= 1, and not for a UNet that takes w as an input (latent consistency models)."""
    return guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None


def initial_noise(
    pipeline: Pipeline, sampling: Sampling, generators: list[torch.Generator], device: torch.device
) -> Tensor:
    """Standard normal latents, float32 [len(generators), channels, height / f, width / f], one generator each."""
    f = pipeline.vae_scale_factor
    shape = (len(generators), pipeline.unet.config.in_channels, sampling.height // f, sampling.width // f)
    noise: Tensor = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    return noise


def encode_conditions(pipeline: Pipeline, sampling: Sampling, prompts: list[str], guided: bool) -> Inputs:
    """Every input of the UNet that stays the same along the trajectory, unconditional rows first where guided."""
    negative = [sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None
    encoded = pipeline.encode_prompt(
        prompt=prompts,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    rows = list(_unconditional_first(encoded, guided))
    conditions = {"encoder_hidden_states": rows[0]}
    batch, device = len(rows[0]), rows[0].device
    if isinstance(pipeline, StableDiffusionXLPipeline):
        size = (sampling.height, sampling.width)
        conditions["text_embeds"] = rows[1]
        conditions["time_ids"] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=device).repeat(
            batch, 1
        )
    width = pipeline.unet.config.time_cond_proj_dim
    if width is not None:
        w = torch.tensor(sampling.guidance_scale - 1).repeat(batch)
        conditions["timestep_cond"] = pipeline.get_guidance_scale_embedding(w, embedding_dim=width).to(device)
    return conditions


def _unconditional_first(encoded: Sequence[Tensor], guided: bool) -> Iterator[Tensor]:
    for conditional, unconditional in zip(encoded[::2], encoded[1::2], strict=True):
        yield torch.cat([unconditional, conditional]) if guided else conditional


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents float32 [batch, channels, h, w] of a sampler to images float32 [batch, 3, h f, w f] in 0..1."""
    decode: Any = vae.decode
    image: Tensor = decode(unscale_latents(vae, latents), return_dict=False)[0]
    return (image * 0.5 + 0.5).clamp(0, 1)


def unscale_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """A sampler's latents as the VAE's decoder reads them, [batch, channels, h, w] both.

    With the VAE's latents_mean m and latents_std s, where it has them:  latents s / scaling_factor + m.
    """
    config: Any = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config.scaling_factor
    latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) / config.scaling_factor
    return latents + latents.new_tensor(mean).view(1, -1, 1, 1)
