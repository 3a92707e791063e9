"""The file formats of published prompt sets: COCO captions, tables with a column Prompt, plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from pcr_export.read_files import parse_json

COLUMN = "Prompt"  # of PartiPrompts and of Stable-Diffusion-Prompts
ROOM = " \t\r\n"  # around a prompt, no part of it

Reader = Callable[
    [str], list[str]
]  # the text of a file -> its prompts; ValueError or csv.Error where it has another form


def lines_of_text(text: str) -> list[str]:
    """One prompt a line; blank lines and lines that start with # are no prompts.

    A line ends at LF or CR LF alone: other separators of Unicode (U+0085, U+2028, VT, FF) are characters of a prompt.
    """
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        prompt = line.strip(ROOM)
        if "\r" in prompt:
            raise ValueError(f"line {number} holds a carriage return (CR); end lines with LF or CR LF")
        if prompt.strip() and not line.startswith("#"):
            prompts.append(prompt)
    return prompts


def _prompt(value: object, where: str) -> str:
    """`value` as a prompt. Raises ValueError that names the place where it is no text or blank."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, no text")
    if not value.strip():
        raise ValueError(f"{where} is blank")
    return value.strip(ROOM)


def coco_captions(text: str) -> list[str]:
    """captions_*.json of COCO: the caption of lowest id for every image, in the order of the image ids.

    The other captions of an image (COCO has five) are left out, as a benchmark of one picture per prompt does.
    """
    content = parse_json(text)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("no list `annotations`, which COCO captions have; name JSON lines .jsonl")
    first: dict[int, tuple[int, str]] = {}
    for position, row in enumerate(annotations):
        try:
            image, number, value = int(row["image_id"]), int(row["id"]), row["caption"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"annotation {position} has no image_id, id and caption: no COCO captions") from error
        caption = number, _prompt(value, f"the caption of annotation {position}")
        first[image] = min(first.get(image, caption), caption)
    return [caption for _, (_, caption) in sorted(first.items())]


def json_lines(text: str) -> list[str]:
    """An object with the key Prompt a line."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line)[COLUMN]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} is no JSON object with the key {COLUMN}") from error
            prompts.append(_prompt(value, f"{COLUMN} in line {number}"))
    return prompts


def comma_separated(text: str) -> list[str]:
    """The column Prompt of a table with commas, quoted as spreadsheets do."""
    return _column(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def tab_separated(text: str) -> list[str]:
    """The column Prompt of a table with tabs, where a quote is a character like any other (PartiPrompts)."""
    return _column(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def _column(rows: csv.DictReader[str]) -> list[str]:
    if COLUMN not in (rows.fieldnames or ()):
        raise ValueError(f"no column {COLUMN} in its first line, which has {', '.join(rows.fieldnames or ['nothing'])}")
    prompts = []
    for row in rows:
        if row[COLUMN] is None:
            raise ValueError(f"line {rows.line_num} has no {COLUMN}")
        if None in row:  # a comma that is not quoted cuts the prompt, or what stands before it
            raise ValueError(f"line {rows.line_num} has more columns than the first line: quote what holds a separator")
        prompts.append(_prompt(row[COLUMN], f"{COLUMN} in line {rows.line_num}"))
    return prompts


READERS: dict[str, Reader] = {
    ".json": coco_captions,
    ".jsonl": json_lines,
    ".csv": comma_separated,
    ".tsv": tab_separated,
}
CONVERT_PARQUET = "convert it: python -c \"import pandas; pandas.read_parquet('IN').to_csv('OUT.csv', index=False)\""
