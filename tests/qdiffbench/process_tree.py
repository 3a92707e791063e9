"""Processes below this one, as Linux lists them, to kill one of them."""

from __future__ import annotations

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
