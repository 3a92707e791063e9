"""The house rules that a reader can rely on: heavy imports have one home each, and no arrow runs back up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pcr_export"

# A heavy import and the places that may have it; a folder ends with a slash.
HOMES = {
    "typer": ("cli.py", "cli_command.py", "cli_folder.py"),
    "rich": ("cli_folder.py", "terminal.py"),
    "torch": (
        "calibrate/",
        "models/",
        "graph/to_onnx.py",
        "engines/tensorrt_runner.py",
        "qdiffbench/",
        "deploy/",
        "export.py",
        "export_pipeline.py",
        "export_trial.py",
        "export_validation.py",
    ),
    "diffusers": ("models/", "deploy/"),
    "transformers": ("models/", "deploy/", "qdiffbench/features.py"),
    "torchmetrics": ("qdiffbench/distances.py", "qdiffbench/features.py"),
    "torch_fidelity": ("qdiffbench/features.py",),
    "matplotlib": ("qdiffbench/",),
    "jinja2": ("qdiffbench/page.py",),
    "ray": ("qdiffbench/workers.py",),
    "onnxruntime": ("engines/onnxruntime.py",),
    "onnx_ir": ("graph/", "deploy/", "engines/onnx_files.py"),
    "onnx": (),
    "onnxscript": ("graph/",),
    "tensorrt": ("engines/flavours.py",),
    "tensorrt_rtx": ("engines/flavours.py",),
    "polygraphy": ("engines/",),
}

# The rooms from top to bottom; a module imports from its own row and from rows below it only.
ROWS = [
    ("start.py", "__main__.py"),
    ("cli.py",),
    ("cli_command.py", "cli_folder.py"),
    ("terminal.py",),
    ("study_table.py",),
    ("study.py",),
    ("export_pipeline.py",),
    ("export.py",),
    ("export_engines.py", "export_results.py", "export_trial.py", "export_validation.py"),
    ("export_job.py",),
    ("qdiffbench/", "deploy/"),
    ("calibrate/", "graph/", "engines/", "request.py"),
    ("models/",),
    ("report.py", "prompts.py", "prompt_sets.py"),
    ("recipe.py", "engine_settings.py"),
    ("relaxed_steps.py", "scheduler_setting.py", "step_scales.py", "sites.py", "progress.py", "manifest.py"),
    ("report_schema.py", "stages.py", "folder_lock.py", "path_inside.py", "output_file.py", "usable_cpus.py"),
    ("read_files.py", "write_files.py"),
    ("errors.py", "stop_signals.py", "__init__.py"),
]


def imports_of(source: str) -> set[str]:
    """Every module that a source text imports at run time, wherever the import stands."""
    names = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update({f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)})
    return names


def is_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def heavy_imports_out_of_place(path: str, source: str) -> list[str]:
    roots = {name.split(".")[0] for name in imports_of(source)}
    return sorted(root for root in roots & set(HOMES) if not is_in(path, HOMES[root]))


def imports_that_run_up(path: str, source: str) -> list[str]:
    row = next(i for i, places in enumerate(ROWS) if is_in(path, places))
    wrong = set()
    for name in imports_of(source):
        if name.startswith("pcr_export."):
            target = name.removeprefix("pcr_export.").replace(".", "/")
            rows = [i for i, places in enumerate(ROWS) if is_in(target + ".py", places) or is_in(target + "/", places)]
            wrong.update(name for i in rows if i < row)
    return sorted(wrong)


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_the_rules(path):
    source = (PACKAGE / path).read_text("utf-8")
    if path.endswith("__init__.py"):
        return
    assert heavy_imports_out_of_place(path, source) == []
    assert imports_that_run_up(path, source) == []


def test_the_rules_can_fail():
    assert heavy_imports_out_of_place("recipe.py", "import torch") == ["torch"]
    assert heavy_imports_out_of_place("cli.py", "def f():\n    from diffusers import X") == ["diffusers"]
    assert imports_that_run_up("calibrate/ranges.py", "from pcr_export.export import Job") != []
    assert imports_that_run_up("models/load.py", "import pcr_export.calibrate.ranges") != []
    assert imports_that_run_up("export.py", "from pcr_export.models.denoiser import Denoiser") == []


def test_the_command_line_stays_light():
    code = "import sys, pcr_export.cli; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded.isdisjoint({"torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy"})


def test_functions_and_files_stay_readable():
    for path in MODULES:
        source = (PACKAGE / path).read_text("utf-8")
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path}: {node.name}"


def test_the_readme_maps_every_module():
    """One line per module: the first line of its docstring."""
    table = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    lines = {path: (PACKAGE / path).read_text("utf-8") for path in MODULES if not path.endswith("__init__.py")}
    assert dict(table) == {
        path: (ast.get_docstring(ast.parse(text)) or "").split("\n")[0] for path, text in lines.items()
    }
