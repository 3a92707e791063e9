"""The shapes of tiny-sdxl's parts, as diffusers and transformers configurations."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pcr_export.models.reference.captions import MAX_TOKENS
from pcr_export.models.reference.drawing import PIXELS

SCALING_FACTOR = 0.13025  # SDXL's own; the VAE is folded so that latents times this have unit variance
PROJECTION = 128


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: 64 x 64 pixels to 4 x 16 x 16 latents."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )
    vae.set_attn_processor(AttnProcessor())
    return vae


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser: SDXL's architecture with 7.4 million parameters."""
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + PROJECTION,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_scheduler() -> EulerDiscreteScheduler:
    """Build SDXL's own sampler: Euler, noise prediction, scaled linear betas, leading timesteps."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_text_encoder(tokens: dict[str, int]) -> CLIPTextModel:
    """Build the narrow text tower; `tokens` holds vocab_size, bos_token_id and eos_token_id."""
    return CLIPTextModel(_text_config(96, 384, tokens, hidden_act="quick_gelu", pad_token_id=tokens["eos_token_id"]))


def build_text_encoder_2(tokens: dict[str, int]) -> CLIPTextModelWithProjection:
    """Build the wide text tower, whose projection conditions the UNet and gives the CLIP score."""
    return CLIPTextModelWithProjection(_text_config(160, 320, tokens, hidden_act="gelu", pad_token_id=0))


def build_clip_vision() -> CLIPVisionModelWithProjection:
    """Build the image tower of the CLIP score: patches of 8 pixels, three layers."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )
    config._attn_implementation = "eager"
    return CLIPVisionModelWithProjection(config)


def _text_config(width: int, inner: int, tokens: dict[str, int], **rest: Any) -> CLIPTextConfig:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=PROJECTION,
        **tokens,
        **rest,
    )
    config._attn_implementation = "eager"
    return config
