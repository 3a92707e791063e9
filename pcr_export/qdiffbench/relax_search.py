"""`--relax auto:8.4`: two artifacts, with no step and with every step relaxed, tell which steps are worth their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.models.denoiser import Denoiser
from pcr_export.progress import Track, silent
from pcr_export.qdiffbench.painters import engine_call
from pcr_export.qdiffbench.sensitivity import (
    RelaxTrial,
    Sensitivity,
    candidates,
    choose_steps,
    measure_candidates,
    measure_steps,
    sensitivity_from,
)
from pcr_export.relaxed_steps import format_steps
from pcr_export.stages import Facts, Key, Stages
from pcr_export.write_files import write_json

ARTIFACTS = {"never": "none", "always": "first:100%"}  # folder -> its recipe's `relax`


@dataclass(frozen=True, kw_only=True)
class RelaxSearch:
    """One search: the model, the prompts that it is measured on, and where it keeps what is done."""

    denoiser: Denoiser
    conditions: Sequence[Any]  # the batch that errors are measured on
    seeds: Sequence[int]
    relax_bits: int
    key: Key  # of the calibration with no step relaxed
    folder: Path  # for the stages' stamps; "sensitivity" in it for the two artifacts and the error of each step
    quantize: Callable[[str, Path], object]  # (relax, folder): write the artifact of this relax to that folder
    resume: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def sensitivity(self) -> Sensitivity:
        """What relaxing each step alone does to the final latents; measured once and kept."""
        graphs = [self._graph(name) for name in ARTIFACTS]
        return sensitivity_from(self._stages().run("sensitivity", self.key, graphs, self._measure))

    def choose(self, mean_bits: float, relax: str, path: Path) -> Facts:
        """Choose the steps for `mean_bits` activation bits on average and write the whole search to `path` (sensitivity.json).

        The steps with the largest gains and as many at either end are measured; the choice with the least error wins.

        Returns "relax" (as it was asked for), "choice" (its name), "steps", and "errors" of all choices (`measure_candidates`).
        """
        sensitivity = self.sensitivity()
        choices = candidates(choose_steps(sensitivity, mean_bits), len(sensitivity.timesteps))

        def measure() -> Facts:
            with self._trial() as trial:
                return {"errors": measure_candidates(trial, choices, track=self.track)}

        key = {**self.key, "steps": format_steps(choices["ranked"])}
        errors = self._stages().run("relax-choice", key, [], measure)["errors"]
        best = min(choices, key=lambda name: errors[name])
        chosen = {"relax": relax, "choice": best, "steps": list(choices[best]), "errors": errors}
        write_json(path, {**sensitivity.facts(), "chosen": chosen})
        return chosen

    def _measure(self) -> Facts:
        for name, relax in ARTIFACTS.items():
            self.quantize(relax, self.folder / "sensitivity" / name)
        records = Stages(self.folder / "sensitivity", resume=self.resume)
        with self._trial() as trial:
            return measure_steps(trial, self.relax_bits, records, self.key, track=self.track).facts()

    @contextmanager
    def _trial(self) -> Iterator[RelaxTrial]:
        never, always = (self._graph(name) for name in ARTIFACTS)
        threads = torch.get_num_threads()
        with OnnxRuntimeEngine(never, threads) as plain, OnnxRuntimeEngine(always, threads) as relaxed:
            calls = (engine_call(plain), engine_call(relaxed))
            yield RelaxTrial(self.denoiser, *calls, self.conditions, self.seeds, track=self.track)

    def _graph(self, name: str) -> Path:
        return self.folder / "sensitivity" / name / "unet" / "model.onnx"

    def _stages(self) -> Stages:
        return Stages(self.folder, resume=self.resume, log=self.log)
