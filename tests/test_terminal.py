"""The terminal is not the folder's to command: what is hostile in a name is printed as text; every fault is one line."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from rich.text import Text

from pcr_export.cli import main
from pcr_export.engines.child_process import child_environment
from pcr_export.errors import FAULT, PcrExportError, PromptWarning, explain
from pcr_export.manifest import write_manifest
from pcr_export.terminal import print_rows, printable, say, say_error, show_warning, status, track

HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil\x1b\\[bold]x[/bold][/][link=http://evil]y\x9b31m\u202e\u2066\u200b\x00\udc9b\nFORGED"
SHOWN = r"\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil\x1b\[bold]x[/bold][/][link=http://evil]y\x9b31m\u202e\u2066\u200b\x00\udc9b\nFORGED"
FREE = HOSTILE.replace("\udc9b", "")  # what a JSON file may hold
RAW = ("\x1b]", "\x07", "\x1b\\", "\x9b", "\u202e", "\u2066", "\u200b", "\x00", "\udc9b", "\nFORGED")


def run(*arguments: object, limit: int | None = None, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pcr_export", *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    environment = {**child_environment(), "COLUMNS": "120", **options.pop("env", {})}  # type: ignore[dict-item]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    before = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) if limit else None
    return subprocess.run(command, env=environment, preexec_fn=before, **settings)  # type: ignore[call-overload]


def is_harmless(said: str) -> bool:
    return not [raw for raw in RAW if raw in said]


def in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pcr-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def hostile(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose files hold such texts wherever a text is free."""
    folder = tmp_path_factory.mktemp("hostile") / "[red]name\x1b]0;x\x07"
    shutil.copytree(exported, folder)
    change(folder / "report.json", hostile_report)
    change(folder / "model_index.json", lambda index: {**index, "_class_name": FREE})
    write_manifest(folder)
    return folder


def change(path: Path, how: Callable[[dict], object]) -> None:
    path.write_text(json.dumps(how(json.loads(path.read_text("utf-8")))), "utf-8")


def hostile_report(report: dict) -> dict:
    sites = [{**site, "reason": FREE if site.get("reason") else site.get("reason")} for site in report["sites"]]
    recipe = {**report["recipe"], "scheduler": FREE, "weights": FREE, "ranges": FREE}
    environment = {**report["environment"], FREE: FREE}
    return {**report, "model": FREE, "recipe": recipe, "sites": sites, "environment": environment}


def test_what_is_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("naïve 日本語 ▁█ C:\\x [a]") == "naïve 日本語 ▁█ C:\\x [a]"


def test_every_way_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    say_error(HOSTILE)
    print_rows([(HOSTILE, HOSTILE)], HOSTILE)
    show_warning(PromptWarning(HOSTILE), PromptWarning, "file", 1)
    show_warning(UserWarning(HOSTILE), UserWarning, "file\x1b]", 1)
    with track(HOSTILE, 1) as advance, status(HOSTILE):
        advance(1)
    out, err = capfd.readouterr()
    assert is_harmless(out)
    assert is_harmless(err.replace("\nFORGED", ""))  # the warning of a library keeps its lines
    assert out.startswith(SHOWN)
    assert "[bold]x[/bold][/]" in out


def test_inspect(hostile: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_this_process(monkeypatch, "inspect", hostile) == 0
    table = capfd.readouterr()
    assert is_harmless(table.out + table.err)
    assert "[bold]x[/bold]" in table.out
    assert in_this_process(monkeypatch, "inspect", "--json", hostile) == 0
    out = capfd.readouterr().out
    assert is_harmless(out)
    assert json.loads(out)["model"] == FREE


@pytest.mark.parametrize("command", ["verify", "generate", "evaluate"])
def test_errors(
    command: str, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / hostile.name
    shutil.copytree(hostile, folder)
    change(folder / "recipe.json", lambda recipe: {**recipe, "scheduler": FREE, FREE: 1})
    files = {FREE: {"sha256": "0" * 64, "bytes": 1}}
    change(folder / "manifest.json", lambda manifest: {**manifest, "files": {**manifest["files"], **files}})
    arguments = [command, folder, *(["a cat", "-o", tmp_path / "x.png"] if command == "generate" else [])]
    assert in_this_process(monkeypatch, *arguments) != 0
    said = capfd.readouterr()
    assert is_harmless(said.out + said.err)
    assert len([line for line in said.err.splitlines() if not line.startswith("warning: ")]) == 1


def test_on_a_terminal_rich_adds_colours_and_the_folder_nothing(hostile: Path) -> None:
    keeper, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pcr_export", "inspect", str(hostile)],
        stdout=terminal,
        stderr=terminal,
        env={**child_environment(), "TERM": "xterm-256color", "COLUMNS": "200"},
    )
    os.close(terminal)
    read = b""
    try:
        while some := os.read(keeper, 2**16):
            read += some
    except OSError:  # how Linux tells that the other end is closed
        pass
    assert process.wait() == 0
    said = read.decode()
    assert "\x1b[" in said
    assert is_harmless(said)


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "a", HOSTILE), ("inspect", f"--{HOSTILE}"), ("generate", "a", "b", "--seed", HOSTILE)],
    ids=["argument", "option", "value"],
)
def test_usage_errors(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_this_process(monkeypatch, *arguments) == 2
    assert is_harmless(capfd.readouterr().err)


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "utf-8"))]
)
def test_a_terminal_that_can_not_show_bars(encoding: str, exported: Path) -> None:
    done = run("inspect", exported, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    if encoding == "utf-8":
        assert "▁" in done.stdout.decode()
    else:
        assert done.stdout.isascii()
        assert b"\\u" not in done.stdout
        assert b"8888" in done.stdout


def test_names_that_are_no_text() -> None:
    done = run(b"inspect", b"caf\xe9\x1b]0;x\x07", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    (line,) = done.stderr.decode("ascii").splitlines()
    assert line == r"error: caf\udce9\x1b]0;x\x07 is no UTF-8 text, which the libraries need: give it another name"


@pytest.mark.parametrize("option", [pytest.param([], marks=pytest.mark.slow), ["--json"]])
def test_a_reader_that_leaves(option: list[str], exported: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("inspect", exported, *option, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
@pytest.mark.parametrize(
    "option",
    [["--version"], *(pytest.param(words, marks=pytest.mark.slow) for words in (["inspect"], ["inspect", "--json"]))],
)
def test_a_full_disk_behind_stdout(option: list[str], exported: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*option, *([exported] if option[0] == "inspect" else []), stdout=full)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: [Errno 28]")
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [60, 150, 400, 700, 1000])
def test_memory_is_refused(mebibytes: int, exported: Path, tmp_path: Path) -> None:
    done = run("generate", exported, "a cat", "-o", tmp_path / "x.png", limit=mebibytes * 2**20)
    if done.returncode:
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("error: not enough memory (")


def wrapped(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


ERRORS: Mapping[str, tuple[BaseException, int, str]] = {
    "ours": (PcrExportError("do this", exit_code=3), 3, "do this"),
    "memory": (MemoryError(), 1, "not enough memory (MemoryError): "),
    "memory of torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        1,
        "not enough memory (Def",
    ),
    "memory, told by another": (wrapped(ImportError("no x"), MemoryError()), 1, "not enough memory (no x): "),
    "a disk": (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device: mend that"),
    "a fault": (KeyError("x"), FAULT, "'x' (KeyError): this is a fault of pcr-export"),
    "too deep": (
        RecursionError("maximum recursion depth exceeded"),
        FAULT,
        "maximum recursion depth exceeded (RecursionError): ",
    ),
    "two lines": (ValueError("\nfirst\nsecond"), FAULT, "first (ValueError): "),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error, code, start = ERRORS[name]
    assert explain(error)[0].startswith(start)
    from pcr_export.deploy import inspect_folder

    def fail(_folder: Path) -> None:
        raise error

    monkeypatch.setattr(inspect_folder, "inspect_folder", fail)
    assert in_this_process(monkeypatch, "inspect", tmp_path) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {start}")
    assert in_this_process(monkeypatch, "inspect", tmp_path, "-v") == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), EOFError("no more")])
def test_a_pipe_that_is_not_ours_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """typer would leave without a word, or with "Aborted"."""
    from pcr_export.deploy import inspect_folder

    def fail(_folder: Path) -> None:
        raise error

    monkeypatch.setattr(inspect_folder, "inspect_folder", fail)
    assert in_this_process(monkeypatch, "inspect", tmp_path) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert str(error) in line


def test_text_with_colours_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say(Text("a") + Text("b", "red"))
    assert capsys.readouterr().out == "ab\n"
