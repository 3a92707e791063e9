"""The files that tell of a finished export: gone before its graph changes, there again when what they tell of is there."""

from __future__ import annotations

from pathlib import Path

from pcr_export.recipe import Recipe
from pcr_export.stages import write_bytes, write_text

RECIPE, SENSITIVITY = "recipe.json", "sensitivity.json"
OF_THE_REPORT = ("manifest.json", "report.json", "report.html")  # made last
OF_THE_GRAPH = (RECIPE, *OF_THE_REPORT, "evaluation.json", SENSITIVITY)


def forget_results(folder: Path) -> None:
    """Remove what tells of the scales and the graph that are about to be replaced.

    A run that is stopped from here on leaves a folder without a recipe, which every reader refuses, instead of one that pairs a recipe
    or a report with the graph of another.
    """
    for name in OF_THE_GRAPH:
        (folder / name).unlink(missing_ok=True)


def forget_report(folder: Path) -> None:
    """Remove what tells of the images, or of the recipe, that are about to be replaced."""
    for name in OF_THE_REPORT:
        (folder / name).unlink(missing_ok=True)


def publish_recipe(folder: Path, recipe: Recipe, searched: Path | None) -> None:
    """Write recipe.json, and sensitivity.json, beside the graph that is there now.

    Args:
        searched: the search of relaxed steps that the graph was made with; None where nothing was searched.
    """
    path, text = folder / RECIPE, recipe.to_json()
    if not path.is_file() or path.read_bytes() != text.encode():
        forget_report(folder)
    if searched is None:
        (folder / SENSITIVITY).unlink(missing_ok=True)
    else:
        write_bytes(folder / SENSITIVITY, searched.read_bytes())
    write_text(path, text)
