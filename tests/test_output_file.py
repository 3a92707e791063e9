"""What a command writes is looked at before its work; tracebacks are shown where the command was told to."""

import os
from pathlib import Path

import numpy as np
import pytest

from pcr_export.cli import main
from pcr_export.errors import PcrExportError
from pcr_export.output_file import check_output_file
from pcr_export.qdiffbench.images import write_png
from pcr_export.usable_cpus import usable_cpus


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["pcr-export", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (".", "is a folder: name a file in it"),
        ("out.jpg", r"must end in \.png, which is what is written: .*out\.png"),
        ("out", r"must end in \.png"),
        ("file/out.png", "which is a file: choose another folder"),
        ("file/deeper/out.png", "which is a file: choose another folder"),
    ],
)
def test_a_file_that_can_not_be_written_is_told_before_the_work(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PcrExportError, match=says):
        check_output_file(tmp_path / name, "--output", ".png")
    check_output_file(tmp_path / "new" / "OUT.PNG", "--output", ".png")
    assert not (tmp_path / "new").exists()
    write_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "new" / "OUT.PNG")
    assert (tmp_path / "new" / "OUT.PNG").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PcrExportError, match="can't be written to"):
        check_output_file(tmp_path / "out.png", "--output", ".png")


def test_every_command_looks_before_it_works(tmp_path: Path, monkeypatch, capsys) -> None:
    for words in (
        ("generate", tmp_path / "no-export", "a cat", "-o", tmp_path),
        ("study", "tiny-sdxl", "--out", tmp_path / "s", "--json", tmp_path),
    ):
        assert run(monkeypatch, *words) == 2
        assert "is a folder: name a file in it" in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("-v", "a cat"), True),
        (("a cat", "--verbose"), True),
        (("-vo", "x.png", "a cat"), True),
        (("--seed", "1", "--", "-v"), False),  # the prompt
        (("a cat", "--negative-prompt", "-v"), False),
        (("a cat",), False),
    ],
)
def test_a_traceback_is_shown_to_who_asked_for_it(tmp_path: Path, monkeypatch, capsys, words, shown: bool) -> None:
    assert run(monkeypatch, "generate", tmp_path, *words) == 2 or words[0] == "--seed"
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_processors_that_this_process_may_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    assert usable_cpus() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_cpus() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert usable_cpus() == len(before)
