"""Stage brief: teach the text towers short captions after the denoiser has learned from full ones.

A copy of the towers is taught to say, from the end of a short caption on, what the towers say of the full caption that it stands for;
on full captions it must say what they said before, so that nothing moves under the denoiser and the image tower.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pcr_export.models.reference.captions import write_caption, write_short_caption
from pcr_export.models.reference.scenes import draw_scene
from reference_training.loop import Budget, Trainer, write_weights
from reference_training.text import TextTowers, tokenize

CAPTIONS = 64  # of each kind, per batch


def train_brief(towers: TextTowers, folder: Path, device: torch.device, steps: int) -> None:
    """Train a copy of `towers`; its weights are written as `brief`."""
    teacher = copy.deepcopy(towers).requires_grad_(False).eval()
    towers.requires_grad_(True)
    trainer = Trainer("brief", towers, Budget(steps, 5e-4, averaging=0.98), folder)

    def ids_of(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        narrow, wide = tokenize(captions, folder / "pipeline")
        return narrow.to(device), wide.to(device)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([13, step])
        scenes = [draw_scene(rng, held_out=False) for _ in range(CAPTIONS)]
        short, meant = zip(*(write_short_caption(scene, rng) for scene in scenes), strict=True)
        full_ids, short_ids = (ids_of(captions) for captions in ([write_caption(s, rng) for s in scenes], list(short)))
        meant_ids = ids_of([write_caption(scene, rng) for scene in meant])
        kept = sum(_distance(mine, before) for mine, before in zip(towers(*full_ids), teacher(*full_ids), strict=True))
        end = towers.narrow.config.eos_token_id
        target = [_from_the_end(x, meant_ids[0] == end) for x in teacher(*meant_ids)]
        read = (short_ids[0] == end)[:, :, None]
        filled = sum(_distance(mine, want, read) for mine, want in zip(towers(*short_ids), target, strict=True))
        return 3 * kept + filled, {"kept": float(kept.detach()), "filled": float(filled.detach())}

    trainer.train(loss_at)
    trainer.load_average()
    write_weights("brief", towers, folder)


def _distance(mine: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error relative to the target's energy; of a context only `where` (bool [B, tokens, 1])."""
    if where is None or want.ndim == 2:
        return F.mse_loss(mine, want) / want.square().mean()
    return ((mine - want).square() * where).sum() / (want.square() * where).sum()


def _from_the_end(context: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The context [B, tokens, width] with every row before the caption's end replaced by the row at its end."""
    if context.ndim == 2:
        return context
    first = end.int().argmax(dim=1)
    at_end = context[torch.arange(len(context)), first][:, None]
    return torch.where(end[:, :, None], context, at_end)
