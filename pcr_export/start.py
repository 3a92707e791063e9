"""Where the program starts: it answers signals before it imports anything that takes time."""

from __future__ import annotations

from pcr_export.stop_signals import answer_signals


def main() -> None:
    """Run the program."""
    answer_signals()
    from pcr_export.cli import main as run

    run()
