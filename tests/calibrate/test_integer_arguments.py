"""Class-conditional transformers, whose blocks are called with integers: weights are learned, layers kept and left float."""

from pathlib import Path

import pytest
from diffusion_transformer import dit_denoiser

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.learn_weights import WeightLearning
from pcr_export.calibrate.sensitive_layers import SensitivitySearch
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.denoiser import Denoiser
from pcr_export.recipe import Recipe
from pcr_export.sites import Layer

LABELS, SEEDS = [7, 3, 9, 0], [10, 11, 12, 13]


def found_layers(denoiser: Denoiser, recipe: Recipe) -> list[Layer]:
    return find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), recipe.skip)


@pytest.mark.parametrize(
    "changes", [{"weights": "gptq"}, {"weights": "adaround", "adaround_iterations": 5}, {"keep": "2"}]
)
def test_weights_are_learned(changes: dict, tmp_path: Path) -> None:
    denoiser = dit_denoiser()
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "height": 8,
        "width": 8,
        "weight_bits": 4,
        "weight_samples": 9,
    }
    recipe = Recipe(model="dit", **settings, **changes)
    layers = found_layers(denoiser, recipe)
    _, found = WeightLearning(
        denoiser=denoiser,
        layers=layers,
        conditions=LABELS,
        seeds=SEEDS,
        recipe=recipe,
        folder=tmp_path,
        key={"recipe": recipe.hash()},
    ).run()
    facts = found["layers"]
    assert set(facts) == {layer.name for layer in layers if layer.site}
    assert any("transformer_blocks.1.ff" in name for name in facts)
    if "keep" in changes:
        assert sum(each["bits"] == 8 for each in facts.values()) == 2
    if changes.get("weights") == "gptq":
        assert sum(each["error"] for each in facts.values()) < sum(each["rtn_error"] for each in facts.values())


def test_layers_are_searched(tmp_path: Path) -> None:
    denoiser = dit_denoiser()
    recipe = Recipe(model="dit", num_inference_steps=3, guidance_scale=1.0, height=8, width=8)
    layers = found_layers(denoiser, recipe)
    errors = SensitivitySearch(
        denoiser=denoiser,
        layers=layers,
        round_weight=NEAREST_8,
        conditions=LABELS,
        seeds=SEEDS,
        samples=9,
        seed=0,
        folder=tmp_path,
        key={"a": "b"},
    ).run()
    assert set(errors) == {layer.name for layer in layers if layer.site}
    assert all(0 < error < 0.1 for error in errors.values())
