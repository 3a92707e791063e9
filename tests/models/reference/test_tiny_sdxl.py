"""The shipped folder is a StableDiffusionXLPipeline, small enough to ship, whose tokenizer keeps every word whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

import pcr_export.models.reference
from pcr_export.models.reference.captions import MAX_TOKENS, grammar_words

MODEL = Path(pcr_export.models.reference.__file__).parent / "tiny-sdxl"
CALIB = Path(__file__).parents[3] / "calib"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(MODEL, add_watermarker=False)
    loaded.to(torch.float32).set_progress_bar_config(disable=True)
    return loaded


def prompts(name: str) -> list[str]:
    return (CALIB / name).read_text().splitlines()


def test_folder_is_small_enough_to_ship() -> None:
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) <= 20_000_000


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_every_word_is_one_token(name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / name)
    assert tokenizer.model_max_length == MAX_TOKENS
    for word in grammar_words():
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end


@pytest.mark.parametrize(
    ("name", "count"),
    [("tiny-sdxl.txt", 256), ("tiny-sdxl-eval.txt", 2048), ("tiny-sdxl-out-of-domain.txt", 2048)],
)
def test_prompt_files_hold_distinct_prompts_that_fit(name: str, count: int) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    lines = prompts(name)
    assert len(lines) == len(set(lines)) == count
    assert max(len(ids) for ids in tokenizer(lines).input_ids) <= MAX_TOKENS
    assert {word for line in lines for word in re.findall(r"[a-z]+", line)} <= set(grammar_words())


def test_evaluation_prompts_are_not_calibration_prompts() -> None:
    calibration = set(prompts("tiny-sdxl.txt"))
    assert calibration.isdisjoint(prompts("tiny-sdxl-eval.txt"))
    assert calibration.isdisjoint(prompts("tiny-sdxl-out-of-domain.txt"))


def test_pipeline_paints_the_colours_asked_for(pipeline: StableDiffusionXLPipeline) -> None:
    asked = {"red": (222, 36, 36), "green": (36, 164, 68), "blue": (40, 84, 224)}
    captions = [f"a large {colour} circle on a plain white background" for colour in asked]
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    made = pipeline(captions, height=64, width=64, num_inference_steps=10, generator=seeds, output_type="pt")
    middle = made.images[:, :, 28:36, 28:36].mean((2, 3)) * 255
    corner = made.images[:, :, :8, :8].mean((2, 3)) * 255
    assert torch.allclose(middle, torch.tensor(list(asked.values()), dtype=torch.float32), atol=60)
    assert bool((corner > 185).all())  # white, not gray


@torch.no_grad()
def test_image_and_text_towers_share_a_space(pipeline: StableDiffusionXLPipeline) -> None:
    vision = CLIPVisionModelWithProjection.from_pretrained(MODEL / "clip_vision").float()
    assert vision.config.projection_dim == pipeline.text_encoder_2.config.projection_dim
    assert vision(torch.zeros(1, 3, 64, 64)).image_embeds.shape == (1, 128)
