"""Whether the parts of a pipeline fit each other and the picture's size, from their configurations alone: before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.catalog import CatalogEntry, own_picture_size, picture_size, read_model_index
from pcr_export.models.part_configs import defaults, full_config, read_part_config
from pcr_export.models.picture_sizes import check_picture_size, size_factor
from pcr_export.read_files import MOST_VOCABULARY_BYTES, read_json

CLASSES = {  # of diffusers and transformers, as model_index.json names them
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
OTHER_CHANNELS = {  # what a UNet of so many more channels than its latents have reads beside them
    1: "the depth that depth-to-image models read",
    3: "the picture that upscalers read",
    4: "the picture that editing models (instruct-pix2pix) read",
    5: "the mask and the masked picture that inpainting models read",
}
TIME_IDS = 6  # of SDXL: original size, crop and target size
TEXT_ONLY = "only text-to-image models can be exported"


@dataclass(frozen=True, kw_only=True)
class Configs:
    """The configurations of a pipeline, with the defaults that the libraries fill in; `names` says where each comes from."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: Sequence[CLIPTextConfig]  # one, or SDXL's two
    names: Mapping[str, str]
    tokenizers: Sequence[Path]  # a folder for each of `texts`
    is_xl: bool

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def check_configs(folder: Path, entry: CatalogEntry, unet: Mapping[str, Any] | None = None) -> None:
    """Compare the configurations of a pipeline folder with each other and with the picture that `entry` asks for.

    Args:
        folder: that `check_folder` has looked at.
        unet: the configuration of the UNet that replaces the folder's; None: the folder's own.

    Raises:
        PcrExportError: one line that names the configuration and says what does not fit.
    """
    index = read_model_index(folder)
    _check_classes(folder, index)
    configs = _read_configs(folder, index, entry, unet)
    try:
        checks = (_channel_faults, _condition_faults, _mask_faults, _width_faults, _token_faults)
        faults = [fault for check in checks for fault in check(configs)]
        own_size = own_picture_size(configs.unet["sample_size"], configs.vae_scale_factor)
        unit = size_factor(configs.unet, configs.vae_scale_factor)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise PcrExportError(
            f"a configuration of {folder} (unet, vae or tokenizer) is not understood ({error}): fetch the folder again"
        ) from error
    for fault in faults:
        raise PcrExportError(fault)
    check_picture_size(*picture_size(entry, own_size), unit)


def _check_classes(folder: Path, index: Mapping[str, Any]) -> None:
    for part, known in CLASSES.items():
        if part in index and index[part][1] not in known:
            raise PcrExportError(
                f"{folder} has a {index[part][1]} as its {part}: only {' and '.join(known)} can be exported"
            )


def _read_configs(
    folder: Path, index: Mapping[str, Any], entry: CatalogEntry, unet: Mapping[str, Any] | None
) -> Configs:
    texts = [part for part in ("text_encoder", "text_encoder_2") if part in index]
    names = {part: str(folder / part / "config.json") for part in ("unet", "vae", *texts)}
    if unet is None:
        unet = read_part_config(folder / "unet" / "config.json", UNet2DConditionModel)
    else:
        names["unet"] = f"config.json of {entry.unet}"
    return Configs(
        unet={**defaults(UNet2DConditionModel), **unet},
        vae=full_config(folder / "vae" / "config.json", AutoencoderKL),
        texts=[_text_config(folder / part) for part in texts],
        names=names,
        tokenizers=[folder / part.replace("text_encoder", "tokenizer") for part in texts],
        is_xl=index["_class_name"] == "StableDiffusionXLPipeline",
    )


def _text_config(folder: Path) -> CLIPTextConfig:
    config = read_part_config(folder / "config.json", CLIPTextConfig)
    try:
        return CLIPTextConfig(**config)
    except Exception as error:  # whatever a damaged file makes of two libraries
        raise PcrExportError(
            f"{folder / 'config.json'} is no text encoder's ({first_line(error)}): fetch the folder again"
        ) from error


def _channel_faults(configs: Configs) -> list[str]:
    """What does not fit of the latents that UNet and VAE share."""
    latents, unet = configs.vae["latent_channels"], configs.names["unet"]
    read, given, faults = configs.unet["in_channels"], configs.unet["out_channels"], []
    if read != latents:
        more = OTHER_CHANNELS.get(read - latents)
        beside = f", {more} among them: {TEXT_ONLY}" if more else ": they are no pair, fetch the folder again"
        faults.append(f"{unet}: the UNet reads {read} channels, where the VAE's latents have {latents}{beside}")
    if given != latents:
        faults.append(
            f"{unet}: the UNet gives {given} channels, where the VAE's latents have {latents}: "
            "only models that predict noise or velocity alone, no variance, can be exported"
        )
    return faults


def _condition_faults(configs: Configs) -> list[str]:
    """What the UNet asks for beside a text, a timestep and SDXL's sizes."""
    unet, name = configs.unet, configs.names["unet"]
    added = ("text_time",) if configs.is_xl else (None, "text")
    known = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "addition_embed_type": added,
        "attention_type": ("default",),
    }
    return [
        f"{name}: {key} is {unet[key]!r}, which takes more than a {'StableDiffusionXL' if configs.is_xl else 'StableDiffusion'}Pipeline "
        f"gives (it gives {' or '.join(str(value) for value in values)}): {TEXT_ONLY}"
        for key, values in known.items()
        if unet[key] not in values
    ]


def _mask_faults(configs: Configs) -> list[str]:
    """A text encoder that StableDiffusionPipeline would give a mask of the tokens, for which the exported one has no input."""
    name = configs.names["text_encoder"]
    if configs.is_xl or not read_json(Path(name)).get("use_attention_mask", False):
        return []
    return [
        f"{name}: use_attention_mask is true, and a text encoder is exported for tokens alone: no such model can be"
    ]


def _width_faults(configs: Configs) -> list[str]:
    """Where the text encoders give vectors of another width than the UNet reads."""
    unet, name, faults = configs.unet, configs.names["unet"], []
    given = sum(text.hidden_size for text in (configs.texts if configs.is_xl else configs.texts[:1]))
    wanted = _text_widths(unet)
    if wanted - {given}:
        faults.append(
            f"{name}: the UNet reads texts {' and '.join(map(str, sorted(wanted)))} wide, the text encoders give {given}: "
            "they are no pair, fetch the folder again"
        )
    if configs.is_xl and unet["addition_embed_type"] == "text_time":
        given = TIME_IDS * (unet["addition_time_embed_dim"] or 0) + (configs.texts[-1].projection_dim or 0)
        wanted_added = unet["projection_class_embeddings_input_dim"]
        if given != wanted_added:
            faults.append(
                f"{name}: projection_class_embeddings_input_dim is {wanted_added}, where {TIME_IDS} times "
                f"addition_time_embed_dim and the projection of text_encoder_2 make {given}: they are no pair, fetch the folder again"
            )
    return faults


def _token_faults(configs: Configs) -> list[str]:
    """Where a tokenizer makes more tokens, or other ones, than its text encoder has places and vectors for."""
    faults = []
    for text, folder in zip(configs.texts, configs.tokenizers, strict=True):
        own, vocabulary = folder / "tokenizer_config.json", folder / "vocab.json"
        length = read_json(own).get("model_max_length") if own.is_file() else None
        if length is not None and length > text.max_position_embeddings:
            faults.append(
                f"{own}: model_max_length is {length}, where the text encoder reads {text.max_position_embeddings} tokens: "
                "they are no pair, fetch the folder again"
            )
        known = read_json(vocabulary, most=MOST_VOCABULARY_BYTES) if vocabulary.is_file() else {}
        highest = max(known.values(), default=0)
        if highest >= text.vocab_size:
            faults.append(
                f"{vocabulary} has the token {highest}, where the text encoder knows {text.vocab_size}: "
                "they are no pair, fetch the folder again"
            )
    return faults


def _text_widths(unet: Mapping[str, Any]) -> set[int]:
    """The widths of text that the attention layers read; none where there are no such layers."""
    if unet["encoder_hid_dim"] is not None:
        return {unet["encoder_hid_dim"]}
    blocks = unet["down_block_types"]
    width = unet["cross_attention_dim"]
    widths = [width] * len(blocks) if isinstance(width, int) else list(width)
    read = zip((*blocks, unet["mid_block_type"] or ""), (*widths, widths[-1]), strict=True)
    return {width for block, width in read if "CrossAttn" in block}
