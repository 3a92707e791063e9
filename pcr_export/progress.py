"""Progress of long work: the library announces, the command line draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Track = Callable[
    [str, int], AbstractContextManager[Advance]
]  # (description, total) -> context that gives advance(count)


@contextmanager
def silent(_description: str, _total: int) -> Iterator[Advance]:
    """Track nothing."""
    yield lambda _count: None
