"""Prompts that are longer than a pipeline's text encoders read: counted with its own tokenizers, and said once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin

from pcr_export.errors import PromptWarning
from pcr_export.models.load import quiet

BEGINNING = 40  # characters of a prompt that are shown


def warn_of_cut_prompts(tokenizers: Sequence[Any], prompts: Sequence[str], what: str, *, quote: bool = True) -> None:
    """Warn once (PromptWarning) of prompts whose end no text encoder sees, and of those that are the same without their ends.

    Args:
        tokenizers: of the pipeline, one or SDXL's two; each has its own model_max_length.
        prompts: in the order of their numbers.
        what: they are, in the plural, such as "calibration prompts".
        quote: whether the first one may be shown: not where the line goes to a server's log. The line is then always the same.
    """
    if not prompts or not tokenizers:  # an export with --strip-encoders has none
        return
    ids = [_token_ids(tokenizer, prompts) for tokenizer in tokenizers]
    limits = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
    longest = [max(len(each[number]) for each in ids) for number in range(len(prompts))]
    cut = [number for number, length in enumerate(longest) if length > min(limits)]
    if not cut:
        return
    if not quote:
        message = f"{what} longer than {min(limits)} tokens: what comes after is not read"
    else:
        first = f"the first is number {cut[0] + 1} ({longest[cut[0]]} tokens), {_beginning(prompts[cut[0]])}"
        message = f"{len(cut)} of {len(prompts)} {what} are longer than {min(limits)} tokens, and what comes after is not read: {first}"
        if same := _same_when_cut(prompts, ids, limits, set(cut)):
            message += f"; {same} of them differ only there, and count as the same: shorten them or leave some out"
    warnings.warn(message, PromptWarning, stacklevel=2)


def tokenizers_of(pipeline: Any) -> list[Any]:
    """The tokenizers of a Stable Diffusion or SDXL pipeline."""
    names = ("tokenizer", "tokenizer_2")
    return [tokenizer for name in names if (tokenizer := getattr(pipeline, name, None)) is not None]


def _token_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Every token of each prompt, the first and the last one that the tokenizer adds among them."""
    with quiet():  # transformers warns of the same length with every new tokenizer
        # as `encode_prompt` does it: a textual inversion of several vectors is as many tokens
        texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
        return [list(ids) for ids in tokenizer(texts, truncation=False, padding=False)["input_ids"]]


def _same_when_cut(prompts: Sequence[str], ids: Sequence[list[list[int]]], limits: Sequence[int], cut: set[int]) -> int:
    """How many different prompts are, as they are read, another one of them; only where one is cut."""
    groups: dict[Any, set[int]] = defaultdict(set)
    for number in range(len(prompts)):
        read = tuple(tuple(each[number][: limit - 1]) for each, limit in zip(ids, limits, strict=True))
        groups[read].add(number)
    different = [{prompts[number] for number in group} for group in groups.values() if group & cut]
    return sum(len(each) for each in different if len(each) > 1)


def _beginning(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= BEGINNING else text[:BEGINNING] + "...")
