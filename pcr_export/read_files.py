"""The one reader of small files: a regular file, at most so many bytes, and JSON of the expected form; one line where it is none."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pcr_export.errors import PcrExportError, first_line

MOST_BYTES = 2**24  # of a small file; a report of SDXL has 2 MB
MOST_VOCABULARY_BYTES = 2**26  # tokenizer.json of the largest vocabularies has 35 MB
MOST_PROMPTS_BYTES = 2**27  # captions of COCO's training set have 90 MB
MOST_CACHE_BYTES = 2**30  # what a builder measured, or compiled
MOST_DIGITS = 40  # of a whole number: transformers writes 1e30 for a length without a limit
MOST_NESTED = 64  # lists and objects inside each other
AGAIN = "fetch or export the folder again"
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character, which no terminal and no file takes


class MissingFileError(PcrExportError):
    """There is no such file, or a link to none."""


def check_regular(path: Path, *, most: int | None = None, advice: str = AGAIN) -> None:
    """Look at a file that a library will open: no pipe, which would never end, no device, no folder; links to files are fine.

    Args:
        most: bytes; None: any number.
        advice: what to do where it is none.

    Raises:
        MissingFileError: there is no such file.
        PcrExportError: it is something else, or too large.
    """
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, advice) from error
    _check_facts(path, facts, most, advice)


def read_bytes(path: Path, *, most: int = MOST_BYTES, advice: str = AGAIN) -> bytes:
    """The content of a small file, at most `most` bytes.

    Raises:
        MissingFileError, PcrExportError: as `check_regular` does, or it can't be read.
    """
    check_regular(path, most=most, advice=advice)  # before it is opened: a device may act on that
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb") as file:
            _check_facts(path, os.fstat(file.fileno()), most, advice)
            data = file.read(most + 1)
    except OSError as error:
        raise _unreadable(path, error, advice) from error
    if len(data) > most:  # it grew, or its size is not told
        raise _too_large(path, most, advice)
    return data


def read_text(path: Path, *, most: int = MOST_BYTES, advice: str = AGAIN) -> str:
    """The content of a small file in UTF-8. Raises as `read_bytes` does, and PcrExportError where it is no text."""
    try:
        return read_bytes(path, most=most, advice=advice).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error, advice) from error


def read_json(
    path: Path, schema: Any = None, *, most: int = MOST_BYTES, advice: str = AGAIN, infinite: bool = False
) -> dict[str, Any]:
    """The JSON object in a small file, every key of it.

    Args:
        schema: a TypedDict or another type of msgspec that it must fit; keys that it does not name are not looked at.
        infinite: whether Infinity may be a value, as in the schedulers' configurations of diffusers.

    Raises:
        MissingFileError, PcrExportError: as `read_text` does, or it holds something else.
    """
    try:
        value = parse_json(read_text(path, most=most, advice=advice), infinite=infinite)
    except ValueError as error:
        raise _unreadable(path, error, advice) from error
    if not isinstance(value, dict):
        raise PcrExportError(f"{path} holds no JSON object: {advice}")
    if schema is not None:
        check_schema(value, schema, path, advice=advice)
    return value


def check_schema(value: Any, schema: Any, name: object, *, advice: str = AGAIN) -> None:
    """Raise PcrExportError, which calls the value `name`, where it does not fit a type of msgspec."""
    try:
        msgspec.convert(value, schema)
    except (msgspec.ValidationError, OverflowError) as error:
        raise PcrExportError(f"{name} is damaged ({first_line(error)}): {advice}") from error


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """The value of a JSON text: no NaN, no whole number of so many digits, no half characters, nothing nested deeply.

    Raises:
        ValueError: it is no such text.
    """
    parse_float, parse_int, parse_constant = _number_parsers(infinite)
    try:
        value = json.loads(text, parse_float=parse_float, parse_int=parse_int, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
    level, depth = [value], 0
    while level:
        level = [
            each
            for outer in level
            if isinstance(outer, dict | list)
            for each in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError("lists or objects are nested too deeply")
    if "\\u" in text and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a text in it holds half a character, \\ud800 to \\udfff")
    return value


def _number_parsers(infinite: bool) -> tuple[Callable[[str], Any], ...]:
    def parse_float(text: str) -> float:
        value = float(text)
        if math.isnan(value) or not (infinite or math.isfinite(value)):
            raise ValueError(f"{text[:MOST_DIGITS]} is no number that is taken here")
        return value

    def parse_int(text: str) -> int:
        if len(text) > MOST_DIGITS:
            raise ValueError(f"a number has {len(text)} digits, {MOST_DIGITS} are taken")
        return int(text)

    return parse_float, parse_int, parse_float


def _check_facts(path: Path, facts: os.stat_result, most: int | None, advice: str) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise PcrExportError(f"{path} is a folder, where a file is read: {advice}")
    if not stat.S_ISREG(facts.st_mode):
        raise PcrExportError(f"{path} is a pipe, a socket or a device, where a file is read: {advice}")
    if most is not None and facts.st_size > most:
        raise _too_large(path, most, advice)


def _too_large(path: Path, most: int, advice: str) -> PcrExportError:
    return PcrExportError(
        f"{path} has more than {most / 2**20:.0f} MiB, the most that is read of such a file: {advice}"
    )


def _unreadable(path: Path, error: Exception, advice: str) -> PcrExportError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingFileError(f"{path} is missing: {advice}")
    reason = getattr(error, "strerror", None) or first_line(error)
    return PcrExportError(f"{path} can't be read ({reason}): {advice}")
