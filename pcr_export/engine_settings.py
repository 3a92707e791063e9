"""Which engines are asked for: backend, GPUs, and the range of batches and picture sizes. Plain data, no heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pcr_export.errors import PcrExportError

BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt")
Range = tuple[int, int, int]  # minimum, optimum, maximum


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The engines of one export. onnxruntime's graph is written with every backend."""

    backend: str = "onnxruntime"
    targets: tuple[str, ...] = ()  # GPUs such as sm89
    batch: Range = (1, 1, 1)  # conditions (images) per call
    height: Range | None = None  # pixels; None: the height that is calibrated at
    width: Range | None = None  # pixels
    allow_float_fallback: bool = False  # keep an engine in which a layer that was to be INT8 is not
    build: bool = True  # False: the graph and the commands that build its engines elsewhere
    rebuild_command: str | None = None  # what a person types to build them again

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise PcrExportError(f"--backend {self.backend} is unknown: choose one of {', '.join(BACKENDS)}")
        if self.targets and not self.wants_tensorrt:
            raise PcrExportError("--target names GPUs: say --backend tensorrt-rtx (or tensorrt) with it")

    @property
    def wants_tensorrt(self) -> bool:
        """Whether TensorRT's dialect of the graph is asked for."""
        return self.backend != "onnxruntime"

    def check_picture_sizes(self, unit: int) -> None:
        """Raise PcrExportError where a height or width, MIN and MAX too, is no multiple of `unit` (pixels, of the UNet and its VAE)."""
        for name in ("height", "width"):
            for value in getattr(self, name) or ():
                if value % unit:
                    raise PcrExportError(
                        f"--{name} {value} is no size of this model's pictures: use multiples of {unit}"
                    )

    def axes(self, sizes: Mapping[str, int], pixels: Mapping[str, int], conditions: int) -> dict[str, Range]:
        """Minimum, optimum and maximum of each symbolic axis of the network's inputs.

        Args:
            sizes: of the axes in one example call with `conditions` conditions.
            pixels: height and width of the pictures in that call; what `sizes` calls so is scaled with them.

        Raises:
            PcrExportError: a picture size is none that the network's latents can have.
        """
        asked = {"batch": (self.batch, conditions), **{name: (getattr(self, name), pixels[name]) for name in pixels}}
        return {name: _scaled(name, size, *asked.get(name, (None, 1))) for name, size in sizes.items()}


def _scaled(name: str, size: int, asked: Range | None, per: int) -> Range:
    """`asked`, of which `per` make `size`; (size, size, size) where nothing is asked."""
    if asked is None:
        return (size, size, size)
    for value in asked:
        if value * size % per:
            raise PcrExportError(f"--{name} {value} is no size of the latents: use multiples of {per // size}")
    low, best, high = (value * size // per for value in asked)
    return (low, best, high)


def parse_range(flag: str, text: str) -> Range:
    """ "2" -> (2, 2, 2), "1:2:4" -> (1, 2, 4). Raises PcrExportError where the text is neither, or not ascending from 1 on."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise PcrExportError(f"{flag} {text} is not understood: write one number, or MIN:OPT:MAX")
    low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= low <= best <= high:
        raise PcrExportError(f"{flag} must be at least 1, and MIN <= OPT <= MAX, got {text}")
    return (low, best, high)
