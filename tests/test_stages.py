import json

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.prompts import choose_prompts, packaged_prompts, prompt_seeds, read_prompts
from pcr_export.stages import Stages


@pytest.fixture
def run(tmp_path):
    """Runs one stage; returns (facts, whether the action ran, log lines)."""

    def run(key, resume=True):
        ran, lines = [], []
        output = tmp_path / "output"

        def action():
            ran.append(True)
            output.touch()
            return {"count": 1}

        facts = Stages(tmp_path / "stages", resume=resume, log=lines.append).run("stage", key, [output], action)
        return facts, bool(ran), lines

    run.folder = tmp_path
    return run


def test_unchanged_stage_is_skipped(run):
    assert run({"a": "1"}) == ({"count": 1}, True, [])
    facts, ran, lines = run({"a": "1"})
    assert (facts, ran) == ({"count": 1}, False)
    assert "nothing changed" in lines[0]


def test_changed_part_is_named(run):
    run({"a": "1", "b": "2"})
    _, ran, lines = run({"a": "1", "b": "3", "c": "4"})
    assert ran
    assert lines == ["stage: running again, changed: b, c"]


def test_missing_output_and_no_resume_run_again(run):
    run({})
    (run.folder / "output").unlink()
    assert run({})[1]
    assert run({}, resume=False)[1]


@pytest.mark.parametrize("text", ["", "[]", '{"key": 1, "facts": {}}', '{"facts": {}}'])
def test_damaged_stamp_is_not_believed(run, text):
    run({})
    (run.folder / "stages" / "stage.json").write_text(text)
    assert run({})[1]
    assert json.loads((run.folder / "stages" / "stage.json").read_text())["key"] == {}


def test_failed_stage_leaves_no_stamp(tmp_path):
    def fail():
        raise PcrExportError("no")

    stages = Stages(tmp_path)
    with pytest.raises(PcrExportError):
        stages.run("stage", {}, [], fail)
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_the_lines_that_are_not_comments(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("# set\na cat\n\n  a dog \n")
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize("content", [b"", b"\n\n# only\n", b"\xff\xfe"])
def test_unusable_prompt_files_are_refused(tmp_path, content):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(PcrExportError, match="one prompt a line"):
        read_prompts(path)


def test_packaged_sets_share_no_prompt():
    for name in ("general", "tiny-sdxl"):
        calibration, evaluation = (set(read_prompts(packaged_prompts(n))) for n in (name, f"{name}-eval"))
        assert len(calibration) >= 64
        assert not calibration & evaluation


def test_choice_and_seeds_depend_on_the_seed_alone():
    prompts = [f"prompt {i}" for i in range(100)]
    assert choose_prompts(prompts, 10, 1) == choose_prompts(prompts, 10, 1) != choose_prompts(prompts, 10, 2)
    assert sorted(choose_prompts(prompts, 1000, 0)) == sorted(prompts)
    seeds = prompt_seeds(prompts, 0)
    assert prompt_seeds(prompts[::-1], 0) == seeds[::-1]
    assert len(set(seeds)) == 100
    assert prompt_seeds(prompts, 1) != seeds
