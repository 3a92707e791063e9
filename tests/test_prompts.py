"""Readers of prompt files: what they take, in which order, and what they refuse."""

import json
import re
from pathlib import Path

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.prompts import packaged_prompts, read_prompts

CALIB = Path(__file__).parents[1] / "calib"
COCO = {
    "images": [{"id": 7}, {"id": 3}],
    "annotations": [
        {"image_id": 7, "id": 12, "caption": "a dog, again"},
        {"image_id": 7, "id": 10, "caption": " A dog.\n"},
        {"image_id": 3, "id": 11, "caption": "A dog."},
    ],
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_plain_text_skips_blank_lines_and_comments_and_keeps_repetitions(tmp_path):
    path = write(tmp_path / "prompts.txt", "\ufeff# a comment\na cat\n\n  a dog \na cat\n")
    assert read_prompts(path) == ["a cat", "a dog", "a cat"]


def test_a_line_of_text_ends_at_lf_or_cr_lf_alone(tmp_path):
    """str.splitlines knows nine more ends, which people paste from documents and chats."""
    inside = "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei"
    assert read_prompts(write(tmp_path / "prompts.txt", f"{inside}\r\na cat \n\x85\n{inside}")) == [
        inside,
        "a cat",
        inside,
    ]


def test_a_table_keeps_separators_of_unicode_and_line_ends_in_quotes(tmp_path):
    text = 'Prompt,id\r\n"a\u2028b\r\nc",1\r\na\x85d,2\r\n'
    assert read_prompts(write(tmp_path / "a.csv", text)) == ["a\u2028b\r\nc", "a\x85d"]
    assert read_prompts(write(tmp_path / "a.tsv", "Prompt\tid\na\u2028b\x85c\t1\n")) == ["a\u2028b\x85c"]


def test_coco_gives_the_caption_of_lowest_id_for_each_image_in_the_order_of_image_ids(tmp_path):
    path = write(tmp_path / "captions_val2017.json", json.dumps(COCO))
    assert read_prompts(path) == ["A dog.", "A dog."]  # of images 3 and 7


def test_parti_prompts_take_quotes_as_they_stand(tmp_path):
    rows = ["Prompt\tCategory\tChallenge\tNote", 'a sign "Fly"\tArtifacts\tBasic\t', '"Hi" on a wall\tArts\tComplex\t']
    assert read_prompts(write(tmp_path / "PartiPrompts.tsv", "\n".join(rows))) == ['a sign "Fly"', '"Hi" on a wall']


def test_a_table_with_commas_may_hold_commas_quotes_and_line_ends_in_a_prompt(tmp_path):
    text = 'id,Prompt\r\n0,"a ""red"" cat, 8k"\r\n1,a dog\r\n2,"two\nlines"\r\n'
    assert read_prompts(write(tmp_path / "eval.csv", text)) == ['a "red" cat, 8k', "a dog", "two\nlines"]


def test_json_lines(tmp_path):
    text = '{"Prompt": "a cat"}\n{"Prompt": "a\\u2028dog", "id": 1}\n{"Prompt": "a cat"}\n'
    assert read_prompts(write(tmp_path / "train.jsonl", text)) == ["a cat", "a\u2028dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", json.dumps(COCO)[:60], "Unterminated string|Expecting"),
        ("a.json", '["a cat"]', "no list `annotations`"),
        ("a.json", '{"annotations": [{"caption": "a cat"}]}', "annotation 0 has no image_id"),
        ("a.json", '{"annotations": []}', "holds no prompt"),
        ("a.jsonl", '{"Prompt": "a cat"}\n{"Prompt": "a d', "line 2 is no JSON object with the key Prompt"),
        ("a.jsonl", '{"prompt": "a cat"}', "line 1"),
        ("a.jsonl", '{"Prompt": "a cat"}\n\n{"Prompt": null}\n', "Prompt in line 3 is null, no text"),
        ("a.jsonl", '{"Prompt": 3}', "Prompt in line 1 is 3, no text"),
        ("a.jsonl", '{"Prompt": ["a cat"]}', r"""line 1 is \["a cat"\], no text"""),
        ("a.jsonl", '{"Prompt": {"en": "a cat"}}', "line 1 is .*, no text"),
        ("a.jsonl", '{"Prompt": true}', "line 1 is true, no text"),
        ("a.jsonl", '{"Prompt": " "}', "Prompt in line 1 is blank"),
        ("a.json", '{"annotations": [{"image_id": 1, "id": 1, "caption": null}]}', "caption of annotation 0 is null"),
        ("a.json", '{"annotations": [{"image_id": 1, "id": 1, "caption": ""}]}', "caption of annotation 0 is blank"),
        ("a.csv", "id,Prompt\n0,a cat\n1, \n", "Prompt in line 3 is blank"),
        ("a.csv", "id,Prompt\n0,a cat, red\n", "line 2 has more columns"),
        ("a.tsv", "Prompt\tid\n\t1\n", "Prompt in line 2 is blank"),
        ("a.txt", "a cat\ra dog\r", r"line 1 holds a carriage return \(CR\); end lines with LF"),
        ("a.csv", "id,text\n0,a cat\n", "no column Prompt in its first line, which has id, text"),
        ("a.csv", "id,Prompt\n0,a cat\n1\n", "line 3 has no Prompt"),
        ("a.csv", 'id,Prompt\n0,"a cat\n', "unexpected end of data"),
        ("a.tsv", "Prompt\n", "holds no prompt"),
        ("a.tsv", "", "no column Prompt"),
        ("a.txt", "", "holds no prompt"),
        ("a.txt", b"caf\xe9", "'utf-8' codec can't decode.*give a UTF-8 text"),
        ("a.csv", b"Prompt\ncaf\xe9", "codec can't decode"),
        ("a.parquet", b"PAR1", "convert it: python -c"),
    ],
)
def test_a_bad_file_is_refused_with_one_line(name, content, expected, tmp_path):
    with pytest.raises(PcrExportError, match=expected) as refusal:
        read_prompts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(PcrExportError, match=r"none.json is missing: give a UTF-8 text"):
        read_prompts(tmp_path / "none.json")


def test_the_table_of_calib_names_every_packaged_set():
    named = set(re.findall(r"^\| ([\w-]+)\.txt \|", (CALIB / "README.md").read_text(), re.MULTILINE))
    assert named == {path.stem for path in CALIB.glob("*.txt")}
    assert all(read_prompts(packaged_prompts(name)) for name in named)
