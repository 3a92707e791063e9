"""The parts of the training program: the schedule, resuming, the tokenizer, the folded VAE, the gate's changes, the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_training.configurations import SCALING_FACTOR, build_scheduler, build_unet, build_vae
from reference_training.loop import Budget, Trainer, read_average, read_weights, write_weights
from reference_training.pictures import Pictures, as_images, render
from reference_training.probe import score_pictures
from reference_training.text import change_one, neighbouring_scenes, tokenize
from reference_training.tokenizer import learn_merges, write_tokenizers
from reference_training.unet import predict_noise, stratified_timesteps
from reference_training.vae import fold_standardisation
from torch import nn
from torch.nn import functional as F

from pcr_export.models.reference.captions import grammar_words
from pcr_export.models.reference.scenes import ABSENT, ATTRIBUTES, draw_scene, scene_labels

CPU = torch.device("cpu")


def one_hot_logits(labels: torch.Tensor) -> torch.Tensor:
    columns = zip(labels.clamp(min=0).T, ATTRIBUTES.values(), strict=True)
    return torch.cat([F.one_hot(column, len(values)).float() * 9 for column, values in columns], 1)


def some_labels(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.tensor([scene_labels(draw_scene(rng, held_out=False)) for _ in range(count)])


def train_line(folder: Path, steps: int, budget: int) -> nn.Module:
    """Fit a line on random points for `steps` of `budget` steps, saving at the end."""
    torch.manual_seed(1)
    line = nn.Linear(3, 1)
    trainer = Trainer("line", line, Budget(budget, 0.1, warm_up=2, averaging=0.9), folder)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == steps:
            raise KeyboardInterrupt
        return (line(torch.randn(8, 3)) - 1).square().mean(), {}

    try:
        trainer.train(loss_at)
    except KeyboardInterrupt:
        trainer.save()
    return line


def test_rate_warms_up_stays_and_falls() -> None:
    budget = Budget(steps=1000, rate=1e-3, warm_up=100, decay_from=0.5)
    assert budget.rate_at(0) == pytest.approx(1e-5)
    assert budget.rate_at(99) == budget.rate_at(499) == pytest.approx(1e-3)
    assert budget.rate_at(750) == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert budget.rate_at(1000) == pytest.approx(1e-5)


def test_a_stopped_stage_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    unbroken = train_line(whole, 20, 20)
    train_line(parts, 7, 20)
    resumed = train_line(parts, 20, 20)
    assert torch.equal(unbroken.weight, resumed.weight)
    averages = [read_average("line", nn.Linear(3, 1), folder) for folder in (whole, parts)]
    assert torch.equal(averages[0].weight, averages[1].weight)


def test_weights_are_written_and_missing_ones_named(tmp_path: Path) -> None:
    line = nn.Linear(3, 1)
    write_weights("line", line, tmp_path)
    assert torch.equal(read_weights("line", nn.Linear(3, 1), tmp_path).weight, line.weight)
    with pytest.raises(SystemExit, match="run the stage vae first"):
        read_weights("vae", line, tmp_path)


def test_merges_make_every_word_one_token(tmp_path: Path) -> None:
    assert learn_merges(["aab", "aac"]) == [("a", "a"), ("aa", "b</w>"), ("aa", "c</w>")]
    write_tokenizers(tmp_path)
    for ids in tokenize(grammar_words(), tmp_path):
        assert ids.shape == (len(grammar_words()), 24)
        assert len({int(row[1]) for row in ids}) == len(ids)


def test_folding_standardises_latents_and_changes_no_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    drawn = render(32, 3, held_out=False)
    images = as_images(drawn.pixels)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        fold_standardisation(vae, Pictures(drawn.pixels, drawn.labels), CPU)
        latents = vae.encode(images).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)  # float32 rounding through an untrained decoder
    assert torch.allclose((latents * SCALING_FACTOR).std((0, 2, 3)), torch.ones(4), atol=0.2)  # other pictures


def test_timesteps_cover_every_interval_once() -> None:
    drawn = stratified_timesteps(np.random.default_rng(0), 50)
    assert sorted((drawn // 20).tolist()) == list(range(50))


def test_denoiser_is_called_as_the_pipeline_calls_it() -> None:
    unet = build_unet()
    assert sum(p.numel() for p in unet.parameters()) < 7_500_000
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([1, 951]), torch.randn(2, 24, 256), torch.randn(2, 128)
    with torch.no_grad():
        assert predict_noise(unet, *inputs).shape == (2, 4, 16, 16)
    assert build_scheduler().config.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["background", "shape_1", "colour_1", "size_1", "shape_2", "colour_2", "size_2"])
def test_one_change_changes_one_label(name: str) -> None:
    rng = np.random.default_rng(1)
    pairs = [s for s in (draw_scene(rng, held_out=False) for _ in range(60)) if len(s.objects) == 2]
    for scene in pairs:
        before, after = scene_labels(scene), scene_labels(change_one(scene, rng, name))
        assert [i for i in range(9) if before[i] != after[i]] == [list(ATTRIBUTES).index(name)]
        assert after[2] != after[5]


def test_neighbours_come_in_pairs() -> None:
    scenes = neighbouring_scenes(np.random.default_rng(2), 8)
    assert len(scenes) == 16
    assert all(first != second for first, second in zip(scenes[::2], scenes[1::2], strict=True))


def test_scores_are_one_for_perfect_pictures() -> None:
    labels = some_labels(40)
    assert set(score_pictures(one_hot_logits(labels), labels).values()) == {1.0}


def test_swapped_objects_cost_the_relation_but_not_the_count() -> None:
    labels = some_labels(40)
    labels = labels[labels[:, 4] != ABSENT]
    swapped = labels[:, [0, 4, 5, 6, 1, 2, 3, 7, 8]]
    scores = score_pictures(one_hot_logits(swapped), labels)
    assert scores["relation"] == 0.0
    assert scores["colour"] == 0.0
    assert scores["count"] == scores["background"] == 1.0
