"""Prompt files: one prompt a line, and a seed per prompt that depends on nothing else."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pcr_export.errors import PcrExportError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are no prompts.

    Raises PcrExportError where the file can't be read or holds no prompt.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PcrExportError(
            f"the prompts file {path} can't be read ({error}): give a UTF-8 text, one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise PcrExportError(f"the prompts file {path} holds no prompt: write one prompt a line")
    return prompts


def packaged_prompts(name: str) -> Path:
    """A prompt set of calib/, in an installed package or in a checkout. Raises PcrExportError where there is none."""
    package = Path(__file__).parent
    for folder in (package / "calib", package.parent / "calib"):
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    raise PcrExportError(f"this installation has no prompt set {name}: install it again, or give --prompts-file")


def choose_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the prompts, drawn without repetition; all of them where there are no more."""
    return random.Random(seed).sample(list(prompts), min(count, len(prompts)))


def prompt_seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """The seed of each prompt's noise: a hash of the prompt and the job's seed, so that order and company don't matter.

    A prompt that stands there again gets other noise.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        text = f"{seed}\n{seen[prompt]}\n{prompt}"
        seen[prompt] += 1
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
    return seeds
