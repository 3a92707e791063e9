"""QDiffBench of an exported folder: what it writes, what it keeps, and a run killed in the middle."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported_tiny_sdxl import ONE_THREAD
from safetensors.numpy import save_file

from pcr_export.errors import PcrExportError, PromptWarning
from pcr_export.manifest import check_files, read_manifest, write_manifest
from pcr_export.models.lora_file import LoraFile
from pcr_export.qdiffbench.evaluate import Evaluation, evaluate_folder, table_rows
from pcr_export.qdiffbench.features import find_extractors
from pcr_export.qdiffbench.workers import Workers
from pcr_export.recipe import read_recipe

PROMPTS = "\n".join(["a red cat", "a dog", "re", "a red cat", "the moon", "a boat on the wide sea"])


@pytest.fixture
def evaluation(exported, tmp_path) -> Evaluation:
    """Two domains of four and six prompts, in a folder of their own."""
    (tmp_path / "in.txt").write_text(PROMPTS)
    (tmp_path / "out.tsv").write_text("Prompt\tCategory\n" + "\tAbstract\n".join(PROMPTS.split("\n")[::-1]) + "\t")
    shutil.copytree(exported, tmp_path / "folder")
    return Evaluation(folder=tmp_path / "folder", prompts=[tmp_path / "in.txt", tmp_path / "out.tsv"])


def judge(evaluation: Evaluation) -> tuple[dict, list[str]]:
    """evaluation.json of an evaluation, and the lines that it logged."""
    lines: list[str] = []
    extractors = find_extractors(evaluation.source)
    return evaluate_folder(replace(evaluation, log=lines.append), extractors), lines


def test_a_fused_lora_has_to_be_given_again(evaluation, tmp_path):
    lora = LoraFile(tmp_path / "style.safetensors", 0.5)
    save_file({"unet.conv_in.lora_A.weight": np.ones((1, 1), np.float32)}, lora.path)
    assert evaluation.settings.lora == ()
    recipe = replace(evaluation.recipe, lora=(lora.facts(),))
    (evaluation.folder / "recipe.json").write_text(recipe.to_json())
    assert replace(evaluation, lora=(lora,)).settings.lora == (lora,)
    for wrong in ((), (replace(lora, scale=1.0),), (lora, lora)):
        with pytest.raises(
            PcrExportError, match=r"was exported with --lora style\.safetensors:0\.5: give the same files"
        ):
            _ = replace(evaluation, lora=wrong).settings


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in (folder / "evaluation").rglob("*.png")}


def test_what_is_written_and_what_a_second_run_keeps(evaluation):
    with pytest.warns(
        PromptWarning, match=r"1 of 6 prompts of .* are longer than 16 tokens.* number \d .*'a boat on"
    ) as cut:
        result, _ = judge(evaluation)
    assert len([warning for warning in cut if warning.category is PromptWarning]) == 2
    folder = evaluation.folder
    assert json.loads((folder / "evaluation.json").read_text()) == result
    assert (folder / "report.html").is_file()
    check_files(folder, read_manifest(folder))  # nothing that deployment reads was touched
    for domain, name in zip(result["domains"], ("in", "out"), strict=True):
        assert (domain["name"], domain["n_images"]) == (name, 6)
        per_image = json.loads((folder / domain["per_image"]).read_text())
        assert [len(values) for values in per_image.values()] == [6, 6, 6, 6]
        assert domain["scores"]["psnr_db"] == pytest.approx(sum(per_image["psnr_db"]) / 6)
        assert 15 < domain["scores"]["psnr_db"] < 60  # a quantized model: neither another nor the same
        assert domain["scores"]["fid_to_fp32"] is not None
        assert sorted(path.name for path in (folder / domain["fp32"]).glob("*.png"))[-1] == "00005.png"
    before = times(folder)
    again, lines = judge(evaluation)
    assert again == result
    assert times(folder) == before
    assert lines == ["scores: done before, nothing changed"] * 2
    assert ("images", "6", "6") in table_rows(result)


def test_another_seed_and_another_artifact_paint_again_exactly_what_depends_on_them(evaluation):
    folder = evaluation.folder
    first, _ = judge(evaluation)
    before = times(folder)
    recipe = read_recipe(folder)
    (folder / "recipe.json").write_text(replace(recipe, min_sqnr_db=1.0).to_json())  # of the artifact, not of the model
    write_manifest(folder)
    judge(replace(evaluation))
    after = times(folder)
    assert {name for name in after if after[name] != before[name]} == {name for name in after if "/artifact/" in name}
    second, _ = judge(replace(evaluation, seed=1))
    assert all(times(folder)[name] != after[name] for name in after)
    assert second["domains"][0]["scores"]["psnr_db"] != first["domains"][0]["scores"]["psnr_db"]


@pytest.mark.slow
def test_killed_in_mid_run_goes_on_to_the_same_figures(evaluation):
    whole, _ = judge(evaluation)
    killed = evaluation.folder.with_name("killed")
    shutil.copytree(evaluation.folder, killed, ignore=shutil.ignore_patterns("evaluation*", "report.html", ".stages"))
    command = [sys.executable, "-m", "pcr_export", "evaluate", str(killed)]
    command += [word for path in evaluation.prompts for word in ("--prompts", str(path))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while not (killed / "evaluation" / "in" / "artifact" / "00000.png").exists():
        assert process.poll() is None, "the evaluation ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "evaluation.json").exists()
    (killed / "evaluation" / "in" / "artifact" / "00001.png").unlink(missing_ok=True)
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
    assert json.loads((killed / "evaluation.json").read_text())["domains"] == whole["domains"]


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one(evaluation):
    one, _ = judge(evaluation)
    two, _ = judge(replace(evaluation, workers=Workers(count=2), resume=False))
    assert two == one


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"images": 1}, "--images must be at least 2"),
        ({"real": Path("none")}, "--real none is no folder"),
        ({"folder": Path("none")}, "none is no folder: give one that an export wrote"),
        ({"prompts": [Path("none.csv")]}, "none.csv is missing"),
        ({"model": "nobody-knows-it"}, "unknown model"),
    ],
)
def test_what_is_refused(changed, expected, evaluation):
    with pytest.raises(PcrExportError, match=expected):
        evaluate_folder(replace(evaluation, **changed), None)


def test_prompt_files_of_one_name_are_refused(evaluation, tmp_path):
    (tmp_path / "in.csv").write_text("Prompt\na cat\na dog\n")
    with pytest.raises(PcrExportError, match="2 prompt files are called in"):
        evaluate_folder(replace(evaluation, prompts=[*evaluation.prompts, tmp_path / "in.csv"]), None)
