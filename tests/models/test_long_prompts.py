"""Prompts that are cut are counted with the pipeline's own tokenizers, and said once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from models.tiny_pipelines import START, TOKENS, tiny_sd, tiny_tokenizer

from pcr_export.errors import PromptWarning
from pcr_export.export_pipeline import pipeline_job
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.recipe import Recipe

# Every letter is a token, and both ends are: 14 letters are read.
FITS = "a b c d e f g h i j k l m n"
PAST = FITS + " o p"


def said(tokenizers: list, prompts: list[str], *, quote: bool = True) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_cut_prompts(tokenizers, prompts, "calibration prompts", quote=quote)
    assert all(warning.category is PromptWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_the_first_is_named_and_all_are_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert len(tokenizer(FITS)["input_ids"]) == TOKENS
    assert said([tokenizer], [FITS, "red"]) == []
    assert said([tokenizer], []) == []
    assert said([tokenizer], [FITS, PAST, "z " * 40]) == [
        "2 of 3 calibration prompts are longer than 16 tokens, and what comes after is not read: the first is number 2 "
        "(18 tokens), 'a b c d e f g h i j k l m n o p'; 2 of them differ only there, and count as the same: shorten them or "
        "leave some out"
    ]


def test_those_that_are_the_same_when_cut_are_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    (line,) = said([tokenizer], [f"{FITS} {end}" for end in "wxyz"])
    assert "; 4 of them differ only there, and count as the same: shorten them or leave some out" in line
    (line,) = said([tokenizer], [PAST, PAST, "red " * 20])
    assert "count as the same" not in line  # what stands there twice was meant to
    assert "\n" not in line


def test_the_shorter_of_two_tokenizers_counts(tmp_path: Path) -> None:
    short, long = tiny_tokenizer(tmp_path / "short"), tiny_tokenizer(tmp_path / "long")
    long.model_max_length = 10
    (line,) = said([short, long], [FITS])
    assert "1 of 1 calibration prompts are longer than 10 tokens" in line
    (line,) = said([long, short], [FITS[:19] + " x", FITS[:19] + " y"])  # cut by one of them, told apart by the other
    assert "count as the same" not in line


def test_a_servers_log_does_not_hold_the_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    lines = said([tokenizer], [PAST], quote=False) + said([tokenizer], ["z " * 40], quote=False)
    assert lines == ["calibration prompts longer than 16 tokens: what comes after is not read"] * 2


def test_both_of_sdxls_tokenizers_are_found(tmp_path: Path) -> None:
    class Parts:
        tokenizer = tiny_tokenizer(tmp_path)
        tokenizer_2 = None

    assert tokenizers_of(Parts()) == [Parts.tokenizer]
    assert START in Parts.tokenizer.get_vocab()


def test_a_textual_inversion_counts_as_many_tokens_as_it_has_vectors(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    letters = "a b c d e f g h i j k"
    assert said([tokenizer], [f"{letters} <cat>"]) == []
    (line,) = said([tokenizer], [f"{letters} l <cat>"])
    assert "(17 tokens)" in line


def test_calibration_prompts_of_an_export_are_counted(tmp_path: Path) -> None:
    model = load_model(resolve(str(tiny_sd(tmp_path / "random"))))
    sampling = {"num_inference_steps": 2, "guidance_scale": 1.5, "height": 16, "width": 16}
    recipe = Recipe(model="random", **sampling, calib_size=2)
    with pytest.warns(PromptWarning, match="2 of 2 calibration prompts .*; 2 of them differ only there"):
        pipeline_job(model, recipe, [f"{FITS} {end}" for end in "wxyz"], tmp_path / "out")


def test_the_warning_is_one_line_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pcr_export.terminal import show_warning

    show_warning(PromptWarning("1 of 1 prompts"), PromptWarning, __file__, 1)
    assert capsys.readouterr().err == "warning: 1 of 1 prompts\n"
