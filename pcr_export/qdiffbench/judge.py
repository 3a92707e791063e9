"""What is measured of a few images at a time, in this process or in a worker: errors of pixels, and what the networks see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
from torch import Tensor

from pcr_export.qdiffbench.distances import Features, clip_scores, psnr_db, ssim
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.workers import Part, Workers, compute_parts, torch_threads


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of each pair of a batch; the last three are empty without extractors."""

    psnr_db: list[float]
    ssim: list[float]
    lpips: list[float] = field(default_factory=list)
    clip_score: list[float] = field(default_factory=list)  # of the artifact's images
    clip_score_fp32: list[float] = field(default_factory=list)


def judge_pairs(
    pairs: Iterable[Part],
    extractors: Extractors | None,
    stores: Mapping[str, Features],
    workers: Workers,
    advance: Callable[[int], None],
) -> dict[str, list[float]]:
    """Each image's figures by their names in Figures, in the order of the images; features go to the stores."""
    found: dict[int, Figures] = {}
    for indices, (figures, features) in compute_parts(JudgePairs(extractors), pairs, workers):
        for name, some in features.items():
            stores[name].write(indices, some)
        found[indices.start] = figures
        advance(len(indices))
    in_order = [found[start] for start in sorted(found)]
    return {each.name: [x for some in in_order for x in getattr(some, each.name)] for each in fields(Figures)}


@dataclass(frozen=True)
class JudgePairs:
    """A Task: the artifact's and the float model's uint8 [batch, 3, height, width], and their prompts -> Figures, features.

    The features are {"artifact", "fp32"}: float32 [batch, num_features] each; none without extractors.
    """

    extractors: Extractors | None

    @contextmanager
    def open(self, threads: int) -> Iterator[Callable[..., tuple[Figures, dict[str, np.ndarray]]]]:
        """As Task says."""
        with torch_threads(threads):
            yield self._judge

    def _judge(self, ours: Tensor, theirs: Tensor, prompts: Sequence[str]) -> tuple[Figures, dict[str, np.ndarray]]:
        pixels = {"psnr_db": psnr_db(ours, theirs), "ssim": ssim(ours, theirs)}
        if self.extractors is None:
            return Figures(**pixels), {}
        text = self.extractors.text_features(prompts)
        our_outputs, their_outputs = self.extractors.outputs(ours), self.extractors.outputs(theirs)
        figures = Figures(
            **pixels,
            lpips=self.extractors.lpips(our_outputs, their_outputs).tolist(),
            clip_score=clip_scores(our_outputs.embeds, text).tolist(),
            clip_score_fp32=clip_scores(their_outputs.embeds, text).tolist(),
        )
        return figures, {"artifact": our_outputs.features.numpy(), "fp32": their_outputs.features.numpy()}


@dataclass(frozen=True)
class ExtractFeatures:
    """A Task: uint8 [batch, 3, height, width] -> float32 [batch, num_features]."""

    extractors: Extractors

    @contextmanager
    def open(self, threads: int) -> Iterator[Callable[[Tensor], np.ndarray]]:
        """As Task says."""
        with torch_threads(threads):
            yield lambda images: self.extractors.features(images).numpy()
