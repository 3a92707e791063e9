"""How many processors this process may use: its affinity counts, not what the machine has."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """At least 1. OMP_NUM_THREADS lowers it, as it does torch's own threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(usable, int(asked)) if asked.isdecimal() and int(asked) > 0 else usable
