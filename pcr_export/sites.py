"""What is quantized and why not: the list that calibration, the graph and the report share."""

from __future__ import annotations

from dataclasses import dataclass


def block_of(module: str, depth: int = 0) -> str:
    """The block that a module path lies in: "down.1" for down_blocks.1.attentions.0.proj_in, "down.1.attentions" with depth 1."""
    parts = module.split(".")
    own = 2 if parts[0] in ("down_blocks", "up_blocks") else 1
    return ".".join(parts[: own + depth]).replace("_blocks", "").replace("_block", "")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One Linear or Conv2d of the denoiser. Either it reads a site (quantized) or it has a reason to stay float."""

    name: str  # module path, e.g. down_blocks.0.resnets.0.conv1
    op: str  # "Linear" or "Conv2d"
    site: str | None  # the site that it reads: module path of the first layer reading the same tensor
    affine: bool = False  # the op has no zero padding, so its input may carry a zero offset
    reason: str | None = None  # why the layer stays float

    def __post_init__(self) -> None:
        if (self.site is None) == (self.reason is None):
            raise ValueError(f"{self.name}: a layer has a site or a reason to stay float, and never both")
