"""How much memory onnxruntime takes for a model and one call of it, measured in a process that does nothing else.

Run by child_process with MODEL INPUTS.npz THREADS, it prints the bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcr_export.engines.child_process import child_command, child_environment
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError


def measure_memory(path: Path, inputs: Mapping[str, np.ndarray], threads: int) -> int:
    """Bytes that are resident at most while a session of `path` loads and runs once, mapped weights included, libraries not.

    Raises PcrExportError where that process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = dict(inputs)
        np.savez(saved, **arrays)
        command = child_command(__name__, str(path), str(saved), str(threads))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=child_environment())
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise PcrExportError(
            f"the memory of {path.name} can't be measured ({last}): is there enough for a second session?"
        )
    return int(done.stdout)


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most) of this process, in bytes."""
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kibibytes) * 1024


def _main() -> None:
    path, saved, threads = sys.argv[1:]
    with np.load(saved, allow_pickle=False) as arrays:
        inputs = dict(arrays)
    before = _resident("VmRSS")
    with OnnxRuntimeEngine(Path(path), threads=int(threads)) as engine:
        engine.run(inputs)
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    _main()
