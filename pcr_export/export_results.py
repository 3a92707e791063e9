"""The files that tell of a finished export: gone before its graph changes, there again when what they tell of is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pcr_export.manifest import NAME as MANIFEST
from pcr_export.recipe import Recipe
from pcr_export.stages import Facts
from pcr_export.write_files import write_bytes, write_text

RECIPE, SENSITIVITY = "recipe.json", "sensitivity.json"
OF_THE_REPORT = (
    MANIFEST,
    "report.json",
    "report.html",
)  # made last; the first one goes first: without it no reader believes the rest
OF_THE_GRAPH = (*OF_THE_REPORT, RECIPE, "evaluation.json", SENSITIVITY)


def forget_results(folder: Path) -> None:
    """Remove what tells of the scales and the graph that are about to be replaced.

    A run that is stopped from here on leaves a folder without a manifest, which every reader refuses, instead of one that pairs a
    recipe or a report with the graph of another.
    """
    for name in OF_THE_GRAPH:
        (folder / name).unlink(missing_ok=True)


def forget_report(folder: Path) -> None:
    """Remove what tells of the parts, images or engines that are about to be replaced."""
    for name in OF_THE_REPORT:
        (folder / name).unlink(missing_ok=True)


def after_forgetting_report(folder: Path, action: Callable[[], Facts]) -> Callable[[], Facts]:
    """`action`, which replaces something that the manifest lists, and `forget_report` before it."""

    def run() -> Facts:
        forget_report(folder)
        return action()

    return run


def publish(path: Path, text: str) -> None:
    """Write a file at the top of an export, whose manifest goes first where the file was another."""
    data = text.encode()
    if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
        forget_report(path.parent)
        write_text(path, text)


def publish_recipe(folder: Path, recipe: Recipe, searched: Path | None) -> None:
    """Write recipe.json, and sensitivity.json, beside the graph that is there now.

    Args:
        searched: the search of relaxed steps that the graph was made with; None where nothing was searched.
    """
    publish(folder / RECIPE, recipe.to_json())
    if searched is None:
        (folder / SENSITIVITY).unlink(missing_ok=True)
    else:
        write_bytes(folder / SENSITIVITY, searched.read_bytes())
