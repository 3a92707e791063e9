"""The guard for names that files hold of other files: none leads out of its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from pcr_export.errors import PcrExportError


def is_name_inside(name: object) -> bool:
    """Whether `name`, read as a text alone, names something below the folder that it is looked for in.

    Links are no matter: whoever lays a folder out makes them, as the hub's cache does, where every file of a snapshot is a link into
    `blobs/`; no file that is read can name a target for one.
    """
    if not isinstance(name, str) or "\0" in name or "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def path_inside(folder: Path, name: object, source: Path) -> Path:
    """The file or folder `name` of `folder`, as the file `source` names it. Raises PcrExportError where it is none or leads outside."""
    if not is_name_inside(name):
        raise PcrExportError(
            f"{source} names {name!r}, which does not lie in {folder}: fetch or export the folder again"
        )
    return folder / str(name)
