"""Look at a pipeline folder before it is loaded, so that the file that is wrong is named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import read_model_index
from pcr_export.path_inside import path_inside
from pcr_export.read_files import MOST_VOCABULARY_BYTES, check_regular, read_json

WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
FETCH = "fetch the folder again"
LIBRARIES = ("diffusers", "transformers")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # nothing of them is loaded
TOKENIZERS = ("tokenizer", "tokenizer_2")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # of every pipeline
SECOND_PARTS = ("text_encoder_2", "tokenizer_2")  # of SDXL's
CONFIGS = {
    **dict.fromkeys(WEIGHT_STEMS, ("config.json",)),
    "scheduler": ("scheduler_config.json",),
    **dict.fromkeys(TOKENIZERS, ("vocab.json", "merges.txt")),
}


def check_folder(folder: Path) -> None:
    """Look at every file that loading will read, so that a bad one is named.

    Raises:
        PcrExportError: naming the component or file that is missing or damaged, or the weights that are no safetensors.
    """
    index = read_model_index(folder)
    _check_components(folder, index)
    for component, files in CONFIGS.items():
        if component not in index:
            continue
        if not isinstance(index[component], list) or index[component] == [None, None]:
            raise PcrExportError(
                f"{folder} has no {component} that diffusers or transformers can load: see its model_index.json"
            )
        for name in files:
            path = folder / component / name
            if component in TOKENIZERS and (folder / component / "tokenizer.json").is_file():
                continue  # it holds vocabulary and merges
            check_regular(path, most=MOST_VOCABULARY_BYTES, advice=FETCH)
            if path.suffix == ".json":
                read_json(path, most=MOST_VOCABULARY_BYTES, advice=FETCH)
        if component in WEIGHT_STEMS:
            _check_weights(folder / component, WEIGHT_STEMS[component], part_variant(folder, component))


def _check_components(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse what diffusers would import from elsewhere, code in the folder too: a component is a class of two libraries or left out."""
    needed = (*PARTS, *(SECOND_PARTS if "XL" in index["_class_name"] else ()))
    absent = [name for name in needed if name not in index]
    if absent:
        raise PcrExportError(
            f"{folder / 'model_index.json'} names no {' and no '.join(absent)}: fetch the folder again"
        )
    for name, value in index.items():
        if name in LEFT_OUT or name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue  # options are no lists
        known = name in CONFIGS and len(value) == 2 and value[0] in LIBRARIES and isinstance(value[1], str)
        if not known or not value[1].isidentifier():
            raise PcrExportError(
                f"{folder} has no {name} that diffusers or transformers can load, but {value}: see its model_index.json"
            )


def weight_variant(folder: Path) -> str | None:
    """The variant (fp16) to hand to diffusers, which takes it for every part that has it and plain weights for the others.

    None where every part has plain weights, or where no variant fits: then what is missing is named.
    """
    parts = [(folder / part, stem) for part, stem in WEIGHT_STEMS.items() if (folder / part).is_dir()]
    found = [_variants(path, stem) for path, stem in parts]
    if all(None in each for each in found):
        return None
    fitting = [name for name in _by_preference(found) if all(name in each or None in each for each in found)]
    return fitting[0] if fitting else None


def part_variant(folder: Path, part: str) -> str | None:
    """The variant that `part` of the pipeline is read in; None: its plain weights."""
    variant = weight_variant(folder)
    return variant if variant in _variants(folder / part, WEIGHT_STEMS[part]) else None


def _by_preference(found: Sequence[Set[str | None]]) -> list[str]:
    """fp16 first, which most repositories have."""
    return sorted(
        {name for each in found for name in each if name is not None}, key=lambda name: (name != "fp16", name)
    )


def _variants(folder: Path, stem: str) -> set[str | None]:
    """The variants of which a part has weights, or an index of them; None stands for plain ones."""
    names = [path.name for path in folder.glob(f"{stem}.*")]
    patterns = rf"{stem}(?:\.(.+))?\.safetensors", rf"{stem}\.safetensors\.index(?:\.(.+))?\.json"
    return {match[1] for pattern in patterns for name in names if (match := re.fullmatch(pattern, name))}


def weight_files(folder: Path, part: str) -> list[str]:
    """The safetensors files of a part in the variant that it is read in, and their index where they are sharded: names below it."""
    names, index = _weight_names(folder / part, WEIGHT_STEMS[part], part_variant(folder, part))
    return [*names, *([index] if index else [])]


def _weight_names(folder: Path, stem: str, variant: str | None) -> tuple[list[str], str | None]:
    suffix = f".{variant}" if variant is not None else ""
    shards = f"{stem}.safetensors.index{suffix}.json"
    if (folder / shards).exists():
        return _shards(folder / shards), shards
    return [f"{stem}{suffix}.safetensors"], None


def _check_weights(folder: Path, stem: str, variant: str | None) -> None:
    names, index = _weight_names(folder, stem, variant)
    for name in names:
        path = path_inside(folder, name, folder / str(index))
        if path.exists():
            _check_safetensors(path)
            continue
        if path.is_symlink():
            raise PcrExportError(f"{path} is a link to {path.readlink()}, where no file is: fetch the folder again")
        if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
            raise PcrExportError(
                f"{folder} holds pickled weights (.bin or .ckpt), which are not read: "
                "load the pipeline with diffusers and save it with save_pretrained(..., safe_serialization=True)"
            )
        others = ", ".join(sorted(name for name in _variants(folder, stem) if name))
        but = f" ({others} is there, which another part has not)" if others else ""
        raise PcrExportError(f"{path} is missing{but}: fetch the folder again")


def _shards(path: Path) -> list[str]:
    """The files that an index of sharded weights names."""
    files = read_json(path, advice=FETCH).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise PcrExportError(f"{path} names no files of weights: fetch the folder again")
    return sorted(set(files.values()))


def _check_safetensors(path: Path) -> None:
    check_regular(path, advice=FETCH)
    try:
        with safe_open(path, "numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise PcrExportError(f"{path} is damaged ({error}): fetch it again") from error
