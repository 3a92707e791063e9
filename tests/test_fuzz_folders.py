"""Every file of a folder x every command, changed at random from one seed: done, or one line, and never a traceback or a hang."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import Change, changes, run_command
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pcr_export.manifest import read_manifest, write_manifest

IMPORTED = (  # before the first fork, so that no child spends seconds on it
    "pcr_export.cli",
    "pcr_export.deploy.inspect_folder",
    "pcr_export.deploy.run",
    "pcr_export.deploy.verify",
    "pcr_export.engines.compare",
    "pcr_export.export_pipeline",
    "pcr_export.qdiffbench.distances",
    "pcr_export.qdiffbench.evaluate",
    "pcr_export.qdiffbench.judge",
)
SUFFIXES = (".json", ".onnx", ".safetensors", ".pbtxt", ".txt", ".onnx_data")
SAMPLING = ("--steps", 2, "--calib-size", 2, "--height", 16, "--width", 16, "--no-validate", "--relax", "none")
# command -> its arguments in the folder, the files that it reads, how many changes are tried, seconds that it may take
SETTINGS = ("*.json", "step_scales.safetensors", "scheduler/*", "tokenizer*/*", "*/config.json")
EXPORTED = {
    "inspect": (("inspect", "folder"), ("*.json", "step_scales.safetensors", "unet/*.json"), 150, 30),
    "verify": (("verify", "folder"), (*SETTINGS, "*/*.onnx*", "unet/*.json", "unet/tensorrt/*"), 60, 90),
    "generate": (("generate", "folder", "a red cat", "-o", "out.png"), (*SETTINGS, "*/model.onnx*"), 80, 90),
    "evaluate": (("evaluate", "folder", "--prompts", "p.txt", "--model", "model"), SETTINGS, 12, 180),
    "compare": (("compare", "folder"), ("*.safetensors", "unet/*.json", "unet/*.onnx", "unet/*/model.onnx*"), 16, 90),
}
SOURCE = {
    "export --dry-run": (("export", "folder", "--dry-run", *SAMPLING), ("*.json",), 16, 60),
    "export": (("export", "folder", "--out", "out", *SAMPLING), ("**/*",), 24, 180),
}


def files_of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files that are changed, JSON twice as often as others: each says something else."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    paths = sorted(path for path in found if path.is_file() and path.suffix in SUFFIXES)
    return [path for path in paths for _ in range(2 if path.suffix == ".json" else 1)]


def fuzz(
    folder: Path, model: Path, work: Path, command: str, table: dict
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Outcomes by file, and what is wrong with those that are."""
    arguments, patterns, examples, seconds = table[command]
    for name in IMPORTED:
        importlib.import_module(name)
    outcomes: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[Path, Change]:
        path = draw(st.sampled_from(files_of(folder, patterns)))
        return path, draw(changes(path))

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def one(case: tuple[Path, Change]) -> None:
        path, change = case
        name = path.relative_to(folder).as_posix()
        shutil.rmtree(work, ignore_errors=True)
        copy = Path(shutil.copytree(folder, work / "folder"))
        (work / "p.txt").write_text("a red cat\na dog\n")
        (work / "model").symlink_to(model)
        change.apply(copy / name)
        if name != "manifest.json" and (copy / "manifest.json").is_file():
            with contextlib.suppress(OSError):
                write_manifest(copy, read_manifest(folder).image)  # as whoever can change a file can
        outcome = run_command(arguments, work, seconds=seconds)
        kind = "wrong" if outcome.fault else "done" if outcome.code == 0 else "a line"
        outcomes[path.name, kind] += 1
        if outcome.fault:
            faults.append(f"{command}, {name}, {change.words}: {outcome.fault}")

    one()
    return outcomes, faults


def report(outcomes: Counter[tuple[str, str]]) -> str:
    """Counts by file."""
    names = sorted({name for name, _ in outcomes})
    kinds = ("done", "a line", "wrong")
    return "; ".join(f"{name}: " + ", ".join(f"{outcomes[name, kind]} {kind}" for kind in kinds) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*EXPORTED, *SOURCE])
def test_a_changed_folder(command: str, exported: Path, tmp_path: Path, record_property: Callable) -> None:
    model = exported.parents[1] / "models" / "random"
    folder, table = (exported, EXPORTED) if command in EXPORTED else (model, SOURCE)
    outcomes, faults = fuzz(folder, model, tmp_path / "work", command, table)
    record_property("line", report(outcomes))
    print(command, report(outcomes))
    assert not faults, "\n".join(faults)
