"""manifest.json: sha256 and bytes of every file of an exported folder that deployment reads; written last."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import last_command
from pcr_export.path_inside import is_name_inside
from pcr_export.read_files import parse_json, read_text
from pcr_export.stages import hash_file
from pcr_export.write_files import write_text

NAME = "manifest.json"
FORMAT = 1
STORED_IMAGE = "images/int8/00000.png"
LISTED = (  # what deployment and `inspect` read; a new part of the folder joins here
    "model_index.json",
    "recipe.json",
    "report.json",
    "step_scales.safetensors",
    "scheduler/**/*",
    "tokenizer*/**/*",
    "text_encoder*/**/*",
    "unet/**/*",
    "vae_*/**/*",
    "triton/**/*",
)
OF_AN_EXPORT = (
    ".stages",
    "recipe.json",
    "step_scales.safetensors",
    "unet/model.onnx",
)  # of one that has not ended, too
GRAPH_FILES = ("model.onnx", "model.onnx_data")
SMALL_BYTES = 2**22  # of files that every reader hashes
LEFT_OUT = ("*.timing_cache", "*.jit", "*.tmp", "build_commands.txt")  # of those, what no deployment needs


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """What a file was when the export ended."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image that the artifact painted at its export, and what it was painted from."""

    file: str  # below the folder
    prompt: str
    seed: int
    min_psnr_db: float  # of the same image painted elsewhere to this one

    def __post_init__(self) -> None:
        kinds = (self.file, str), (self.prompt, str), (self.seed, int), (self.min_psnr_db, float)
        if not all(type(value) is kind for value, kind in kinds):
            raise TypeError("an image has a file, a prompt, a whole number as its seed and a PSNR")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    files: Mapping[str, ListedFile]  # by name below the folder, with slashes
    image: StoredImage | None  # None: the export painted none


def check_exported_folder(folder: Path) -> None:
    """Raise PcrExportError where `folder` is none."""
    if not folder.is_dir():
        raise PcrExportError(f"{folder} is no folder: give one that an export wrote, such as engines/sdxl-w8a8")


def check_finished(folder: Path) -> None:
    """Hold what an export wrote to its manifest, in milliseconds: small files by their bytes, large ones by their size.

    What people add, change or leave out for a deployment is no matter here: engines, Triton's repository, images, whole parts.

    Raises:
        PcrExportError: `folder` is no export's, its export has not ended, or a file of it is not as that export left it.
    """
    check_exported_folder(folder)
    files = {name: each for name, each in read_manifest(folder).files.items() if _is_of_the_artifact(folder, name)}
    found = [fault for name, listed in files.items() if (fault := _damage(folder, name, listed, SMALL_BYTES))]
    if found:
        raise PcrExportError(f"{_few(folder, found)}: {_copy_again(folder)}")


def _is_of_the_artifact(folder: Path, name: str) -> bool:
    """Whether every reader relies on a file; a part that was left out as a whole is missed by those alone that need it."""
    top, _, rest = name.partition("/")
    if top == "unet":
        return rest in ("config.json", *GRAPH_FILES)
    return top not in ("triton", "images") and (not rest or (folder / top).exists())


def write_manifest(folder: Path, image: StoredImage | None = None) -> Manifest:
    """Hash what deployment reads and write FOLDER/manifest.json: the last file of an export. Same files, same bytes.

    It finds damage, not malice: whoever can change a file can write a manifest, too.

    Args:
        image: that the artifact painted at this export; listed, too.
    """
    paths = [*listed_paths(folder), *([folder / image.file] if image else [])]
    files = {path.relative_to(folder).as_posix(): _listed_file(path) for path in paths}
    manifest = Manifest(files=files, image=image)
    write_text(folder / NAME, manifest_text(manifest))
    return manifest


def update_manifest(folder: Path, path: Path) -> None:
    """Enter `path` of the folder anew after a tool of this package rewrote it. A folder without a manifest stays without."""
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        files = {**manifest.files, path.relative_to(folder).as_posix(): _listed_file(path)}
        write_text(folder / NAME, manifest_text(Manifest(files=files, image=manifest.image)))


def listed_paths(folder: Path) -> list[Path]:
    """The files that a manifest of the folder names, sorted; a link counts as its file, linked folders of triton/ are listed once."""
    paths = {path for pattern in LISTED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not any(path.match(pattern) for pattern in LEFT_OUT))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        PcrExportError: there is none, as long as an export has not ended, a byte is not as it was written, or it names a file outside.
    """
    path = folder / NAME
    if not path.exists():
        raise PcrExportError(_why_there_is_none(folder))
    try:
        text = read_text(path, advice=_copy_again(folder))
        content = parse_json(text)
        if content["format"] != FORMAT:
            raise PcrExportError(f"{path} has format {content['format']}, this version reads {FORMAT}: export again")
        image = content["image"]
        manifest = Manifest(
            files={name: ListedFile(**facts) for name, facts in content["files"].items()},
            image=None if image is None else StoredImage(**image),
        )
        damaged = text != manifest_text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PcrExportError(f"{path} is damaged ({type(error).__name__}): {_copy_again(folder)}") from error
    if damaged:
        raise PcrExportError(f"{path} is not as it was written: {_copy_again(folder)}")
    for name in (*manifest.files, *([manifest.image.file] if manifest.image else [])):
        file_below(folder, name)
    return manifest


def _why_there_is_none(folder: Path) -> str:
    if not any((folder / name).exists() for name in OF_AN_EXPORT):
        model = folder if (folder / "model_index.json").is_file() else "MODEL"
        return f"{folder} is no exported folder: make one with `pcr-export {model}`"
    command = last_command(folder)
    again = f"run `{command}` again, or wait for its end" if command else "run the export again"
    return f"{folder}: this export is not finished (it has no {NAME}): {again}"


def file_below(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`. Raises PcrExportError where it leads out of it.

    It may be a link, as every file is in the hub's cache: what counts is that its bytes have the sha256 of the manifest.
    """
    if not is_name_inside(name):
        raise PcrExportError(f"{folder / NAME} names {name!r}, which lies outside the folder: don't use this folder")
    return folder / name


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hash every file of the manifest. Raises PcrExportError (exit code 3) that names those that differ."""
    found = [fault for name, listed in manifest.files.items() if (fault := _damage(folder, name, listed))]
    if found:
        raise PcrExportError(f"{_few(folder, found)}: {_copy_again(folder)}", exit_code=3)


def _damage(folder: Path, name: str, listed: ListedFile, hashed_bytes: float = math.inf) -> str | None:
    """How a file differs from the manifest: missing, of another size, or, where it has at most `hashed_bytes`, with other bytes."""
    path = file_below(folder, name)
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != listed.bytes:
        return f"{name} has {size} bytes, not {listed.bytes}"
    if size <= hashed_bytes and (digest := hash_file(path)) != listed.sha256:
        return f"{name} has sha256 {digest[:12]}, not {listed.sha256[:12]}"
    return None


def _few(folder: Path, faults: Sequence[str]) -> str:
    """The first three of them."""
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return f"{folder}: {'; '.join(faults[:3])}{more}"


def _listed_file(path: Path) -> ListedFile:
    return ListedFile(sha256=hash_file(path), bytes=path.stat().st_size)


def manifest_text(manifest: Manifest) -> str:
    """The one spelling of a manifest; its own hash closes it, so that no byte can change unseen."""
    content: dict[str, Any] = {"format": FORMAT, **asdict(manifest)}
    content["files"] = {name: content["files"][name] for name in sorted(content["files"])}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def _copy_again(folder: Path) -> str:
    return "copy the folder again from where it is whole, or export it again"
