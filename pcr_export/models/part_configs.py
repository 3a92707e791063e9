"""The configurations of a pipeline's parts as they are read from a folder: keys that a network is made from, counts in ranges.

Every other key is dropped before a library sees it: some name code that diffusers or transformers would fetch and run, such as
`_attn_implementation`, which may be a repository of kernels, or `auto_map`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPVisionConfig

from pcr_export.errors import PcrExportError
from pcr_export.models.part_schemas import TextConfig, UnetConfig, VaeConfig, VisionConfig
from pcr_export.read_files import AGAIN, check_schema, read_json

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
