"""Frechet distance to the float model's images, CLIP score and PSNR of two folders of images of the same prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import read_json
from pcr_export.models.load import quiet
from pcr_export.qdiffbench.images import read_images

IMAGES_FOR_A_STABLE_DISTANCE = 2048


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of the artifact's images; those of the float model beside them."""

    n_images: int
    extractor: str | None  # name and hash of the CLIP; None: no CLIP, so neither distance nor CLIP score
    fid_to_fp32: float | None
    clip_score: float | None  # mean of 100 * max(cos(image, text), 0)
    clip_score_fp32: float | None
    psnr_db: float  # mean over the images
    warning: str | None


class ClipExtractor:
    """A CLIP from folders of transformers: the features for the Frechet distance and both sides of the CLIP score."""

    def __init__(self, vision: Path, text: Path, tokenizer: Path) -> None:
        self._vision = CLIPVisionModelWithProjection.from_pretrained(vision, dtype=torch.float32).eval()
        self._text = CLIPTextModelWithProjection.from_pretrained(text, dtype=torch.float32).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        preprocessing = read_json(vision / "preprocessor_config.json")
        self._mean, self._std = (
            torch.tensor(preprocessing[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
        )
        self.num_features: int = self._vision.config.projection_dim
        digest = hashlib.sha256((vision / "model.safetensors").read_bytes()).hexdigest()
        self.name = f"{vision.parent.name}/{vision.name} sha256:{digest[:16]}"

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [batch, 3, height, width] -> float32 [batch, num_features], resized bicubically to the tower's size."""
        size = self._vision.config.image_size
        pixels = images.float() / 255
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = self._vision(pixel_values=(pixels - self._mean) / self._std).image_embeds
        return features

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """float32 [len(prompts), num_features]."""
        tokens = self._tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        features: Tensor = self._text(input_ids=tokens.input_ids).text_embeds
        return features


class _Features(nn.Module):
    """Lets torchmetrics' streaming Frechet distance take features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def find_extractor(pipeline_folder: Path) -> ClipExtractor | None:
    """The CLIP that a pipeline folder brings along (clip_vision/ beside text_encoder_2/), or None."""
    if not (pipeline_folder / "clip_vision" / "model.safetensors").is_file():
        return None
    with quiet():
        return ClipExtractor(*(pipeline_folder / name for name in ("clip_vision", "text_encoder_2", "tokenizer_2")))


def measure_quality(
    artifact: Path, reference: Path, prompts: Sequence[str], extractor: ClipExtractor | None, *, batch: int = 64
) -> Quality:
    """Score the images of two folders, image i belonging to prompt i. Memory does not grow with their number.

    Raises PcrExportError where an image is missing or damaged, or there are fewer than two.
    """
    if len(prompts) < 2:
        raise PcrExportError("fewer than 2 images have no Frechet distance: raise --images")
    distance = FrechetInceptionDistance(feature=_Features(extractor.num_features)) if extractor else None
    psnr, clip, clip_reference = 0.0, 0.0, 0.0
    for start in range(0, len(prompts), batch):
        stop = min(start + batch, len(prompts))
        ours, theirs = (read_images(folder, start, stop) for folder in (artifact, reference))
        psnr += _psnr_sum(ours, theirs)
        if extractor and distance:
            text = extractor.text_features(prompts[start:stop])
            our_features, their_features = extractor.image_features(ours), extractor.image_features(theirs)
            distance.update(our_features, real=False)
            distance.update(their_features, real=True)
            clip += _clip_score_sum(our_features, text)
            clip_reference += _clip_score_sum(their_features, text)
    count = len(prompts)
    return Quality(
        n_images=count,
        extractor=extractor.name if extractor else None,
        fid_to_fp32=distance.compute().item() if distance else None,
        clip_score=clip / count if extractor else None,
        clip_score_fp32=clip_reference / count if extractor else None,
        psnr_db=psnr / count,
        warning=_warning(count, extractor),
    )


def _psnr_sum(ours: Tensor, theirs: Tensor) -> float:
    """Sum of the images' PSNRs in dB; an image without any error counts as 100 dB."""
    each = peak_signal_noise_ratio(ours.float(), theirs.float(), data_range=255.0, dim=(1, 2, 3), reduction="none")
    return each.clamp(max=100).sum().item()


def _clip_score_sum(images: Tensor, text: Tensor) -> float:
    return F.cosine_similarity(images, text).clamp(min=0).sum().item() * 100


def _warning(count: int, extractor: ClipExtractor | None) -> str | None:
    if extractor is None:
        return "no CLIP beside the model: neither Frechet distance nor CLIP score was measured"
    if count < IMAGES_FOR_A_STABLE_DISTANCE:
        return f"a Frechet distance of {count} images is biased (below {IMAGES_FOR_A_STABLE_DISTANCE}): compare equal counts only"
    return None
