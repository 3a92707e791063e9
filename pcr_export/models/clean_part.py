"""A part of a pipeline folder as diffusers and transformers get it: a folder of its own that holds what is read, and nothing else.

Both libraries look into a folder for more than a configuration and weights: an adapter_config.json names a base model on a hub,
shards of a distributed checkpoint stand in for the weights that were looked at, a configuration names attention kernels to fetch.
None of it gets here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import transformers
from msgspec import Meta
from transformers import CLIPTextConfig, CLIPVisionConfig

from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.fetch import quiet
from pcr_export.models.part_configs import read_part_config
from pcr_export.read_files import AGAIN, MOST_VOCABULARY_BYTES, read_json, read_text

CONFIG = "config.json"
MODEL_TYPES = {CLIPTextConfig: "clip_text_model", CLIPVisionConfig: "clip_vision_model"}
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
MERGES = "merges.txt"
TOKENIZER_FILES = (*VOCABULARIES, MERGES, TOKENIZER_CONFIG)
AddedToken = str | dict[str, str | bool] | None
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class TokenizerConfig(TypedDict, total=False):
    """What a CLIP tokenizer is made with."""

    model_max_length: Annotated[int, Meta(ge=1)]  # 1e30 where there is no limit
    bos_token: AddedToken
    eos_token: AddedToken
    unk_token: AddedToken
    pad_token: AddedToken
    additional_special_tokens: list[AddedToken] | None
    extra_special_tokens: list[AddedToken] | dict[str, AddedToken] | None
    added_tokens_decoder: dict[str, dict[str, str | bool]]
    add_prefix_space: bool
    do_lower_case: bool
    clean_up_tokenization_spaces: bool | None
    errors: str


@contextmanager
def clean_part(folder: Path, kind: type, weights: Sequence[str]) -> Iterator[Path]:
    """A folder for `from_pretrained`: the settings of config.json that are known, and links to the weights.

    Args:
        folder: of the part.
        kind: as `read_part_config` takes it.
        weights: names below `folder` of safetensors files, and of their index.

    Raises:
        PcrExportError: as `read_part_config` does.
    """
    config = read_part_config(folder / CONFIG, kind)
    if kind in MODEL_TYPES:
        config["model_type"] = MODEL_TYPES[kind]
    with tempfile.TemporaryDirectory() as temporary:
        clean = Path(temporary)
        (clean / CONFIG).write_text(json.dumps(config), "utf-8")
        for name in weights:
            path = clean / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(read_json(folder / name)), "utf-8")
            else:
                path.symlink_to((folder / name).resolve())
        yield clean


def read_tokenizer(
    folder: Path, *, class_name: str = TOKENIZER_CLASSES[0], most_tokens: int | None = None, advice: str = AGAIN
) -> Any:
    """The CLIP tokenizer in a folder, made from its vocabulary and from those of its settings that are known.

    Args:
        class_name: one of TOKENIZER_CLASSES.
        most_tokens: that a text is padded to, by the tokenizer's own length; None: not looked at.

    Raises:
        PcrExportError: a file is missing or damaged, or texts are padded to more tokens than the text encoder reads.
    """
    if class_name not in TOKENIZER_CLASSES:
        raise PcrExportError(f"{folder} has a {class_name}: only {' and '.join(TOKENIZER_CLASSES)} can be read")
    if not any((folder / name).is_file() for name in VOCABULARIES[:2]):
        raise PcrExportError(f"{folder / VOCABULARIES[0]} is missing: {advice}")
    files = _tokenizer_files(folder, advice)
    with tempfile.TemporaryDirectory() as temporary:
        for name, text in files.items():
            Path(temporary, name).write_text(text, "utf-8")
        try:
            with quiet():
                tokenizer = getattr(transformers, class_name).from_pretrained(temporary, local_files_only=True)
        except INTERRUPTIONS:
            raise
        except BaseException as error:  # tokenizers raises bare Exceptions, and where its Rust panics no Exception
            reason = first_line(error).replace(temporary, str(folder))
            raise PcrExportError(f"{folder} holds no readable tokenizer ({reason}): {advice}") from error
    length = tokenizer.model_max_length
    if most_tokens is not None and length > most_tokens:
        raise PcrExportError(
            f"{folder / TOKENIZER_CONFIG}: model_max_length is {length}, where the text encoder reads {most_tokens} tokens: {advice}"
        )
    return tokenizer


def _tokenizer_files(folder: Path, advice: str) -> dict[str, str]:
    """The files that a tokenizer is made from, by their names: texts, each read once."""
    files: dict[str, str] = {}
    for name in VOCABULARIES:
        if (folder / name).exists():
            content = read_json(folder / name, most=MOST_VOCABULARY_BYTES, advice=advice)
            files[name] = json.dumps(content, ensure_ascii=False)
    if (folder / MERGES).exists():
        files[MERGES] = read_text(folder / MERGES, most=MOST_VOCABULARY_BYTES, advice=advice)
    settings: Mapping[str, Any] = {}
    if (folder / TOKENIZER_CONFIG).exists():
        settings = read_json(folder / TOKENIZER_CONFIG, TokenizerConfig, advice=advice)
    kept = {key: value for key, value in settings.items() if key in TokenizerConfig.__annotations__}
    files[TOKENIZER_CONFIG] = json.dumps(kept)
    return files
