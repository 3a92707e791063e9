"""Signals in small programs: what runs is closed, a second signal never waits, and what hides an exception does not hide a stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stopped_program import PATIENCE, Ended, Program

from pcr_export.engines.child_process import child_command, child_environment

HEAD = """
import os, signal, sys, time
from pcr_export import stop_signals
from pcr_export.stop_signals import *
stop_signals.answer_signals()
def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
"""


def run(code: str) -> Ended:
    return Program([sys.executable, "-c", HEAD + code]).end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_runs_is_closed(number: signal.Signals) -> None:
    ended = run(f"""
try:
    with working():
        try:
            send({int(number)})
        finally:
            print("closed", file=sys.stderr)
except KeyboardInterrupt as stop:
    print_stopped("stopped; go on")
    sys.exit(exit_code(stop))
""")
    assert (ended.code, ended.lines) == (128 + number, ["closed", "stopped; go on"])


def test_the_same_signal_twice_lets_it_clean_up() -> None:
    """A terminal that closes sends SIGHUP twice."""
    ended = run("""
try:
    with working():
        try:
            send()
        finally:
            send()
            print("closed", file=sys.stderr)
except KeyboardInterrupt as stop:
    print_stopped()
    sys.exit(exit_code(stop))
""")
    assert (ended.code, ended.lines) == (143, ["closed", "stopped"])


def test_who_asks_again_later_does_not_wait() -> None:
    ended = run("""
import subprocess
child = subprocess.Popen(["sleep", "600"])
with working():
    try:
        send()
    finally:
        time.sleep(stop_signals.TWICE_SECONDS + 0.1)
        send(signal.SIGINT)
        time.sleep(600)
""")
    assert (ended.code, ended.lines, ended.left) == (143, ["stopped"], [])


def test_one_line_where_it_was_told_already() -> None:
    ended = run("""
with working():
    try:
        send()
    except KeyboardInterrupt:
        print_stopped("stopped; go on")
        time.sleep(stop_signals.TWICE_SECONDS + 0.1)
        send()
""")
    assert (ended.code, ended.lines) == (143, ["stopped; go on"])


def test_an_ignored_signal_stays_ignored() -> None:
    code = f"{HEAD}\nsend(signal.SIGHUP)\nprint('still here')"
    ignored = subprocess.run(
        ["nohup", sys.executable, "-c", code], capture_output=True, text=True, env=child_environment()
    )
    assert (ignored.returncode, ignored.stdout) == (0, "still here\n")


def test_amid_an_import_of_the_work_it_waits_for_the_import(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), 15)\ntime.sleep(0.3)\nloaded = True\n"
    )
    ended = run(f"""
sys.path.insert(0, {str(tmp_path)!r})
try:
    with working():
        try:
            import slow
        except:
            sys.exit("the import was broken")
        time.sleep(600)
except KeyboardInterrupt as stop:
    print_stopped()
    sys.exit(exit_code(stop) if slow.loaded else 1)
""")
    assert (ended.code, ended.lines) == (143, ["stopped"])


def test_raised_where_nobody_hears_it_comes_again() -> None:
    ended = run("""
class Silent:
    def __del__(self):
        send()
        time.sleep(0)
try:
    with working():
        Silent()
        time.sleep(600)
except KeyboardInterrupt as stop:
    print_stopped()
    sys.exit(exit_code(stop))
""")
    assert (ended.code, ended.lines) == (143, ["stopped"])


def test_a_library_that_makes_another_error_of_it() -> None:
    ended = run("""
with working():
    try:
        try:
            send()
        except BaseException as error:
            raise RuntimeError("what?") from error
    except Exception as error:
        print_stopped()
        sys.exit(exit_code(error))
""")
    assert (ended.code, ended.lines) == (143, ["stopped"])


def test_handlers_of_a_library_go_with_it() -> None:
    """Ray's ends the process by SystemExit."""
    ended = run("""
try:
    with working():
        with keep_handlers():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            send()
except KeyboardInterrupt as stop:
    assert signal.getsignal(signal.SIGTERM) is stop_signals._answer
    print_stopped()
    sys.exit(exit_code(stop))
""")
    assert (ended.code, ended.lines) == (143, ["stopped"])


def test_the_line_is_seen_where_libraries_are_silenced() -> None:
    ended = run("""
with working(), quiet_stderr():
    os.write(2, b"noise")
    try:
        send()
    except KeyboardInterrupt as stop:
        print_stopped()
        os._exit(exit_code(stop))
""")
    assert (ended.code, ended.lines) == (143, ["stopped"])


SLEEPER = "import signal, time\nprint([int(signal.getsignal(n)) for n in (1, 2, 15)], flush=True)\ntime.sleep(600)\n"


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a child runs."""
    (tmp_path / "sleeper_of_a_test.py").write_text(SLEEPER)
    monkeypatch.syspath_prepend(tmp_path)
    return "sleeper_of_a_test"


def test_a_child_leaves_signals_to_its_parent(sleeper: str) -> None:
    with subprocess.Popen(child_command(sleeper), stdout=subprocess.PIPE, env=child_environment()) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"[1, 1, 1]\n"  # signal.SIG_IGN
        child.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("before", [True, False], ids=["before it starts", "later"])
def test_a_child_never_outlives_a_parent_that_is_killed(before: bool, sleeper: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(tmp_path)!r})
from pcr_export.engines.child_process import child_command, child_environment
child = subprocess.Popen(child_command({sleeper!r}), stdout=subprocess.PIPE, env=child_environment())
{"" if before else "child.stdout.readline()"}
os.kill(os.getpid(), signal.SIGKILL)
"""
    program = Program([sys.executable, "-c", code])
    program.process.wait()
    deadline = time.monotonic() + 10
    while program.running():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_imports_nothing_from_the_folder_where_it_is_started(tmp_path: Path) -> None:
    """Where that is a folder that came from elsewhere."""
    (tmp_path / "runpy.py").write_text("print('stolen')")
    (tmp_path / "json.py").write_text("print('stolen')")
    command = child_command("json.tool", "--help")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=child_environment(), timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "stolen" not in done.stdout
