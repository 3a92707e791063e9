"""The configurations of a pipeline's parts as they are read from a folder: keys that a network is made from, counts in ranges.

Every other key is dropped before a library sees it: some name code that diffusers or transformers would fetch and run, such as
`_attn_implementation`, which may be a repository of kernels, or `auto_map`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from diffusers import AutoencoderKL, UNet2DConditionModel
from msgspec import Meta
from transformers import CLIPTextConfig, CLIPVisionConfig

from pcr_export.errors import PcrExportError
from pcr_export.read_files import AGAIN, check_schema, read_json

MOST_STEPS = 10**5  # that a noise schedule was trained with
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


SCHEMAS: Mapping[type, Any] = {
    UNet2DConditionModel: UnetConfig,
    AutoencoderKL: VaeConfig,
    CLIPTextConfig: TextConfig,
    CLIPVisionConfig: VisionConfig,
}
INSIDE = {CLIPTextConfig: "text_config", CLIPVisionConfig: "vision_config"}  # the configuration of a whole CLIP
WHOLE_CLIP = "clip"  # its model_type


def read_part_config(path: Path, kind: type, *, advice: str = AGAIN) -> dict[str, Any]:
    """The settings in a config.json that a part is made from.

    Args:
        kind: UNet2DConditionModel, AutoencoderKL, CLIPTextConfig or CLIPVisionConfig.

    Raises:
        PcrExportError: it is missing or damaged, a count lies out of every range, or its weights are quantized.
    """
    return clean_config(read_json(path, advice=advice), kind, path, advice=advice)


def clean_config(config: Mapping[str, Any], kind: type, name: object, *, advice: str = AGAIN) -> dict[str, Any]:
    """What of a configuration called `name` a part is made from. Raises PcrExportError as `read_part_config` does."""
    if config.get("quantization_config") is not None:
        raise PcrExportError(
            f"{name} has a quantization_config, for its weights are quantized already: give the model in float"
        )
    if config.get("model_type") == WHOLE_CLIP and isinstance(config.get(INSIDE[kind]), dict):
        config = config[INSIDE[kind]]
    kept = {key: value for key, value in config.items() if key in known_keys(kind)}
    check_schema(kept, SCHEMAS[kind], name, advice=advice)
    return kept


def full_config(path: Path, kind: type, *, advice: str = AGAIN) -> dict[str, Any]:
    """As `read_part_config`, with the defaults that the library fills in."""
    return {**defaults(kind), **read_part_config(path, kind, advice=advice)}


def known_keys(kind: type) -> frozenset[str]:
    """The settings of a part: of diffusers' the arguments of its constructor, of transformers' those of its schema alone."""
    if kind in INSIDE:
        return frozenset(SCHEMAS[kind].__annotations__)
    return frozenset(inspect.signature(kind).parameters)


def defaults(kind: type) -> dict[str, Any]:
    """What the library fills in for a key that a configuration lacks."""
    parameters = inspect.signature(kind).parameters
    known = known_keys(kind)
    return {
        name: each.default
        for name, each in parameters.items()
        if name in known and each.default is not inspect.Parameter.empty
    }
