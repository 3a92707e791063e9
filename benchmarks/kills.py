"""Commands that are killed, at random moments or at one file operation after the other; what readers then say, and how resumes end.

Processes are forked from one that has imported everything, loaded the models and (but for the study's) traced their graphs, which
writes no file: no kill is spent on that. A command runs in a process group of its own, which gets SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = Path(
    "out"
)  # where every command writes to, below the folder that it runs in: so that no path differs between runs
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
PROMPTS = ("a red cat", "a dog", "a blue sea", "a tree")
STUDY = ("--steps", "2", "--calib-size", "4", "--images", "2", "--schemes", "static-minmax")
TEMPORARY = re.compile(r"\.pcr-[0-9a-f]{16}\.tmp")
REFUSED, OF_BEFORE, OF_AFTER, OF_NEITHER = "refused", "of before", "of after", "of neither"


@dataclass(frozen=True)
class Command:
    """What is killed. It runs in a folder of its own and writes to OUT there."""

    name: str
    run: Callable[[], object]  # in the working directory
    share: float = 0.0  # of all kills at random moments
    before: Callable[[], object] | None = None  # what made OUT before; None: there is none yet
    readers: Mapping[str, Callable[[Path], bytes]] = field(default_factory=dict)  # what each of them makes of a folder


def commands(work: Path) -> list[Command]:
    """Every kind of job that writes a folder, on random models of a few hundred kB."""
    sys.path.insert(0, str(ROOT / "tests"))
    from class_conditional import class_conditional_denoiser
    from exported_tiny_sdxl import add_clip
    from models.tiny_pipelines import tiny_sdxl

    import pcr_export.study_table  # noqa: F401 - before the fork
    from pcr_export.engine_settings import EngineSettings
    from pcr_export.export import export_denoiser
    from pcr_export.export_job import Job
    from pcr_export.export_pipeline import export_pipeline, pipeline_job
    from pcr_export.graph.to_onnx import trace_float_onnx
    from pcr_export.models.catalog import resolve
    from pcr_export.models.load import load_model
    from pcr_export.qdiffbench.evaluate import Evaluation, evaluate_folder
    from pcr_export.recipe import Recipe

    source = tiny_sdxl(work / "models" / "random")
    add_clip(source / "clip_vision")
    sampling = {"num_inference_steps": 3, "guidance_scale": 1.5, "height": 16, "width": 16}
    model, denoiser = load_model(replace(resolve(str(source)), **sampling)), class_conditional_denoiser()
    size = {**sampling, "min_sqnr_db": 0.0}
    recipe = Recipe(model="toy", **{**size, "num_inference_steps": 5})
    small = Job(denoiser=denoiser, recipe=recipe, conditions=[0, 1, 2, 3], folder=OUT)
    pipeline = pipeline_job(model, Recipe(model=str(source), calib_size=4, **size), PROMPTS, OUT)
    graphs = [
        trace_float_onnx(each.denoiser, next(each.denoiser.walk(each.conditions[:2], [0, 1])))
        for each in (small, pipeline)
    ]
    small, pipeline = (
        replace(each, float_graph=lambda graph=graph: graph)
        for each, graph in zip((small, pipeline), graphs, strict=True)
    )
    built = replace(small, engines=EngineSettings(backend="tensorrt-rtx", targets=("sm89",)), validate=False)

    def otherwise(job: Job) -> Job:
        return replace(job, recipe=replace(job.recipe, ranges="minmax", relax="last:1"))

    def export_both() -> object:
        return export_pipeline(pipeline, model, PROMPTS[:2])

    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]) + "\n", "utf-8")
    evaluation = Evaluation(folder=OUT, prompts=(prompts,), model=str(source))
    of_a_pipeline = {"inspect": inspected, "generate": painted, "load_pipeline": loaded, "Triton": served}
    return [
        Command("export of a denoiser", lambda: export_denoiser(small), 0.66, None, {"inspect": inspected}),
        Command("export of a pipeline", export_both, 0.12, None, of_a_pipeline),
        Command("export and engine build", lambda: export_denoiser(built), 0.16, None, {"inspect": inspected}),
        Command("study", lambda: program("study", source, "--out", OUT, *STUDY), 0.06),
        Command(
            "denoiser exported again, otherwise",
            lambda: export_denoiser(otherwise(small)),
            0.0,
            lambda: export_denoiser(small),
            {"inspect": inspected},
        ),
        Command(
            "pipeline exported again, otherwise",
            lambda: export_pipeline(otherwise(pipeline), model, PROMPTS[:2], parts="fp16"),
            0.0,
            export_both,
            of_a_pipeline,
        ),
        Command("evaluate", lambda: evaluate_folder(evaluation, None), 0.0, export_both, of_a_pipeline),
    ]


def inspected(folder: Path) -> bytes:
    """What `inspect` tells of a folder, without times."""
    from pcr_export.deploy.inspect_folder import inspect_folder

    facts = inspect_folder(folder)
    files = {name: each for name, each in (facts["files"] or {}).items() if not name.endswith(".json")}
    return _without_times(json.dumps({**facts, "files": files, "parts": None}).encode())


def painted(folder: Path) -> bytes:
    """The pixels that `generate` paints."""
    from pcr_export.deploy.run import generate

    return generate(folder, PROMPTS[0], seed=1).tobytes()


def loaded(folder: Path) -> bytes:
    """The same pixels by the pipeline of `load_pipeline`, run as diffusers' own."""
    import torch

    from pcr_export.deploy.pipeline import load_pipeline

    pipeline = load_pipeline(folder, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS[0],
        height=16,
        width=16,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    return images.tobytes()


def served(folder: Path) -> bytes:
    """The pixels that Triton's model of the pipeline answers with."""
    from pcr_export.deploy.triton_requests import Picture, load_served_model, paint_requests

    model = load_served_model(folder, {}, lambda *_arguments: {})
    picture = Picture(prompt=PROMPTS[0], negative_prompt="", seed=1, steps=3, guidance_scale=1.5)
    (answer,) = paint_requests(model, [[picture]], lambda _request: False)
    if isinstance(answer, Exception):
        raise answer
    return answer.tobytes()


def program(*arguments: object) -> None:
    """The command line, in this process."""
    from pcr_export.cli import main

    sys.argv = ["pcr-export", *map(str, arguments)]
    main()


def run_in(
    folder: Path, run: Callable[[], object], kill_after: float | None = None, before: Callable[[], None] | None = None
) -> tuple[int, float]:
    """Fork, `run` in `folder`, kill its process group after so many seconds; (exit status, seconds that it ran).

    Args:
        before: is called in the child before `run`.
    """
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
            if before is not None:
                before()
            run()
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # children of one that killed itself
            return os.waitstatus_to_exitcode(status), seconds
        if kill_after is not None and seconds >= kill_after:
            with contextlib.suppress(ProcessLookupError):  # a moment after the fork the child leads no group yet
                os.killpg(pid, signal.SIGKILL)
                kill_after = None
        time.sleep(0.002)


def watch_operations(folder: Path, told: Callable[[int, str], None]) -> None:
    """Call `told` with the number, from 0, and the words of each operation of this process that changes a file below `folder`, before it.

    Python's audit events tell of them: opening for writing, renaming, removing, making folders and links. They can't be taken off.
    """
    root, count = str(folder.absolute()), iter(range(sys.maxsize))
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = bool(arguments[2] & writes)
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link")
        if not changes:
            return
        path = arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0]
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(root):
            told(next(count), TEMPORARY.sub(".pcr-*.tmp", f"{event} {os.path.relpath(path, root)}"))

    sys.addaudithook(hook)


def look_before_operations(folder: Path, run: Callable[[], object], *, keep: bool) -> list[tuple[str, Path]]:
    """Run it undisturbed; its operations, and for each the copy of OUT as it lay before it, which is what a kill there leaves.

    Args:
        keep: False: nothing is copied.
    """
    listing, copies = folder / "operations.txt", folder / "copies"

    def before() -> None:
        log = listing.open("a", encoding="utf-8")

        def told(number: int, words: str) -> None:
            print(words, file=log, flush=True)
            if keep and OUT.exists():
                shutil.copytree(OUT, copies / f"{number:04d}" / OUT, symlinks=True)

        watch_operations(OUT, told)

    code, _ = run_in(folder, run, before=before)
    if code != 0:
        raise SystemExit(f"it fails undisturbed: see {folder / 'log.txt'}")
    return [(words, copies / f"{number:04d}") for number, words in enumerate(listing.read_text("utf-8").splitlines())]


def killed_at(number: int) -> Callable[[], None]:
    """What kills this process before its operation of that number."""

    def told(now: int, _words: str) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: watch_operations(OUT, told)


def operation_table(work: Path, only: Sequence[str], every: int) -> list[dict[str, Any]]:
    """A row for each command: what every reader makes of the folder as it lies before each file operation; and killed before every
    `every`th of them, how the resume ended."""
    rows = []
    for command in commands(work):
        if not only or command.name in only:
            rows.append(_at_operations(work / "operations" / command.name, command, every))
            print(operation_line(rows[-1]), flush=True)
    return rows


def _at_operations(place: Path, command: Command, every: int) -> dict[str, Any]:
    start, whole = place / "before", place / "whole"
    start.mkdir(parents=True)
    if command.before is not None and run_in(start, command.before)[0] != 0:
        raise SystemExit(f"{command.name} can't be prepared: see {start / 'log.txt'}")
    shutil.copytree(start, whole, symlinks=True)
    operations = look_before_operations(whole, command.run, keep=bool(command.readers))
    readers = {
        name: (reader, read_in(start, reader), read_in(whole, reader)) for name, reader in command.readers.items()
    }
    row: dict[str, Any] = {"command": command.name, "operations": len(operations), "looks": [], "kills": []}
    for words, folder in operations:
        if not (folder / OUT).exists():
            continue
        said = {name: verdict(read_in(folder, each[0]), *each[1:]) for name, each in readers.items()}
        row["looks"].append({"before": words, "readers": said})
        if OF_NEITHER in said.values():
            print(command.name, row["looks"][-1], folder, flush=True)
        else:
            shutil.rmtree(folder)
    expected = contents(whole / OUT)
    for number in range(0, len(operations), every):
        folder = place / f"kill-{number:04d}"
        shutil.copytree(start, folder, symlinks=True)
        killed, _ = run_in(folder, command.run, before=killed_at(number))
        code, _ = run_in(folder, command.run)
        differ = differences(folder / OUT, expected) if code == 0 else ["the resumed run failed"]
        row["kills"].append({"before": operations[number][0], "killed": killed == -signal.SIGKILL, "differ": differ})
        if differ:
            print(command.name, row["kills"][-1], folder, flush=True)
        else:
            shutil.rmtree(folder)
    return row


def operation_line(row: Mapping[str, Any]) -> str:
    """A row in words."""
    kills, said = row["kills"], [word for look in row["looks"] for word in look["readers"].values()]
    counts = ", ".join(f"{said.count(word)} {word}" for word in (REFUSED, OF_BEFORE, OF_AFTER, OF_NEITHER))
    return (
        f"  {row['command']}: {row['operations']} operations; readers: {counts}; "
        f"killed at {sum(kill['killed'] for kill in kills)} of them, resumes with other bytes: {sum(1 for kill in kills if kill['differ'])}"
    )


def read_in(folder: Path, reader: Callable[[Path], bytes]) -> bytes | None:
    """What a reader makes of OUT in `folder`, in a process of its own; None where it refuses it in one line. b"" where it fails."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)

    def read() -> None:
        from pcr_export.errors import PcrExportError

        try:
            answer.write_bytes(b"+" + reader(OUT))
        except PcrExportError as error:
            answer.write_bytes(b"-" + str(error).encode())

    code, _ = run_in(folder, read)
    content = answer.read_bytes() if code == 0 else b"+"
    answer.unlink(missing_ok=True)
    return content[1:] if content[:1] == b"+" else None


def verdict(found: bytes | None, before: bytes | None, after: bytes | None) -> str:
    """Whose artifact a reader met."""
    if found is None:
        return REFUSED
    return OF_BEFORE if found == before else OF_AFTER if found == after else OF_NEITHER


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` in the form in which it is compared.

    Wall-clock times, memory and what is computed from them (TIMES) are removed from JSON, and report.html is drawn again from a
    report.json without them; so are the hashes of JSON files in manifest.json.
    """
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


def differences(folder: Path, whole: Mapping[str, bytes]) -> list[str]:
    """The files that are not as in the undisturbed run."""
    there = contents(folder)
    return sorted(name for name in {*there, *whole} if there.get(name) != whole.get(name))


def kill_table(work: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """A row for each command: how often it was killed, when, how far it had come, and how many resumes ended with other bytes."""
    draw = random.Random(seed)
    return [
        _killed_at_moments(work / command.name, command, max(1, round(kills * command.share)), draw)
        for command in commands(work)
        if command.share
    ]


def _killed_at_moments(place: Path, command: Command, count: int, draw: random.Random) -> dict[str, Any]:
    code, seconds = run_in(place / "whole", command.run)
    if code != 0:
        raise SystemExit(f"{command.name} fails undisturbed: see {place / 'whole' / 'log.txt'}")
    whole = contents(place / "whole" / OUT)
    row: dict[str, Any] = {"command": command.name, "seconds": round(seconds, 1), "files": len(whole), "kills": []}
    for index in range(count):
        folder, moment = place / f"kill-{index:02d}", draw.uniform(0, seconds)
        killed, _ = run_in(folder, command.run, moment)
        left = sorted(names_below(folder / OUT))
        code, again = run_in(folder, command.run)
        differ = differences(folder / OUT, whole) if code == 0 else ["the resumed run failed"]
        kill = {
            "after": round(moment, 2),
            "killed": killed == -signal.SIGKILL,
            "files_left": len(left),
            "half_written": sum(".tmp" in name for name in left),
            "resumed_seconds": round(again, 1),
            "exit_code": code,
            "differ": differ,
        }
        row["kills"].append(kill)
        print(command.name, kill, flush=True)
        if not differ:
            shutil.rmtree(folder)
    return row


def names_below(folder: Path) -> Iterator[str]:
    """Every file below `folder`."""
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
