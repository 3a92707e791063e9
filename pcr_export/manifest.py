"""manifest.json: sha256 and bytes of every file of an exported folder that deployment reads; written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.path_inside import is_name_inside
from pcr_export.stages import hash_file, write_text

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
        PcrExportError: there is none, a byte of it is not as it was written, or it names a file outside the folder.
    """
    path = folder / NAME
    if not path.is_file():
        raise PcrExportError(f"{folder} has no {NAME}, so no export ended there: run the export again")
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise PcrExportError(f"{path} has format {content['format']}, this version reads {FORMAT}: export again")
        image = content["image"]
        manifest = Manifest(
            files={name: ListedFile(**facts) for name, facts in content["files"].items()},
            image=None if image is None else StoredImage(**image),
        )
        damaged = text != manifest_text(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PcrExportError(f"{path} is damaged ({type(error).__name__}): {_copy_again(folder)}") from error
    if damaged:
        raise PcrExportError(f"{path} is not as it was written: {_copy_again(folder)}")
    for name in (*manifest.files, *([manifest.image.file] if manifest.image else [])):
        file_below(folder, name)
    return manifest


def file_below(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`. Raises PcrExportError where it leads out of it.

    It may be a link, as every file is in the hub's cache: what counts is that its bytes have the sha256 of the manifest.
    """
    if not is_name_inside(name):
        raise PcrExportError(f"{folder / NAME} names {name!r}, which lies outside the folder: don't use this folder")
    return folder / name


def damages(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What differs from the manifest, a line for each file: missing, of another size, or with other bytes."""
    for name, listed in manifest.files.items():
        path = file_below(folder, name)
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != listed.bytes:
            yield f"{name} has {size} bytes, not {listed.bytes}"
        elif (digest := hash_file(path)) != listed.sha256:
            yield f"{name} has sha256 {digest[:12]}, not {listed.sha256[:12]}"


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hash every file of the manifest. Raises PcrExportError (exit code 3) that names those that differ."""
    found = list(damages(folder, manifest))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise PcrExportError(f"{folder}: {'; '.join(found[:3])}{more}: {_copy_again(folder)}", exit_code=3)


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
