"""The training loop that every stage shares: seeded batches, AdamW, a schedule over a budget of steps, atomic checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

Metrics = dict[str, float]
ModuleType = TypeVar("ModuleType", bound=nn.Module)
LossFunction = Callable[[int], tuple[torch.Tensor, Metrics]]


@dataclass(frozen=True)
class Budget:
    """How long and how fast a stage learns. The rate is constant after the warm-up and falls as a cosine from `decay_from`."""

    steps: int
    rate: float
    warm_up: int = 100
    decay_from: float = 0.5  # share of the steps
    weight_decay: float = 0.01
    averaging: float | None = None  # decay of the exponential moving average of the weights
    seconds_between_checkpoints: float = 120.0

    def rate_at(self, step: int) -> float:
        """Return the learning rate at a step, with a cosine to 1 % of the peak at the end."""
        done = step / self.steps
        fall = max(0.0, (done - self.decay_from) / (1 - self.decay_from))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))


@dataclass
class Trainer:
    """A module under training with everything that a resumed run needs."""

    name: str
    module: nn.Module
    budget: Budget
    folder: Path
    step: int = 0

    def __post_init__(self) -> None:
        decay = [p for p in self.module.parameters() if p.ndim > 1]
        plain = [p for p in self.module.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": self.budget.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.budget.rate, betas=(0.9, 0.99), foreach=True)
        self.average = {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.folder / f"{self.name}.pt"

    def resume(self) -> None:
        """Load the checkpoint when there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        for name, value in self.average.items():
            value.copy_(state["average"][name])

    def save(self) -> None:
        """Write the checkpoint through a temporary name."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def train(self, loss_at: LossFunction) -> None:
        """Run the remaining steps. `loss_at(step)` returns the loss and what the progress line shows."""
        self.resume()
        self.module.train()
        saved = time.monotonic()
        with _progress() as bar:
            task = bar.add_task(self.name, total=self.budget.steps, completed=self.step, figures="")
            while self.step < self.budget.steps:
                figures = self._advance(loss_at)
                line = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
                bar.update(task, completed=self.step, figures=line)
                if self.step % 50 == 0 and not bar.console.is_terminal:
                    print(f"{time.strftime('%H:%M:%S')} {self.name} {self.step}/{self.budget.steps} {line}", flush=True)
                if time.monotonic() - saved > self.budget.seconds_between_checkpoints:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def load_average(self) -> None:
        """Put the averaged weights into the module: what is evaluated and shipped."""
        self.module.load_state_dict(self.average)

    def _advance(self, loss_at: LossFunction) -> Metrics:
        for group in self.optimizer.param_groups:
            group["lr"] = self.budget.rate_at(self.step)
        torch.manual_seed(self.step)  # so that a resumed run draws what an unbroken one draws
        loss, figures = loss_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, foreach=True)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        self._update_average()
        return {"loss": float(loss.detach()), **figures}

    @torch.no_grad()
    def _update_average(self) -> None:
        current = self.module.state_dict()
        decay = min(self.budget.averaging or 0.0, (1 + self.step) / (10 + self.step))
        kept = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in kept], [current[name] for name in kept], 1 - decay)
        for name in current.keys() - set(kept):
            self.average[name].copy_(current[name])


def write_weights(name: str, module: nn.Module, folder: Path) -> None:
    """Write a stage's outcome, `name`.safetensors, through a temporary name."""
    partial = folder / f"{name}.safetensors.partial"
    save_file({key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}, partial)
    os.replace(partial, folder / f"{name}.safetensors")


def read_weights(name: str, module: ModuleType, folder: Path) -> ModuleType:
    """Load a stage's outcome into the module and return it frozen, in eval mode."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage {name} first")
    module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False)


def read_average(name: str, module: ModuleType, folder: Path) -> ModuleType:
    """Load the averaged weights of a stage's last checkpoint, finished or not."""
    path = folder / f"{name}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage {name} first")
    module.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["average"])
    return module.eval().requires_grad_(False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
