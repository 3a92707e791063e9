"""What a path given as MODEL is: a pipeline folder, a place in the hub's cache, or a file and what makes a folder of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pcr_export.errors import PcrExportError
from pcr_export.read_files import check_regular, read_text

INDEX = "model_index.json"
WHAT_A_PIPELINE_IS = f"a pipeline folder holds {INDEX} beside unet/, vae/, text_encoder/, tokenizer/ and scheduler/"
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # suffixes of files that hold a whole model
UNET = "model.diffusion_model."  # what every weight of the UNet begins with in a single file
TEXT_ENCODERS = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"
UPDATES = ("lora_", ".lora.", ".hada_", ".lokr_")  # a part of the names of low-rank updates
MOST_NAMED = 4


def pipeline_folder(folder: Path) -> Path:
    """The pipeline folder that `folder` means: itself, or the snapshot of a repository of the hub's cache.

    Raises:
        PcrExportError: it is none: which folder near it is, or what makes one of what is there.
    """
    if (folder / INDEX).is_file():
        return folder
    repository = folder.parent if folder.name == "snapshots" else folder
    if (repository / "snapshots").is_dir():
        return _snapshot(repository)
    raise PcrExportError(f"{folder} has no {INDEX}: {_what_it_is(folder)}")


def name_of(folder: Path) -> str:
    """What a pipeline folder is called: NAME of its repository ORG/NAME in the hub's cache, or as the folder."""
    folder = folder.resolve()
    repository = folder.parents[1].name if len(folder.parents) > 1 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return folder.name


def _snapshot(repository: Path) -> Path:
    """The snapshot that refs/main names, or the only one."""
    snapshots = sorted(path.parent for path in (repository / "snapshots").glob(f"*/{INDEX}"))
    main = repository / "refs" / "main"
    commit = read_text(main).strip() if main.exists() else ""
    found = [path for path in snapshots if path.name == commit] or snapshots
    if len(found) == 1:
        return found[0]
    if not found:
        raise PcrExportError(f"{repository / 'snapshots'} holds no snapshot with {INDEX}: fetch the pipeline again")
    raise PcrExportError(f"{repository} has {len(found)} snapshots: give one of {_few(map(str, found))}")


def _what_it_is(folder: Path) -> str:
    """What a folder is that is no pipeline's, and what to give in its place."""
    hub = folder / "hub" if (folder / "hub").is_dir() else folder
    repositories = sorted(path.name for path in hub.glob("models--*--*"))
    if repositories:
        ids = _few("/".join(name.split("--", 2)[1:]) for name in repositories)
        return f"it is a cache of the hub, give a repository of it with HF_HOME or HF_HUB_CACHE set: {ids}"
    if (folder.parent / INDEX).is_file():
        return f"it is a part of a pipeline, give {folder.parent}"
    below = sorted(str(path.parent) for path in folder.glob(f"*/{INDEX}"))
    if below:
        return f"give {_few(below)}"
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in CHECKPOINTS and path.is_file())
    if len(files) == 1:
        return what_a_file_is(files[0])
    if files:
        return f"it holds {_few(path.name for path in files)}: give one of them, which tells how it becomes a pipeline folder"
    return WHAT_A_PIPELINE_IS


def what_a_file_is(path: Path) -> str:
    """One line on a file that was given as a model: what it is, and the command that makes a pipeline folder of it."""
    suffix = path.suffix.lower()
    if suffix not in CHECKPOINTS:
        return f"{path} is no folder: {WHAT_A_PIPELINE_IS}"
    if suffix != ".safetensors":
        return (
            f"{path} is a pickled file, which is not read: where you trust it, "
            f"{_conversion('StableDiffusionPipeline', path)} (StableDiffusionXLPipeline for SDXL)"
        )
    check_regular(path)
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            channels = file.get_slice(FIRST_LAYER).get_shape()[1] if FIRST_LAYER in names else None
    except (SafetensorError, OSError, IndexError) as error:
        return f"{path} is damaged ({error}): fetch it again"
    return f"{path} {_what_weights_are(path, names, channels)}"


def _what_weights_are(path: Path, names: list[str], channels: int | None) -> str:
    """What the names of a file's tensors, and the channels that its first layer reads, tell of it."""
    if any(mark in name for name in names for mark in UPDATES):
        return f"is a LoRA: give the model that it was trained for, and --lora {shlex.quote(str(path))}"
    classes = [name for prefix, name in TEXT_ENCODERS.items() if any(each.startswith(prefix) for each in names)]
    if FIRST_LAYER in names and channels != 4:
        return (
            f"holds a UNet that reads {channels} channels, where text-to-image models read 4: no other can be exported"
        )
    if FIRST_LAYER in names and classes:
        return f"is a whole model in one file: make a folder of it, {_conversion(classes[0], path)}"
    if any(name.startswith(("down_blocks.", "text_model.", "decoder.", UNET)) for name in names):
        return f"holds the weights of one part alone: {WHAT_A_PIPELINE_IS}"
    return f"holds no model that is known here: {WHAT_A_PIPELINE_IS}"


def _conversion(class_name: str, path: Path) -> str:
    """The command that makes a pipeline folder of a single file (it fetches configurations from the hub), and the next one."""
    folder = shlex.quote(str(path.with_suffix("")))
    code = f"import sys, diffusers; diffusers.{class_name}.from_single_file(sys.argv[1]).save_pretrained(sys.argv[2])"
    return f'python -c "{code}" {shlex.quote(str(path))} {folder}, then `pcr-export {folder}`'


def _few(names: Iterable[str]) -> str:
    """The first names, separated by commas."""
    every = list(names)
    return ", ".join(every[:MOST_NAMED]) + (f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else "")
