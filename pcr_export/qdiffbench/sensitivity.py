"""Relax search: what each step alone gains from more bits, measured once, and the steps chosen from it for a mean bit-width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pcr_export.models.denoiser import Denoiser, Inputs, noise_levels, sample
from pcr_export.progress import Track, silent
from pcr_export.stages import Facts, Key, Stages

FORMAT = 1
ROUNDING = 1e-6  # of a step: 8.1 bit in a float is a little less than that, and still pays for 1 of 20 steps
Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What relaxing each step alone does to the final result; step 0 = noisiest.

    An error is the mean squared error of the final latents to those of the float model: same prompts, same noise.
    """

    timesteps: tuple[float, ...]  # of the steps, descending
    errors: tuple[float, ...]  # with that step alone relaxed
    base_error: float  # with no step relaxed
    relax_bits: int
    prompts: int

    @property
    def gains(self) -> tuple[float, ...]:
        """By how much relaxing each step alone lowers the error; negative where it does not."""
        return tuple(self.base_error - error for error in self.errors)

    def facts(self) -> Facts:
        """As plain JSON: what sensitivity.json holds."""
        rows = zip(self.timesteps, self.errors, self.gains, strict=True)
        return {
            "format": FORMAT,
            "relax_bits": self.relax_bits,
            "prompts": self.prompts,
            "base_error": self.base_error,
            "steps": [
                {"step": step, "timestep": timestep, "error": error, "gain": gain}
                for step, (timestep, error, gain) in enumerate(rows)
            ],
        }


def sensitivity_from(facts: Mapping[str, Any]) -> Sensitivity:
    """Read what `Sensitivity.facts` returned."""
    return Sensitivity(
        timesteps=tuple(row["timestep"] for row in facts["steps"]),
        errors=tuple(row["error"] for row in facts["steps"]),
        base_error=facts["base_error"],
        relax_bits=facts["relax_bits"],
        prompts=facts["prompts"],
    )


def choose_steps(sensitivity: Sensitivity, mean_bits: float) -> tuple[int, ...]:
    """The steps to relax so that a step has `mean_bits` activation bits on average, and not more; ascending.

    Those with the largest gains, of equal ones the earlier. With T steps,  k = floor((mean_bits - 8) / (relax_bits - 8) * T).
    That set has the least error if gains add up. They need not: `measure_choice` says what it is worth.
    """
    num_steps = len(sensitivity.errors)
    count = int((mean_bits - 8) / (sensitivity.relax_bits - 8) * num_steps + ROUNDING)
    gains = sensitivity.gains
    ranking = sorted(range(num_steps), key=lambda step: (-gains[step], step))
    return tuple(sorted(ranking[:count]))


class RelaxTrial:
    """One batch of prompts, walked with the 8-bit network at some steps and with the relaxed one at the others.

    Both networks are whole artifacts, calibrated each for itself. So the row of a relaxed step was found while every step before
    it was relaxed, and that of an 8-bit step while none was: a stand-in for the artifact that is made of the chosen steps, whose
    rows are found with exactly those relaxed. It costs two calibrations instead of one per trial.

    Args:
        denoiser: its network makes the latents that errors are measured from, its walk drives all three.
        plain, relaxed: the network with every step at 8 bits, and with every step relaxed.
        conditions, seeds: the batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plain: Call,
        relaxed: Call,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        track: Track = silent,
    ) -> None:
        self.timesteps = tuple(noise_levels(denoiser.timesteps))  # of the steps
        self.prompts = len(conditions)
        self._denoiser = denoiser
        self._plain = plain
        self._relaxed = relaxed
        self._batch = (conditions, seeds)
        self._plain_outputs: list[Tensor] = []
        with track("trajectories to start from", 2 * len(denoiser.timesteps)) as advance:

            def call_float(inputs: Inputs) -> Tensor:
                advance(1)
                return denoiser(inputs)

            def call_plain(inputs: Inputs) -> Tensor:
                advance(1)
                self._plain_outputs.append(plain(inputs))
                return self._plain_outputs[-1]

            self._float_latents = sample(denoiser, call_float, conditions, seeds)
            self.base_error = self._distance(sample(denoiser, call_plain, conditions, seeds))

    def error(self, steps: Collection[int]) -> float:
        """The final error with these steps relaxed. Up to the first of them the 8-bit outputs are replayed: no network runs."""
        relaxed, start = {self.timesteps[step] for step in steps}, self._first_call(steps)
        calls = enumerate(self._denoiser.timesteps)

        def call(inputs: Inputs) -> Tensor:
            index, timestep = next(calls)
            if index < start:
                return self._plain_outputs[index]
            return self._relaxed(inputs) if timestep in relaxed else self._plain(inputs)

        return self._distance(sample(self._denoiser, call, *self._batch))

    def num_calls(self, steps: Collection[int]) -> int:
        """Network calls that `error` makes."""
        return len(self._denoiser.timesteps) - self._first_call(steps)

    def _first_call(self, steps: Collection[int]) -> int:
        timesteps = self._denoiser.timesteps
        return min((timesteps.index(self.timesteps[step]) for step in steps), default=len(timesteps))

    def _distance(self, latents: Tensor) -> float:
        return (latents - self._float_latents).double().square().mean().item()


def measure_steps(
    trial: RelaxTrial, relax_bits: int, records: Stages, key: Key, *, track: Track = silent
) -> Sensitivity:
    """Relax each step alone: about T^2 / 2 network calls. `records` keeps each step's error, which a stopped run goes on from."""
    steps = range(len(trial.timesteps))
    errors = []
    with track("sensitivity of each step", sum(trial.num_calls([step]) for step in steps)) as advance:
        for step in steps:
            errors.append(records.run(f"step_{step:05d}", key, [], partial(_error_facts, trial, step))["error"])
            advance(trial.num_calls([step]))
    return Sensitivity(
        timesteps=trial.timesteps,
        errors=tuple(errors),
        base_error=trial.base_error,
        relax_bits=relax_bits,
        prompts=trial.prompts,
    )


def _error_facts(trial: RelaxTrial, step: int) -> Facts:
    return {"error": trial.error([step])}


def candidates(ranked: Sequence[int], num_steps: int) -> dict[str, tuple[int, ...]]:
    """The steps with the largest gains, and as many at either end of the trajectory: gains don't add up, so none is sure to win."""
    count = len(ranked)
    ends = {"first": tuple(range(count)), "last": tuple(range(num_steps - count, num_steps))}
    return {"ranked": tuple(ranked), **ends}


def measure_candidates(
    trial: RelaxTrial, choices: Mapping[str, Sequence[int]], *, track: Track = silent
) -> dict[str, float]:
    """The final error with each choice of steps relaxed, by its name, and with none."""
    errors = {}
    with track("the best choice of steps", sum(trial.num_calls(each) for each in choices.values())) as advance:
        for name, each in choices.items():
            errors[name] = trial.error(each)
            advance(trial.num_calls(each))
    return {**errors, "none": trial.base_error}
