"""What the configurations of a pipeline's parts may hold: a range for every count that sets a size or a number of layers."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from msgspec import Meta

Layers = Annotated[int, Meta(ge=0, le=128)]
Width = Annotated[int, Meta(ge=0, le=2**16)]
Size = Annotated[int, Meta(ge=1, le=2**16)]
Words = Annotated[list[str], Meta(min_length=1, max_length=16)]
Widths = Annotated[list[Width], Meta(min_length=1, max_length=16)]
Positive = Annotated[int, Meta(ge=1, le=2**16)]
PerBlock = Annotated[list[Annotated[int, Meta(ge=1, le=16)]], Meta(max_length=16)]
Transformers = Annotated[int, Meta(ge=1, le=64)]
Heads = Positive | Annotated[list[Positive], Meta(max_length=16)] | None
Side = Size | Annotated[list[Size], Meta(min_length=2, max_length=2)] | None
Token = Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None


class UnetConfig(TypedDict, total=False):
    """What sets the size of a UNet2DConditionModel, or is computed with; its constructor looks at the rest."""

    sample_size: Side
    in_channels: Positive
    out_channels: Positive
    down_block_types: Words
    mid_block_type: str | None
    up_block_types: Words
    block_out_channels: Annotated[list[Positive], Meta(min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Meta(ge=1, le=16)] | PerBlock
    norm_num_groups: Positive | None
    norm_eps: float
    cross_attention_dim: Positive | Annotated[list[Positive], Meta(max_length=16)]
    transformer_layers_per_block: (
        Transformers
        | Annotated[list[Transformers | Annotated[list[Transformers], Meta(max_length=16)]], Meta(max_length=16)]
    )
    reverse_transformer_layers_per_block: Annotated[list[Any], Meta(max_length=16)] | None
    encoder_hid_dim: Positive | None
    encoder_hid_dim_type: str | None
    attention_head_dim: Heads
    num_attention_heads: Heads
    addition_embed_type: str | None
    addition_time_embed_dim: Positive | None
    addition_embed_type_num_heads: Positive
    num_class_embeds: Positive | None
    time_embedding_dim: Positive | None
    timestep_post_act: str | None
    time_cond_proj_dim: Positive | None
    conv_in_kernel: Annotated[int, Meta(ge=1, le=64)]
    conv_out_kernel: Annotated[int, Meta(ge=1, le=64)]
    projection_class_embeddings_input_dim: Positive | None
    cross_attention_norm: str | None
    freq_shift: float


class VaeConfig(TypedDict, total=False):
    """As UnetConfig, of an AutoencoderKL."""

    in_channels: Positive
    out_channels: Positive
    down_block_types: Words
    up_block_types: Words
    block_out_channels: Annotated[list[Positive], Meta(min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Meta(ge=1, le=16)]
    latent_channels: Positive
    norm_num_groups: Positive
    sample_size: Side
    scaling_factor: float
    shift_factor: float | None
    latents_mean: Annotated[list[float], Meta(max_length=2**16)] | None
    latents_std: Annotated[list[float], Meta(max_length=2**16)] | None
    force_upcast: bool | float


class TextConfig(TypedDict, total=False):
    """Every setting of a CLIP text encoder."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**22)]
    hidden_size: Positive
    intermediate_size: Annotated[int, Meta(ge=1, le=2**18)]
    projection_dim: Width | None
    num_hidden_layers: Layers
    num_attention_heads: Positive
    max_position_embeddings: Positive
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float
    initializer_factor: float
    pad_token_id: Token
    bos_token_id: Token
    eos_token_id: Token


class VisionConfig(TypedDict, total=False):
    """Every setting of a CLIP image encoder."""

    hidden_size: Positive
    intermediate_size: Annotated[int, Meta(ge=1, le=2**18)]
    projection_dim: Width
    num_hidden_layers: Layers
    num_attention_heads: Positive
    num_channels: Positive
    image_size: Positive
    patch_size: Positive
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float
    initializer_factor: float


class ExportedTextConfig(TextConfig, total=False):
    """What an exported text encoder's configuration tells besides: its class."""

    architectures: list[str] | None
