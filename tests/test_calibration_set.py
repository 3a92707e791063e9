"""Which calibration an export goes on with: another condition, another seed, another order, and nothing stale is reused."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from class_conditional import class_conditional_denoiser
from class_conditional import walk as walk_labels

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.denoiser import Denoiser
from pcr_export.prompts import prompt_seeds


def label(number: int) -> torch.Tensor:
    """A condition whose print leaves the label out."""
    x = torch.zeros(5000)
    x[2500] = number
    return x


def denoiser() -> Denoiser:
    """Takes its labels from long tensors."""

    def walk(conditions, seeds):
        return walk_labels([int(x[2500]) for x in conditions], seeds)

    return replace(class_conditional_denoiser(), walk=walk)


@functools.cache
def float_graph():
    network = denoiser()
    return trace_float_onnx(network, next(network.walk([label(0)] * 2, [0, 1])))


def job(folder: Path, labels=(1, 2), seeds=None) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)
    conditions = [label(each) for each in labels]
    quick = {"validate": False, "float_graph": float_graph}
    return Job(denoiser=denoiser(), recipe=recipe, conditions=conditions, seeds=seeds, folder=folder, **quick)


def scales(folder: Path) -> bytes:
    return (folder / "step_scales.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"labels": (1, 2), "seeds": [7, 7]},
            {"labels": (4, 2), "seeds": [7, 7]},
        ),  # equal seeds: the last one stood for both
        ({"labels": (1, 2), "seeds": [7, 8]}, {"labels": (1, 4), "seeds": [7, 8]}),  # the tensors print alike
    ],
)
def test_other_conditions_are_calibrated_again(tmp_path: Path, first: dict, second: dict) -> None:
    export_denoiser(job(tmp_path / "reused", **first))
    export_denoiser(job(tmp_path / "reused", **second))
    export_denoiser(job(tmp_path / "fresh", **second))
    assert scales(tmp_path / "reused") == scales(tmp_path / "fresh")


def test_conditions_that_print_alike_have_noise_of_their_own(tmp_path: Path) -> None:
    seeds = job(tmp_path, labels=(1, 2, 1)).noise_seeds()
    assert len(set(seeds)) == 3
    assert job(tmp_path, labels=(2, 1)).noise_seeds() == [seeds[1], seeds[0]]  # a condition keeps its own


def test_prompts_and_numbers_keep_the_noise_that_they_had(tmp_path: Path) -> None:
    for conditions in (["a red circle", "two", "two"], [0, 1, 2, 0], [0.5, True, None]):
        made = replace(job(tmp_path), conditions=conditions).noise_seeds()
        assert made == prompt_seeds([str(each) for each in conditions], 0)


def test_a_seed_too_few_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="1 seeds for 2 conditions: give one for each"):
        export_denoiser(job(tmp_path, seeds=[7]))
