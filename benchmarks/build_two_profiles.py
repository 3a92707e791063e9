"""Build one TensorRT engine with two optimization profiles: the process that `relaxed_forms.py` starts for that form.

Reads a job of `pcr_export.engines.build_process` as JSON from standard input, with one more key, `profiles`: the inputs' shapes by
profile. Writes what it built as one JSON object to the file named by `facts`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcr_export.engines.build_process import add_profile, configure, open_network, peak_bytes, write_engine
from pcr_export.engines.builder_callbacks import ACTIVATIONS, WEIGHTS
from pcr_export.engines.layer_dump import Kernel

PROFILE = re.compile(r"_myl(\d+)_\d+$")


def build(job: Mapping[str, Any]) -> dict[str, Any]:
    """Build the engine of `job`; its facts, and per profile the memory that the builder tells and the layer dump's kernels.

    Raises:
        PcrExportError: the parser or the builder refuses.
    """
    opened = open_network(job)
    log, started = opened.log, time.perf_counter()
    first, *others = job["profiles"]
    config = configure(opened, {**job, "inputs": first})
    for shapes in others:
        add_profile(opened, config, shapes)
    size, _ = write_engine(opened, config, {**job, "inputs": first})
    seconds = time.perf_counter() - started
    return {
        "version": opened.flavour.version,
        "engine_bytes": size,
        "weight_bytes": log.bytes_of(WEIGHTS),
        "activation_bytes": log.bytes_of(ACTIVATIONS),
        "told": [message.splitlines()[0] for message in log.kept if message.startswith((WEIGHTS, ACTIVATIONS))],
        "parse_seconds": round(opened.seconds, 3),
        "build_seconds": round(seconds, 3),
        "peak_bytes": peak_bytes(),
        "kernels": [[vars(kernel) for kernel in each] for each in by_profile(log.kernels())],
    }


def by_profile(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each profile: one dump lists all, and their names end in _myl<profile>_<number>."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        match = PROFILE.search(kernel.name)
        found.setdefault(match[1] if match else "", []).append(kernel)
    return [found[profile] for profile in sorted(found)]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    Path(request["facts"]).write_text(json.dumps(build(request)))
