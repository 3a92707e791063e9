"""A folder laid out as huggingface_hub lays out its cache: blobs named by their hashes, and relative links to them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

REVISION = "0123456789" * 4
LARGE = (".safetensors", ".onnx", ".onnx_data", ".bin")  # what git-lfs keeps, by sha256


def cache_of(
    hub: Path,
    hub_id: str,
    folder: Path,
    *,
    revision: str = REVISION,
    branch: str = "main",
    has: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Lay `folder` out as a download of the repository `hub_id`, whose listing names every file; `has` tells which were downloaded.

    Returns:
        The snapshot.
    """
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    listing = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        sha1, sha256 = blob_names(path.read_bytes())
        listing[name] = {"size": path.stat().st_size, "blob_id": sha1}
        if path.suffix in LARGE:
            listing[name] |= {"lfs_sha256": sha256, "lfs_size": path.stat().st_size}
        if has(name):
            blob = repository / "blobs" / (sha256 if path.suffix in LARGE else sha1)
            shutil.copyfile(path, blob)
            link = repository / "snapshots" / revision / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    for place, text in {f"refs/{branch}": revision, f"trees/{revision}.json": listing_text(listing)}.items():
        (repository / place).parent.mkdir(exist_ok=True)
        (repository / place).write_text(text, "utf-8")
    return repository / "snapshots" / revision


def listing_text(listing: dict[str, dict[str, object]]) -> str:
    """The repository's files as a later huggingface_hub keeps them, so that it knows offline what is missing."""
    return json.dumps({"format_version": 1, "files": listing})


def blob_names(data: bytes) -> tuple[str, str]:
    """git's sha1 of a blob and the sha256 of its bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()
