"""Random Stable Diffusion and SDXL pipelines of a few hundred kB, in diffusers' own layout, for tests to export."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 16  # of a padded prompt
CROSS_ATTENTION = 32
POOLED = 32
TIME_IDS = 8  # width of each of the six


def tiny_sd(
    folder: Path,
    *,
    scheduler: str = "PNDMScheduler",
    prediction_type: str = "epsilon",
    time_cond_proj_dim: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a StableDiffusionPipeline for 16x16 pictures (8x8 latents) to `folder`; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(CROSS_ATTENTION)).eval(),
            tokenizer=tiny_tokenizer(folder / "tokenizer"),
            unet=_unet(time_cond_proj_dim=time_cond_proj_dim),
            scheduler=_scheduler(scheduler, prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sdxl(
    folder: Path,
    *,
    scheduler: str = "EulerDiscreteScheduler",
    prediction_type: str = "epsilon",
    time_cond_proj_dim: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a StableDiffusionXLPipeline for 16x16 pictures (8x8 latents) to `folder`; the same seed gives the same weights."""
    half = CROSS_ATTENTION // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(half)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(half)).eval(),
            tokenizer=tiny_tokenizer(folder / "tokenizer"),
            tokenizer_2=tiny_tokenizer(folder / "tokenizer_2"),
            unet=_unet(
                time_cond_proj_dim=time_cond_proj_dim,
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME_IDS,
                projection_class_embeddings_input_dim=6 * TIME_IDS + POOLED,
            ),
            scheduler=_scheduler(scheduler, prediction_type),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _unet(**conditioning: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=CROSS_ATTENTION,
        norm_num_groups=8,
        use_linear_projection=True,
        **conditioning,
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def _text_config(width: int) -> CLIPTextConfig:
    vocabulary = _vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=POOLED,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )


def _scheduler(name: str, prediction_type: str) -> Any:
    config: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    return getattr(diffusers, name).from_config(config)


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits + ",.-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", START, END]
    return {token: index for index, token in enumerate(tokens)}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte pairs that know one word, "red"; vocab.json and merges.txt stay in `folder`, where transformers 5 saves neither."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", "utf-8")
    return CLIPTokenizer.from_pretrained(
        folder, model_max_length=TOKENS, bos_token=START, eos_token=END, unk_token=END, pad_token=END
    )
