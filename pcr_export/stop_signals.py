"""Signals that ask the program to end: one line, 128 plus the signal's number as exit code, and nothing left running.

While the program starts and imports it leaves at once: nothing is lost, and an exception amid an import may be lost in it or come out as
ImportError. While it works `Stopped` is raised, so that every `finally` runs (after the import, where a library imports more). Where it
was asked before and still cleans up after a second, it leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = "stopped"
TWICE_SECONDS = 1.0  # a terminal that closes, and some shells, send the same signal twice: that is no second wish
AGAIN_SECONDS = 0.05
_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"
_CLEAR_LINE, _SHOW_CURSOR = "\r\x1b[2K", "\x1b[?25h"  # what a spinner leaves behind


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end. Libraries let it pass as they do Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _State:
    """What this process was asked for, and when."""

    working = False  # whether something has to be closed first
    asked: int | None = None
    since = 0.0
    told = False  # the line was printed
    stderr = 2  # where it goes


def answer_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the program as this module says; one that was ignored at the start stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` of a shell
            signal.signal(number, _answer)
    others = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: _unraisable(unraisable, others)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Inside, a signal raises Stopped wherever the program is."""
    yield from _state(True)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, a signal ends the program at once."""
    yield from _state(False)


@contextlib.contextmanager
def keep_handlers() -> Iterator[None]:
    """The same handlers after `with` as before. A library that set its own and raised SystemExit from them has stopped the program.

    In another thread than the first one, which alone may have handlers, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except SystemExit as stop:
        if before[signal.SIGTERM] is _answer:
            _State.asked, _State.since = signal.SIGTERM, time.monotonic()
            raise Stopped(signal.SIGTERM) from stop
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Inside, what libraries write to stderr is lost, down to the file descriptor; the line of a signal is not."""
    _State.stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        saved, _State.stderr = _State.stderr, 2
        os.dup2(saved, 2)
        os.close(saved)


def exit_code(error: BaseException) -> int | None:
    """What the program ends with because it was asked to; None where `error` has another cause."""
    if _State.asked is not None:  # some libraries make another error of it
        return 128 + _State.asked
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def print_stopped(line: str = STOPPED) -> None:
    """The one line on stderr, once, by whoever comes first."""
    if not _State.told:
        _State.told = True
        with contextlib.suppress(OSError, ValueError):
            os.write(_State.stderr, f"{line}\n".encode())


def _state(is_working: bool) -> Iterator[None]:
    before, _State.working = _State.working, is_working
    try:
        yield
    finally:
        _State.working = before


def _answer(number: int, frame: FrameType | None) -> None:
    if _State.asked is not None:
        if time.monotonic() - _State.since > TWICE_SECONDS:
            _leave()
    elif _State.working and _is_importing(frame):
        _ask_again(number)
    else:
        _State.asked, _State.since = number, time.monotonic()
        if _State.working:
            raise Stopped(number)
        _leave()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORT_MACHINERY:
        frame = frame.f_back
    return frame is not None


def _leave() -> None:
    """End the process and its children now. The kernel gives back its locks."""
    with contextlib.suppress(OSError, ValueError):
        if os.isatty(1):
            os.write(1, (_CLEAR_LINE + _SHOW_CURSOR).encode())
    print_stopped()
    _kill_children(os.getpid())
    os._exit(128 + (_State.asked or signal.SIGINT))


def _kill_children(parent: int) -> None:
    """SIGKILL to every process below `parent`, as Linux lists them."""
    with contextlib.suppress(OSError):  # one may end meanwhile
        for thread in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{thread}/children") as file:
                for child in map(int, file.read().split()):
                    _kill_children(child)
                    os.kill(child, signal.SIGKILL)


def _ask_again(number: int) -> None:
    """The same signal in a moment, when the program is somewhere else."""
    timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _unraisable(unraisable: Any, others: Any) -> None:
    """What is raised in a `__del__` or a callback, where nobody hears it."""
    if isinstance(unraisable.exc_value, Stopped):
        _State.asked = None
        _ask_again(unraisable.exc_value.number)
    else:
        others(unraisable)
