"""What the terminal shows: tables, bars and lines, in which no text of a folder, a file or a library commands it.

Every text passes `printable` here, and none is read as rich's markup. What stdout or stderr can't encode is written as an escape.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from pcr_export.errors import PcrExportWarning
from pcr_export.progress import Advance

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def printable(text: object) -> str:
    """`text` on one line, with what a terminal obeys or hides (control, format and separator characters, surrogates) as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(text)
    )


def can_show(text: str) -> bool:
    """Whether stdout can encode it."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def escape_what_is_not_encoded() -> None:
    """Write what stdout and stderr can't encode as an escape, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(*lines: str | Text) -> None:
    """Print lines on stdout, each on one line however wide. Texts that have colours must be printable already."""
    for line in lines:
        console.print(line if isinstance(line, Text) else Text(printable(line)), soft_wrap=True)


def say_error(line: str) -> None:
    """Print a line on stderr; white space in it is one blank."""
    errors.print(Text(printable(" ".join(line.split()))), soft_wrap=True)


def say_traceback(error: BaseException) -> None:
    """Print the traceback of `error` on stderr, as Python does."""
    for line in "".join(traceback.format_exception(error)).split("\n"):
        errors.print(Text(printable(line)), soft_wrap=True)


def print_rows(rows: Iterable[Sequence[str]], title: str) -> None:
    """Print a table without a header. Cells that are too wide are folded."""
    table = Table(title=Text(printable(title), "table.title"), show_header=False)
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    console.print(table)


def status(text: str) -> Status:
    """A spinner beside `text` while `with` lasts, on a terminal alone."""
    return console.status(Text(printable(text)), spinner="dots" if can_show("⠋") else "line")


@contextlib.contextmanager
def track(description: str, total: int) -> Iterator[Advance]:
    """Draw a progress bar with the time spent and the time left."""
    columns = (
        TextColumn("{task.description:28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(printable(description), total=total)
        yield lambda count: progress.advance(task, count)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """The package's own warnings as one line each on stderr; those of libraries as Python shows them."""
    if issubclass(category, PcrExportWarning):
        say_error(f"warning: {message}")
        return
    for each in warnings.formatwarning(message, category, filename, lineno, line).splitlines():
        errors.print(Text(printable(each)), soft_wrap=True)


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # an error is told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush_or_forget() -> OSError | None:
    """Flush stdout; what can't be written is forgotten, so that the interpreter's end says nothing of it. Returns why it can't."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error
    return None
