"""QDiffBench's figures as people read them: their order, titles and digits, in every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Metric:
    """One figure. `short` is for the columns of wide tables, where all but the CLIP score are to FP32."""

    title: str
    short: str
    better: str  # "↓" where lower is better, "↑" where higher is, "" where neither
    form: str
    factor: float = 1

    @property
    def head(self) -> str:
        """The title with its arrow."""
        return f"{self.title} {self.better}".strip()

    @property
    def short_head(self) -> str:
        """The short title with its arrow."""
        return f"{self.short} {self.better}".strip()


METRICS: Mapping[str, Metric] = {  # by the fields of `Scores` and of a study's rows
    "n_images": Metric("images", "images", "", "{:.0f}"),
    "fid_to_fp32": Metric("FID to FP32", "FID", "↓", "{:#.3g}"),
    "kid_to_fp32": Metric("1000 KID to FP32", "1000 KID", "↓", "{:#.3g}", factor=1000),
    "fid_to_real": Metric("FID to real images", "FID to real", "↓", "{:#.3g}"),
    "clip_score": Metric("CLIP score", "CLIP", "↑", "{:.2f}"),
    "clip_score_fp32": Metric("CLIP score of FP32", "CLIP of FP32", "", "{:.2f}"),
    "psnr_db": Metric("PSNR to FP32, dB", "PSNR dB", "↑", "{:.2f}"),
    "ssim": Metric("SSIM to FP32", "SSIM", "↑", "{:.4f}"),
    "lpips": Metric("LPIPS to FP32", "LPIPS", "↓", "{:.4f}"),
}


def format_metric(name: str, scores: Mapping[str, Any]) -> str:
    """The figure `name` of scores; a dash where it was not measured."""
    metric, value = METRICS[name], scores.get(name)
    return NOT_MEASURED if value is None else metric.form.format(value * metric.factor)
