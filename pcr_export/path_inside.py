"""The guard for names that files hold of other files: none leads out of its folder."""

from __future__ import annotations

from pathlib import Path

from pcr_export.errors import PcrExportError


def path_inside(folder: Path, name: object, source: Path) -> Path:
    """The file or folder `name` of `folder`, as the file `source` names it. Raises PcrExportError where it is none or leads outside."""
    if (
        not isinstance(name, str)
        or not name
        or "\0" in name
        or not (folder / name).resolve().is_relative_to(folder.resolve())
    ):
        raise PcrExportError(
            f"{source} names {name!r}, which does not lie in {folder}: fetch or export the folder again"
        )
    return folder / name
