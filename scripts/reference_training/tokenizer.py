"""Build the CLIP tokenizer: byte-level pair encoding in which every word of the grammar is one token."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pcr_export.models.reference.captions import MAX_TOKENS, grammar_words

START, END = "<|startoftext|>", "<|endoftext|>"
PADS = {"tokenizer": END, "tokenizer_2": "!"}  # as in SDXL


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair (ties: the first in the alphabet) until every word is one symbol."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        pairs = Counter(pair for piece in pieces for pair in pairwise(piece))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_apply(piece, best) for piece in pieces]
    return merges


def _apply(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in piece:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_tokenizers(folder: Path) -> None:
    """Write tokenizer/ and tokenizer_2/ with vocab.json and merges.txt beside tokenizer.json."""
    merges = learn_merges(grammar_words())
    letters = list(bytes_to_unicode().values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    for name, pad in PADS.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        made = CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=pad,
            model_max_length=MAX_TOKENS,
        )
        made.save_pretrained(target)


def special_tokens(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return what the text towers' configurations need to know of the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


@cache
def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Load both tokenizers of a pipeline folder."""
    return tuple(CLIPTokenizer.from_pretrained(folder / name) for name in PADS)  # type: ignore[return-value]
