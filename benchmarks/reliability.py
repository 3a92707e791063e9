"""Bad days, measured: kill -9 at random moments, a full disk, two writers at once, and bad input; one command, four tables.

    python benchmarks/reliability.py --kills 50 --json benchmarks/results/reliability.json

A kill: a command runs in a process group of its own, which gets SIGKILL at a random moment of the undisturbed run's duration; then the
same command runs to its end, and every file of its folder is compared with the undisturbed run's, byte by byte. Processes are forked from
one that has imported everything, loaded the models and (but for the study's) traced their graphs, which writes no file: no kill is
spent on that.

What is compared in another form: wall-clock times, memory and what is computed from them (TIMES) are removed from JSON first, and
report.html is drawn again from a report.json without them; so are the hashes of JSON files in manifest.json.

The other tables are the tests of tests/test_bad_days_*.py, with the line that each of them ended in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMES = {
    "seconds",
    "calibration_seconds",
    "build_seconds",
    "parse_seconds",
    "peak_memory_bytes",
    "float_peak_memory_bytes",
    "peak_bytes",
    "p50",
    "p95",
    "speedup",
}
DRAWN = "report.html"  # from report.json or study.json
MANIFEST = "manifest.json"
TABLES = {
    "disk": "tests/test_bad_days_disk.py",
    "concurrency": "tests/test_bad_days_lock.py",
    "bad input": "tests/test_bad_days_input.py",
    "cache": "tests/test_bad_days_cache.py",
}


@dataclass(frozen=True)
class Command:
    """What is killed. It runs in a folder of its own and writes to `out` there, so that no path differs between runs."""

    name: str
    run: Callable[[], object]  # in the working directory
    share: float  # of all kills


def commands(work: Path) -> list[Command]:
    """Every kind of job that writes a folder, on random models of a few hundred kB.

    All that they need is imported here, the models are loaded and their float graphs traced, which writes no file.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from class_conditional import class_conditional_denoiser
    from exported_tiny_sdxl import add_clip
    from models.tiny_pipelines import tiny_sdxl

    import pcr_export.study_table  # noqa: F401
    from pcr_export.engine_settings import EngineSettings
    from pcr_export.export import export_denoiser
    from pcr_export.export_job import Job
    from pcr_export.export_pipeline import export_pipeline, pipeline_job
    from pcr_export.graph.to_onnx import trace_float_onnx
    from pcr_export.models.catalog import resolve
    from pcr_export.models.load import load_model
    from pcr_export.recipe import Recipe

    source, out = tiny_sdxl(work / "models" / "random"), Path("out")
    add_clip(source / "clip_vision")
    sampling = {"num_inference_steps": 3, "guidance_scale": 1.5, "height": 16, "width": 16}
    model, denoiser = load_model(replace(resolve(str(source)), **sampling)), class_conditional_denoiser()
    size = {**sampling, "min_sqnr_db": 0.0}
    small = Job(
        denoiser=denoiser,
        recipe=Recipe(model="toy", **{**size, "num_inference_steps": 5}),
        conditions=[0, 1, 2, 3],
        folder=out,
    )
    pipeline = pipeline_job(model, Recipe(model="random", calib_size=4, **size), PROMPTS, out)
    graphs = [
        trace_float_onnx(each.denoiser, next(each.denoiser.walk(each.conditions[:2], [0, 1])))
        for each in (small, pipeline)
    ]
    small, pipeline = (
        replace(each, float_graph=lambda graph=graph: graph)
        for each, graph in zip((small, pipeline), graphs, strict=True)
    )
    built = replace(small, engines=EngineSettings(backend="tensorrt-rtx", targets=("sm89",)), validate=False)
    return [
        Command("export of a denoiser", lambda: export_denoiser(small), 0.66),
        Command("export of a pipeline", lambda: export_pipeline(pipeline, model, PROMPTS[:2]), 0.12),
        Command("export and engine build", lambda: export_denoiser(built), 0.16),
        Command("study", lambda: program("study", source, "--out", out, *STUDY), 0.06),
    ]


PROMPTS = ("a red cat", "a dog", "a blue sea", "a tree")
STUDY = ("--steps", "2", "--calib-size", "4", "--images", "2", "--schemes", "static-minmax")


def program(*arguments: object) -> None:
    """The command line, in this process."""
    from pcr_export.cli import main

    sys.argv = ["pcr-export", *map(str, arguments)]
    main()


def run_in(folder: Path, command: Command, kill_after: float | None = None) -> tuple[int, float]:
    """Fork, run `command` in `folder`, kill its process group after so many seconds; (exit status, seconds that it ran)."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            command.run()
            os._exit(0)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if kill_after is not None and seconds >= kill_after:
            with contextlib.suppress(ProcessLookupError):  # a moment after the fork the child leads no group yet
                os.killpg(pid, signal.SIGKILL)
                kill_after = None
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` in the form in which it is compared."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DRAWN:
            data = path.read_bytes()
            if path.name == MANIFEST:
                data = _without_hashes_of_json(data)
            found[str(path.relative_to(folder))] = _without_times(data) if path.suffix == ".json" else data
    return found | {str(path.relative_to(folder)): _drawn(path) for path in folder.rglob(DRAWN)}


def _without_hashes_of_json(data: bytes) -> bytes:
    """A manifest without its own hash and those of files that hold times."""
    manifest = json.loads(data)
    files = {name: each for name, each in manifest["files"].items() if not name.endswith(".json")}
    return json.dumps({**manifest, "files": files, "sha256": ""}).encode()


def _without_times(data: bytes) -> bytes:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: 0 if name in TIMES else clean(each) for name, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return json.dumps(clean(json.loads(data)), indent=2).encode()


def _drawn(path: Path) -> bytes:
    """The page of an export as it is drawn from a report without times; a study's shows none."""
    if not (path.parent / "report.json").exists():
        return path.read_bytes()
    from pcr_export.qdiffbench.html_report import write_html_report

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(path.parent, Path(temporary) / path.parent.name))
        report = copy / "report.json"
        report.write_bytes(_without_times(report.read_bytes()))
        return write_html_report(copy).read_bytes()


def differences(folder: Path, whole: dict[str, bytes]) -> list[str]:
    """The files that are not as in the undisturbed run."""
    there = contents(folder)
    return sorted(name for name in {*there, *whole} if there.get(name) != whole.get(name))


def kill_table(work: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """A row for each command: how often it was killed, when, how far it had come, and how many resumes ended with other bytes."""
    draw, rows = random.Random(seed), []
    for command in commands(work):
        code, seconds = run_in(work / command.name / "whole", command)
        if code != 0:
            raise SystemExit(f"{command.name} fails undisturbed: see {work / command.name / 'whole' / 'log.txt'}")
        whole = contents(work / command.name / "whole" / "out")
        row: dict[str, Any] = {"command": command.name, "seconds": round(seconds, 1), "files": len(whole), "kills": []}
        for index in range(max(1, round(kills * command.share))):
            folder, moment = work / command.name / f"kill-{index:02d}", draw.uniform(0, seconds)
            killed, _ = run_in(folder, command, moment)
            left = sorted(contents_names(folder / "out"))
            code, again = run_in(folder, command)
            differ = differences(folder / "out", whole) if code == 0 else ["the resumed run failed"]
            row["kills"].append(
                {
                    "after": round(moment, 2),
                    "killed": killed == -signal.SIGKILL,
                    "files_left": len(left),
                    "half_written": sum(name.endswith((".tmp", ".saving")) or ".saving/" in name for name in left),
                    "resumed_seconds": round(again, 1),
                    "exit_code": code,
                    "differ": differ,
                }
            )
            print(command.name, row["kills"][-1], flush=True)
            if not differ:
                shutil.rmtree(folder)
        rows.append(row)
    return rows


def contents_names(folder: Path) -> list[str]:
    """Every file below `folder`."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_table(path: str, work: Path) -> list[dict[str, Any]]:
    """The tests of one file: name, outcome and the line that was told."""
    report = work / f"{Path(path).stem}.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", path],
        cwd=ROOT,
        check=False,
    )
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        lines = [each.get("value", "") for each in case.iter("property") if each.get("name") == "line"]
        rows.append({"case": case.get("name"), "outcome": bad[0] if bad else "passed", "line": " ".join(lines)[:300]})
    return rows


def summary(result: dict[str, Any]) -> list[str]:
    """What is printed and quoted: a line for each row."""
    lines = [
        "kills: command, undisturbed seconds, kills, caught running, left a half-written file, resumes with other bytes"
    ]
    for row in result.get("kills", []):
        kills = row["kills"]
        killed, half, other = (sum(1 for each in kills if each[name]) for name in ("killed", "half_written", "differ"))
        lines.append(f"  {row['command']}: {row['seconds']} s, {len(kills)}, {killed}, {half}, {other}")
    for table in TABLES:
        rows = result.get(table, [])
        passed, skipped = (sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "skipped"))
        lines.append(f"{table}: {len(rows)} cases, {passed} as expected, {skipped} skipped")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write them; 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="where the tables go")
    parser.add_argument(
        "--tables", nargs="*", default=["kills", *TABLES], help="these alone; others stay as the file has them"
    )
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="reliability-") as temporary:
        work = Path(temporary)
        for name, path in TABLES.items():
            if name in options.tables:
                result[name] = test_table(path, work)
        if "kills" in options.tables:
            result["kills"] = kill_table(work, options.kills, options.seed)
    result = {name: result[name] for name in ("kills", *TABLES) if name in result}
    print(*summary(result), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    wrong = [each for row in result.get("kills", []) for each in row["kills"] if each["differ"]]
    failed = [row for name in TABLES for row in result.get(name, []) if row["outcome"] in ("failure", "error")]
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
