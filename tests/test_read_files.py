"""The reader of small files: what is no regular file, too large or of another form ends in one line, at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, TypedDict

import pytest
from msgspec import Meta

from pcr_export.errors import PcrExportError
from pcr_export.read_files import MissingFileError, check_regular, parse_json, read_bytes, read_json, read_text


class Layers(TypedDict, total=False):
    layers: Annotated[int, Meta(ge=1, le=100)]
    scale: float | None


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, check_regular])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "link to a device"])
def test_what_is_no_file_is_refused_at_once(kind: str, read, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises(PcrExportError, match="where a file is read: fetch or export"):
        read(path)


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"layers": 3, "more": []}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json", Layers) == {"layers": 3, "more": []}


@pytest.mark.parametrize("name", ["none", "dangling", "file/below"])
def test_a_missing_file_is_told_apart(name: str, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError, match="is missing: build it"):
        read_text(tmp_path / name, advice="build it")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_a_path_that_can_not_be(path: str, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="can't be read"):
        read_bytes(tmp_path / path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.touch()
    os.truncate(path, 10 * 2**30)  # of holes
    with pytest.raises(PcrExportError, match="has more than 16 MiB"):
        read_json(path)


def test_a_file_whose_size_is_not_told() -> None:
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert b"VmHWM" in read_bytes(path)
    with pytest.raises(PcrExportError, match="has more than"):
        read_bytes(path, most=16)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "can't be read"),
        ("[]", "holds no JSON object"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        (f'{{"a": {"9" * 400}}}', "has 400 digits"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\uDFFF": 1}', "half a character"),
        ('{"layers": 1000000000}', r"is damaged \(Expected `int` <= 100 - at `\$.layers`\)"),
        ('{"layers": true}', "Expected `int`, got `bool`"),
        ('{"layers": "2"}', "Expected `int`, got `str`"),
        ('{"scale": []}', "Expected `float"),
    ],
)
def test_what_is_no_such_json(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(PcrExportError, match=reason) as refused:
        read_json(path, Layers)
    assert str(refused.value).endswith("fetch or export the folder again")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(PcrExportError, match="can't be read"):
        read_text(tmp_path / "x")


def test_what_json_may_hold() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    assert parse_json('{"emoji": "\\ud83d\\ude00", "long": 1000000000000000019884624838656}') == {
        "emoji": "\U0001f600",
        "long": int(1e30),
    }
    assert parse_json("[-Infinity, 1e999]", infinite=True) == [float("-inf"), float("inf")]
