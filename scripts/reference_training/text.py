"""Stage text: teach both text towers what a caption says, before anything is conditioned on them.

Every tower's context (the last but one hidden state, which is what SDXL's UNet sees) and the pooled projection must spell out
the scene along fixed orthonormal directions, one per value of an attribute. The directions are not trained, so no attribute can
be encoded more faintly than another; that was the failure of towers trained by image contrast alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pcr_export.models.reference.captions import MAX_TOKENS, write_caption
from pcr_export.models.reference.scenes import (
    ABSENT,
    ATTRIBUTES,
    Scene,
    draw_scene,
    is_held_out,
    scene_from_labels,
    scene_labels,
)
from reference_training.configurations import PROJECTION, build_text_encoder, build_text_encoder_2
from reference_training.loop import Budget, Trainer, write_weights
from reference_training.tokenizer import load_tokenizers, special_tokens, write_tokenizers

SCENES = 32  # per batch; each brings a neighbour that differs in one attribute, and both are captioned twice
SIZES_OF_ATTRIBUTES = [len(values) for values in ATTRIBUTES.values()]


class TextTowers(nn.Module):
    """Both towers, and the fixed directions that their outputs are read along."""

    def __init__(self, tokens: dict[str, int]) -> None:
        super().__init__()
        self.narrow = build_text_encoder(tokens)
        self.wide = build_text_encoder_2(tokens)
        generator = torch.Generator().manual_seed(7)
        for name, width in (("narrow", 96), ("wide", 160), ("pooled", PROJECTION)):
            square = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            self.register_buffer(f"{name}_directions", square[: sum(SIZES_OF_ATTRIBUTES)].clone())

    def forward(self, narrow_ids: torch.Tensor, wide_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map int64 [B, 24] twice to contexts float32 [B, 24, 96] and [B, 24, 160] and the pooled [B, 128]."""
        narrow = self.narrow(narrow_ids, output_hidden_states=True).hidden_states[-2]
        wide = self.wide(wide_ids, output_hidden_states=True)
        return narrow, wide.hidden_states[-2], wide.text_embeds

    def context(self, narrow_ids: torch.Tensor, wide_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what StableDiffusionXLPipeline gives the UNet: context [B, 24, 256] and pooled [B, 128]."""
        narrow, wide, pooled = self(narrow_ids, wide_ids)
        return torch.cat([narrow, wide], -1), pooled


def build_towers(folder: Path) -> TextTowers:
    """Build untrained towers for the tokenizer, which is written first where it is missing."""
    pipeline = folder / "pipeline"
    if not pipeline.exists():
        write_tokenizers(pipeline)
    return TextTowers(special_tokens(load_tokenizers(pipeline)[0]))


def train_text(folder: Path, device: torch.device, steps: int) -> None:
    """Train the towers on captions of training scenes."""
    towers, pipeline = build_towers(folder).to(device), folder / "pipeline"
    trainer = Trainer("text", towers, Budget(steps, 1e-3, averaging=0.99), folder)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = neighbouring_scenes(np.random.default_rng([3, step]), SCENES)
        rng = np.random.default_rng([4, step])
        captions = [write_caption(scene, rng) for scene in scenes * 2]
        labels = torch.tensor([scene_labels(scene) for scene in scenes * 2], device=device)
        loss, figures = text_loss(towers, *(part.to(device) for part in tokenize(captions, pipeline)), labels)
        return loss, figures

    trainer.train(loss_at)
    trainer.load_average()
    write_weights("text", towers, folder)


def tokenize(captions: list[str], pipeline: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [B, 24] for each of the two towers."""
    narrow, wide = load_tokenizers(pipeline)
    rest = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return narrow(captions, **rest).input_ids, wide(captions, **rest).input_ids


def neighbouring_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Draw training scenes, each followed by a training scene that differs from it in one attribute or in the order."""
    scenes: list[Scene] = []
    while len(scenes) < 2 * count:
        scene = draw_scene(rng, held_out=False)
        other = change_one(scene, rng)
        if not is_held_out(other):
            scenes += [scene, other]
    return scenes


def change_one(scene: Scene, rng: np.random.Generator, attribute: str | None = None) -> Scene:
    """Change one attribute (at random when None); `order` swaps two objects, `layout` turns beside into stacked."""
    names = ["background", "pattern", "shape_1", "colour_1", "size_1"]
    if len(scene.objects) == 2:
        names += ["shape_2", "colour_2", "size_2", "order", "layout"]
    name = attribute or names[int(rng.integers(len(names)))]
    if name == "order":
        return replace(scene, objects=scene.objects[::-1])
    if name == "layout":
        return replace(scene, layout="stacked" if scene.layout == "beside" else "beside")
    labels, place = scene_labels(scene), list(ATTRIBUTES).index(name)
    others = [i for i in range(SIZES_OF_ATTRIBUTES[place]) if i != labels[place]]
    if name.startswith("colour"):
        others = [i for i in others if i not in (labels[2], labels[5])]
    labels[place] = others[int(rng.integers(len(others)))]
    return scene_from_labels(labels)


def text_loss(
    towers: TextTowers, narrow_ids: torch.Tensor, wide_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum the reading losses of the three outputs and the contrast between paraphrases."""
    narrow, wide, pooled = towers(narrow_ids, wide_ids)
    end = narrow_ids == towers.narrow.config.eos_token_id  # from the end token on, the whole caption has been read
    rows = end.nonzero()[:, 0]
    loss = torch.zeros((), device=labels.device)
    for context, directions in ((narrow, towers.narrow_directions), (wide, towers.wide_directions)):
        loss = loss + reading_loss(context[end] @ directions.T, labels[rows])[0]
        loss = loss + 1e-3 * context.square().mean()
    pooled_loss, right = reading_loss(pooled @ towers.pooled_directions.T, labels)
    contrast = contrastive_loss(F.normalize(pooled, dim=-1))
    return loss + pooled_loss + 0.3 * contrast, {"pooled": right, "contrast": float(contrast.detach())}


def reading_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Average the attributes' smoothed cross-entropies; also return the share of rows with every attribute right."""
    total, right = (
        torch.zeros((), device=logits.device),
        torch.ones(len(labels), dtype=torch.bool, device=logits.device),
    )
    start = 0
    for i, size in enumerate(SIZES_OF_ATTRIBUTES):
        part, target = logits[:, start : start + size], labels[:, i]
        total = total + F.cross_entropy(part, target, ignore_index=ABSENT, label_smoothing=0.02)
        right &= (part.argmax(1) == target) | (target == ABSENT)
        start += size
    return total / len(SIZES_OF_ATTRIBUTES), float(right.float().mean())


def contrastive_loss(embeddings: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE between the two captions of every scene: rows i and i + B/2 of unit vectors [B, 128] belong together."""
    first, second = embeddings.chunk(2)
    logits = first @ second.T / temperature
    target = torch.arange(len(first), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
