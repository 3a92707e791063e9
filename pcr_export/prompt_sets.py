"""The file formats of published prompt sets: COCO captions, tables with a column Prompt, plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

COLUMN = "Prompt"  # of PartiPrompts and of Stable-Diffusion-Prompts

Reader = Callable[
    [str], list[str]
]  # the text of a file -> its prompts; ValueError or csv.Error where it has another form


def lines_of_text(text: str) -> list[str]:
    """One prompt a line; blank lines and lines that start with # are no prompts."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def coco_captions(text: str) -> list[str]:
    """captions_*.json of COCO: the caption of lowest id for every image, in the order of the image ids.

    The other captions of an image (COCO has five) are left out, as a benchmark of one picture per prompt does.
    """
    content = json.loads(text)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("no list `annotations`, which COCO captions have; name JSON lines .jsonl")
    first: dict[int, tuple[int, str]] = {}
    for position, row in enumerate(annotations):
        try:
            image, caption = int(row["image_id"]), (int(row["id"]), str(row["caption"]).strip())
        except (KeyError, TypeError) as error:
            raise ValueError(f"annotation {position} has no image_id, id and caption: no COCO captions") from error
        first[image] = min(first.get(image, caption), caption)
    return [caption for _, (_, caption) in sorted(first.items())]


def json_lines(text: str) -> list[str]:
    """An object with the key Prompt a line."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                prompts.append(str(json.loads(line)[COLUMN]).strip())
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} is no JSON object with the key {COLUMN}") from error
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
        prompts.append(row[COLUMN].strip())
    return prompts


READERS: dict[str, Reader] = {
    ".json": coco_captions,
    ".jsonl": json_lines,
    ".csv": comma_separated,
    ".tsv": tab_separated,
}
CONVERT_PARQUET = "convert it: python -c \"import pandas; pandas.read_parquet('IN').to_csv('OUT.csv', index=False)\""
