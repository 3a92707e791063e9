"""Which denoising steps are relaxed (PCR, arXiv 2311.06322, section 3.3): exact counts, half-open intervals, any list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pcr_export.errors import PcrExportError

_END = re.compile(r"(first|last):(\d+(?:\.\d+)?)(%?)")
_PART = re.compile(r"(\d{1,9})(?::(\d{1,9}))?")
_SEARCHED = re.compile(r"auto:(\d+(?:\.\d+)?)")


def parse_relaxed_steps(text: str, num_steps: int, *, most: int | None = None) -> tuple[int, ...]:
    """The relaxed steps named by `text`, ascending; step 0 is the noisiest.

    A step is a noise level that the network is called at, in descending order, whatever the order of the calls: a scheduler that
    calls one twice (PNDM, Heun) has it once, one that calls levels in between (DPM2) has them, too. Where `num_steps` does not count
    those, `most` says how many there may be.

    "none"; "first:20%" or "last:0.2" (a fraction of the steps, rounded to the nearest count); "0:4,17" (half-open
    intervals and single steps).
    Raises PcrExportError where the text is not understood or names a step that does not exist.
    """
    if text == "none":
        return ()
    if end := _END.fullmatch(text):
        fraction = float(end[2]) / (100 if end[3] else 1)
        if not 0 <= fraction <= 1:
            raise PcrExportError(f"--relax {text}: the share of relaxed steps lies between 0 and 1 (or 0% and 100%)")
        count = round(num_steps * fraction)
        return tuple(range(count)) if end[1] == "first" else tuple(range(num_steps - count, num_steps))
    steps: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if not match:
            raise PcrExportError(
                f"--relax {text} is not understood: write none, first:20%, last:20%, steps such as 0:4,17, or auto:8.4"
            )
        start = int(match[1])
        steps.update(range(start, min(int(match[2]), (most or num_steps) + 1 + start) if match[2] else start + 1))
    if steps and max(steps) >= (most or num_steps):
        raise PcrExportError(
            f"--relax {text} names step {max(steps)}, but the {num_steps} steps are 0 to {num_steps - 1}"
        )
    return tuple(sorted(steps))


def searched_mean_bits(text: str, relax_bits: int) -> float | None:
    """MEAN of "auto:MEAN", the activation bits that a step shall have on average; None where `text` itself names the steps.

    Raises PcrExportError where MEAN is no number in 8..relax_bits.
    """
    if not text.startswith("auto"):
        return None
    match = _SEARCHED.fullmatch(text)
    if not match or not 8 <= float(match[1]) <= relax_bits:
        raise PcrExportError(
            f"--relax {text}: write the mean activation bits after auto:, from 8 to {relax_bits} (--relax-bits), e.g. auto:8.4"
        )
    return float(match[1])


def format_steps(steps: Sequence[int]) -> str:
    """Ascending steps as `parse_relaxed_steps` reads them: (12, 17, 18, 19) -> "12,17:20"; no step is "none"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs) or "none"
