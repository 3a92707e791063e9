"""pyproject.toml says what is true: everything has a floor and a bound, and the wheel works with the floors (minutes, downloads)."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements(project: dict) -> Iterator[Requirement]:
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, lines)


def unbounded(project: dict) -> set[str]:
    """The names of what has not one floor and one bound above it, or another range elsewhere in the table."""
    ranges: dict[str, set[str]] = {}
    for wanted in requirements(project):
        ranges.setdefault(wanted.name, set()).add(str(wanted.specifier))
    return {name for name, found in ranges.items() if len(found) > 1 or sorted(map(operators, found)) != [["<", ">="]]}


def operators(specifier: str) -> list[str]:
    return sorted(each.operator for each in Requirement(f"name{specifier}").specifier)


def test_everything_has_a_floor_and_a_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert unbounded(project) == set()
    wrong = {
        "dependencies": ["torch>=2.10", "rich>=14,<16", "onnx"],
        "optional-dependencies": {"dev": ["rich>=13,<16"]},
    }
    assert unbounded(wrong) == {"torch", "rich", "onnx"}


@pytest.mark.slow
def test_the_wheel_works_with_the_lowest_versions() -> None:
    done = subprocess.run(["bash", "scripts/check.sh", "--lowest"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)  # also which Pythons it skipped
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": lora: export" in done.stdout
