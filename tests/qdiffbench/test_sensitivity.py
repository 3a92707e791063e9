"""Replayed trajectories equal whole ones, and the choice of steps is what its docstring says."""

import dataclasses
import json

import pytest
import torch
from class_conditional import TIMESTEPS, class_conditional_denoiser

from pcr_export.models.denoiser import Denoiser, sample
from pcr_export.qdiffbench.sensitivity import (
    RelaxTrial,
    Sensitivity,
    candidates,
    choose_steps,
    measure_candidates,
    measure_steps,
    sensitivity_from,
)
from pcr_export.stages import Stages

LABELS, SEEDS = [0, 1, 2], [10, 11, 12]


def sensitivity(*gains: float, relax_bits: int = 10) -> Sensitivity:
    return Sensitivity(
        timesteps=tuple(float(len(gains) - step) for step in range(len(gains))),
        errors=tuple(16 - gain for gain in gains),
        base_error=16.0,
        relax_bits=relax_bits,
        prompts=3,
    )


@pytest.mark.parametrize(
    ("mean_bits", "steps"),
    [(8.0, ()), (8.49, ()), (8.5, (2,)), (9.0, (2, 3)), (9.9, (0, 2, 3)), (10.0, (0, 1, 2, 3))],
)
def test_the_largest_gains_are_chosen(mean_bits, steps):
    assert choose_steps(sensitivity(1, -1, 4, 2), mean_bits) == steps


def test_of_equal_gains_the_earlier_step_is_chosen():
    assert choose_steps(sensitivity(1, 2, 2, 2), 9.0) == (1, 2)
    assert choose_steps(sensitivity(0, 0, 0, 0), 9.5) == (0, 1, 2)


def test_a_mean_is_not_rounded_down_by_binary_fractions():
    """8.1 - 8 is 0.0999... in binary; two bits more at 1 of 20 steps are a mean of 8.1."""
    assert [len(choose_steps(sensitivity(*range(20)), 8 + tenth / 10)) for tenth in range(21)] == list(range(21))
    assert len(choose_steps(sensitivity(*range(20), relax_bits=12), 8.4)) == 2


def test_facts_go_both_ways_through_json():
    known = sensitivity(1, 0.1, -3)
    assert sensitivity_from(json.loads(json.dumps(known.facts()))) == known
    assert known.facts()["steps"][2] == {"step": 2, "timestep": 1.0, "error": 19.0, "gain": -3.0}


class Counted:
    """A network of another seed than the float model's, as a call that counts."""

    def __init__(self, seed: int) -> None:
        self._denoiser = class_conditional_denoiser(seed)
        self.timesteps: list[float] = []

    def __call__(self, inputs):
        self.timesteps.append(float(inputs["t"]))
        return self._denoiser(inputs)


def error_of_a_whole_run(denoiser: Denoiser, plain: Counted, relaxed: Counted, timesteps: set[float]) -> float:
    """The definition: every call of the trajectory is made."""
    final = sample(denoiser, denoiser, LABELS, SEEDS)
    mixed = sample(denoiser, lambda x: (relaxed if float(x["t"]) in timesteps else plain)(x), LABELS, SEEDS)
    return (mixed - final).double().square().mean().item()


@pytest.mark.parametrize("steps", [(), (0,), (1,), (2,), (3,), (4,), (1, 3), (0, 1, 2, 3, 4)])
def test_replay_equals_a_whole_run_and_calls_only_what_follows(steps):
    denoiser, plain, relaxed = class_conditional_denoiser(), Counted(1), Counted(2)
    trial = RelaxTrial(denoiser, plain, relaxed, LABELS, SEEDS)
    plain.timesteps.clear()
    error = trial.error(steps)
    calls = sorted(plain.timesteps + relaxed.timesteps, reverse=True)
    assert calls == list(TIMESTEPS[min(steps, default=5) :])
    assert len(calls) == trial.num_calls(steps)
    assert relaxed.timesteps == [TIMESTEPS[step] for step in steps]
    assert error == error_of_a_whole_run(denoiser, plain, relaxed, {TIMESTEPS[step] for step in steps})
    assert (error == trial.base_error) == (steps == ())


REPEATED = (900.0, 700.0, 700.0, 300.0)


def walk_twice_at_700(labels, seeds):
    """PNDM calls its second timestep twice."""
    x = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for timestep in REPEATED:
        x = x - 0.2 * (yield {"x": x, "t": torch.tensor(timestep), "label": torch.tensor(labels)})
    return x


def test_a_timestep_that_is_called_twice_is_one_step():
    denoiser = dataclasses.replace(class_conditional_denoiser(), timesteps=REPEATED, walk=walk_twice_at_700)
    plain, relaxed = Counted(1), Counted(2)
    trial = RelaxTrial(denoiser, plain, relaxed, LABELS, SEEDS)
    assert trial.timesteps == (900.0, 700.0, 300.0)
    assert [trial.num_calls([step]) for step in range(3)] == [4, 3, 1]
    assert trial.error([1]) == error_of_a_whole_run(denoiser, plain, relaxed, {700.0})
    assert relaxed.timesteps == [700.0] * 4  # two of each run


def test_the_choice_stands_beside_as_many_at_either_end():
    trial = RelaxTrial(class_conditional_denoiser(), Counted(1), Counted(2), LABELS, SEEDS)
    choices = candidates((1, 3), 5)
    assert choices == {"ranked": (1, 3), "first": (0, 1), "last": (3, 4)}
    assert measure_candidates(trial, choices) == {
        "ranked": trial.error([1, 3]),
        "first": trial.error([0, 1]),
        "last": trial.error([3, 4]),
        "none": trial.base_error,
    }
    assert set(measure_candidates(trial, candidates((), 5)).values()) == {trial.base_error}


def test_finished_steps_are_not_measured_again(tmp_path):
    def measure(relaxed: Counted, key: str, folder=tmp_path) -> Sensitivity:
        trial = RelaxTrial(class_conditional_denoiser(), Counted(1), relaxed, LABELS, SEEDS)
        return measure_steps(trial, 10, Stages(folder), {"key": key})

    whole = measure(Counted(2), "one", tmp_path / "whole")
    assert len(set(whole.errors)) == 5
    measure(Counted(2), "one")
    (tmp_path / "step_00003.json").unlink()
    (tmp_path / "step_00001.json").write_text("{")  # damaged
    again = Counted(2)
    assert measure(again, "one") == whole
    assert again.timesteps == [TIMESTEPS[1], TIMESTEPS[3]]
    other = Counted(2)
    measure(other, "two")
    assert len(other.timesteps) == 5


def test_steps_are_noise_levels_in_descending_order():
    """DPM2 ancestral calls some of them past the next one: step 1 is the third call."""
    timesteps = (900.0, 499.75, 500.0, 500.0, 100.0)
    denoiser = dataclasses.replace(class_conditional_denoiser(), timesteps=timesteps)
    trial = RelaxTrial(denoiser, Counted(1), Counted(2), LABELS, SEEDS)
    assert trial.timesteps == (900.0, 500.0, 499.75, 100.0)
    assert [trial.num_calls([step]) for step in range(4)] == [5, 3, 4, 1]
    relaxed = Counted(2)
    RelaxTrial(denoiser, Counted(1), relaxed, LABELS, SEEDS).error([1])
    assert len(relaxed.timesteps) == 2  # of both calls at 500
