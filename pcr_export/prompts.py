"""Prompt files, and a seed per prompt that depends on nothing else."""

from __future__ import annotations

import csv
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pcr_export.errors import PcrExportError
from pcr_export.prompt_sets import CONVERT_PARQUET, READERS, lines_of_text
from pcr_export.read_files import MOST_PROMPTS_BYTES, read_bytes

LONGEST_PROMPT = 10_000  # characters
WHAT_TO_GIVE = (
    "give a UTF-8 text, one prompt a line, or one of the sets that calib/README.md tells of"  # as a prompts file
)
REFERENCE = "tiny-sdxl"  # the model that the package brings along


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order; none is dropped for being there twice.

    By the file's name: .json is COCO captions (one per image), .jsonl, .csv and .tsv have a column Prompt, everything else is text
    of one prompt a line, where blank lines and lines that start with # are no prompts.

    Raises PcrExportError where the file can't be read, has another form or holds no prompt.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        raise PcrExportError(f"the prompts file {path} is parquet, which is not read here: {CONVERT_PARQUET}")
    data = read_bytes(path, most=MOST_PROMPTS_BYTES, advice=WHAT_TO_GIVE)
    try:
        prompts = READERS.get(suffix, lines_of_text)(data.decode("utf-8-sig"))
    except (ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise PcrExportError(f"the prompts file {path} can't be read ({error}): {WHAT_TO_GIVE}") from error
    if not prompts:
        raise PcrExportError(f"the prompts file {path} holds no prompt: write one prompt a line")
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, f"prompt {number} of {path}")
    return prompts


def check_prompt(prompt: str, name: str) -> None:
    """Raise PcrExportError, which calls the prompt `name`, where it is no Unicode or longer than any text encoder reads."""
    if len(prompt) > LONGEST_PROMPT:
        raise PcrExportError(
            f"{name} has {len(prompt)} characters, {LONGEST_PROMPT} are taken and 77 tokens read: shorten it"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PcrExportError(f"{name} is no Unicode text ({error.reason}): write it in UTF-8") from error


def packaged_prompts(name: str) -> Path:
    """A prompt set of calib/, in an installed package or in a checkout. Raises PcrExportError where there is none."""
    package = Path(__file__).parent
    for folder in (package / "calib", package.parent / "calib"):
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    raise PcrExportError(f"this installation has no prompt set {name}: install it again, or give --prompts-file")


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """The prompt files of calib/ that belong to a model."""

    calibration: Path
    in_domain: Path  # like the calibration prompts, none of them among those
    out_of_domain: Path | None  # other wording, other combinations


def own_prompt_sets(model: str) -> PromptSets:
    """The sets of the reference model, or those for every other model."""
    if model == REFERENCE:
        return PromptSets(
            calibration=packaged_prompts(REFERENCE),
            in_domain=packaged_prompts(f"{REFERENCE}-eval"),
            out_of_domain=packaged_prompts(f"{REFERENCE}-out-of-domain"),
        )
    return PromptSets(
        calibration=packaged_prompts("general"), in_domain=packaged_prompts("general-eval"), out_of_domain=None
    )


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
