"""Processes below this one, as Linux lists them, to kill one of them, and the addresses where they listen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Every process below `pid`: its id and its command name, which Linux cuts at 15 letters."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it ended meanwhile
            continue
        head, tail = text[: text.rindex(")")], text[text.rindex(")") + 2 :]
        child, name = head.split(" (", 1)
        parents[int(child)], names[int(child)] = int(tail.split()[1]), name
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: names[child] for child in below - {pid} if child in names}


def listeners(pids: Iterable[int]) -> set[str]:
    """The addresses where these processes wait for TCP connections, as Linux writes them: hexadecimal, 0100007F for 127.0.0.1."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile
            sockets |= {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
