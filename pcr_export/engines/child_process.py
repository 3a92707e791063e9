"""A process of our own that works beside this one: it leaves signals to its parent, and never outlives it.

`python -m pcr_export.engines.child_process PARENT MODULE ARGUMENTS` runs MODULE, as `python -m MODULE ARGUMENTS` does.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

from pcr_export.stop_signals import SIGNALS

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` as such a child of this process; not with the files of the folder where it is started."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds the modules that this process finds."""
    paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[2]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and kills
    if sys.platform == "linux":  # nobody else ends it where the parent is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent has ended")
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
