"""How every command runs: which one is meant, and what is said where it is stopped or its arguments are wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pcr_export.errors import PcrExportError, explain
from pcr_export.stop_signals import STOPPED, exit_code, print_stopped, working
from pcr_export.terminal import printable, reader_is_gone


class DefaultExport(TyperGroup):
    """`pcr-export MODEL ...` means `pcr-export export MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command where no command is named."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the program's own options."""
        with _printable_usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's options and run it."""
        with _printable_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    """What a person typed, or a shell found in a folder, is printable in the messages of typer's usage errors."""
    try:
        yield
    except Exception as error:  # click's own classes are typer's since 0.29: they have this attribute
        if isinstance(getattr(error, "message", None), str):
            error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


class Command(TyperCommand):
    """Ends with one line where a signal stops it, and remembers whether it was told to show tracebacks."""

    verbose = False
    stopped = STOPPED

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        Command.verbose = bool(ctx.params.get("verbose"))
        try:
            _check_texts(ctx.params.values())
            with working():
                return super().invoke(ctx)
        except (BrokenPipeError, EOFError) as error:  # of which typer says nothing, wherever they come from
            if isinstance(error, OSError) and reader_is_gone():
                raise
            line, code = explain(error)
            raise PcrExportError(line, exit_code=code) from error
        except BaseException as error:
            stopped = exit_code(error)
            if stopped is None:
                raise
            print_stopped(self.stopped if ctx.params.get("resume", True) else STOPPED)
            raise typer.Exit(stopped) from error


def _check_texts(values: Iterable[Any]) -> None:
    """Raise PcrExportError for an argument whose bytes are no UTF-8: no library in C++ or Rust takes such a path or prompt."""
    for value in values:
        for text in map(str, value if isinstance(value, (list, tuple)) else [value]):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise PcrExportError(f"{text} is no UTF-8 text, which the libraries need: give it another name")


class ResumingCommand(Command):
    """Keeps what it has finished."""

    stopped = f"{STOPPED}; the same command goes on from here"
