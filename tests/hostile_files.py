"""Hostile folders: files of a good one, changed as an attacker may change them, and commands that run on them in a child."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

MEMORY = 12 * 2**30  # bytes of address space that a command may have; torch alone maps some
HUGE_FILE = 160 * 2**20  # bytes, of holes: more than is read of any small file
NUMBERS = [0, -1, 1, 2, 3, 10**9, -(10**9), 2**31, 2**63, 10**40, 0.0, -0.5, 1e-30, 1e30, float("inf"), float("nan")]
WORDS = ["", "x", "../../etc/passwd", "/dev/zero", "\0", "\x1b[2J", "[red]", "\ud800", "1", "true", "a" * 5000]
OTHERS = [None, True, False, [], {}, [None], [[]], {"": None}, [1e9] * 20, ["x"] * 2000, 10**400]


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = [*NUMBERS, *WORDS, *OTHERS, deep(50), deep(900)]


@dataclass(frozen=True)
class Change:
    """What is done to a file: in words, and how."""

    words: str
    apply: Callable[[Path], None]


def json_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, of long lists the first ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, each in items for place in json_places(each, (*path, key)))]


@st.composite
def json_changes(draw: st.DrawFn, content: Any) -> Change:
    """A value replaced, dropped, doubled or renamed at one place, or at two."""
    places = json_places(content)
    edits = [
        (draw(st.sampled_from(places)), draw(st.sampled_from(["replace"] * 6 + ["drop", "rename", "double"])))
        for _ in range(draw(st.sampled_from([1, 1, 1, 2])))
    ]
    values = [draw(st.sampled_from(range(len(VALUES)))) for _ in edits]

    def apply(path: Path) -> None:
        changed = json.loads(json.dumps(content))
        for (place, kind), value in zip(edits, values, strict=True):
            with contextlib.suppress(KeyError, IndexError, TypeError):  # the first edit took the second one's place
                changed = edited(changed, place, kind, VALUES[value])
        path.write_text(json_text(changed), "utf-8")

    words = ", ".join(
        f"{kind} {'.'.join(map(str, place)) or 'all'}"
        + (f" by {str(VALUES[value])[:30]!r}" if kind == "replace" else "")
        for (place, kind), value in zip(edits, values, strict=True)
    )
    return Change(words, apply)


def json_text(value: Any) -> str:
    """JSON of values nested more deeply than the module's writer goes."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        sys.set_int_max_str_digits(0)
        sys.setrecursionlimit(20_000)
        return json.dumps(value)


def edited(content: Any, place: Sequence[Any], kind: str, value: Any) -> Any:
    if not place:
        return value
    *before, last = place
    holder = content
    for key in before:
        holder = holder[key]
    if kind == "replace":
        holder[last] = value
    elif kind == "drop":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
    elif isinstance(holder, dict):
        holder[f"{last}.copy"] = holder[last]
    else:
        holder.insert(0, holder[last])
    return content


@st.composite
def byte_changes(draw: st.DrawFn, data: bytes) -> Change:
    """Bytes flipped, cut off, put in between or repeated; most of them in the first kilobytes, where headers are."""
    near = st.integers(0, max(0, min(len(data), 4096) - 1))
    anywhere = st.integers(0, max(0, len(data) - 1))
    edits = [
        (draw(near | anywhere), draw(st.integers(1, 255)), draw(st.sampled_from(["flip"] * 5 + ["cut", "insert"])))
        for _ in range(draw(st.integers(1, 4)))
    ]

    def apply(path: Path) -> None:
        changed = bytearray(data)
        for position, mask, kind in edits:
            if kind == "cut":
                del changed[position:]
            elif kind == "insert":
                changed[position:position] = bytes([mask]) * (1 + mask % 16)
            elif position < len(changed):
                changed[position] ^= mask
        path.unlink()
        path.write_bytes(changed)

    return Change(", ".join(f"{kind} at {position}" for position, _, kind in edits), apply)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(target: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return apply


def _huge(path: Path) -> None:
    path.unlink()
    path.touch()
    os.truncate(path, HUGE_FILE)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


SPECIAL = [
    Change("a pipe", _pipe),
    Change("a folder", _folder),
    Change("a link to nothing", _link("nowhere")),
    Change("a link to /dev/zero", _link("/dev/zero")),
    Change("a link to itself", lambda path: _link(path.name)(path)),
    Change("a file of holes", _huge),
    Change("empty", _empty),
    Change("gone", Path.unlink),
]
TEXTS = (".json", ".pbtxt", ".txt")


@st.composite
def changes(draw: st.DrawFn, path: Path) -> Change:
    """What may be done to a file of a folder."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from([each for each in SPECIAL if path.suffix in TEXTS or each.apply is not _huge]))
    if path.suffix == ".json" and kind < 9:
        return draw(json_changes(json.loads(path.read_text("utf-8"))))
    return draw(byte_changes(path.read_bytes()))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None  # None: killed, it did not end; negative: a signal
    seconds: float
    errors: str  # what it wrote to its standard error

    @property
    def fault(self) -> str | None:
        """What is wrong with the way it ended, None for a good end: done, or one line that says what to do."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        if self.code is None:
            return f"no end after {self.seconds:.0f} s"
        if "Traceback" in self.errors:
            return f"a traceback: {self.errors.strip().splitlines()[-1][:200]}"
        if self.code == 0:
            return None
        if self.code not in (2, 3) or len(lines) != 1:
            return f"exit code {self.code}, {len(lines)} lines: {self.errors.strip()[-200:]}"
        return None


def run_command(arguments: Sequence[object], folder: Path, *, seconds: float) -> Outcome:
    """Run `pcr-export arguments` in a child of this process, in `folder`, and kill it after so many seconds."""
    log = folder / "stderr.txt"
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            code = _run([str(argument) for argument in arguments])
        finally:
            os._exit(code)
    status = None
    while status is None and time.monotonic() - start < seconds:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(found)
        else:
            time.sleep(0.005)
    if status is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Outcome(status, time.monotonic() - start, log.read_text("utf-8", "replace") if log.exists() else "")


def _run(arguments: list[str]) -> int:
    """The exit code of the command line in this process, whose streams are files."""
    from pcr_export.cli import main

    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["pcr-export", *arguments]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code
