"""A LoRA file as `--lora FILE[:scale]` names it: looked at before a model is loaded. No heavy imports."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_tensors import lora_fault
from pcr_export.read_files import check_regular
from pcr_export.recipe import Lora
from pcr_export.stages import hash_file

CONVERSION = (
    'python -c "import sys, torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in '
    'torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"'
)


@dataclass(frozen=True)
class LoraFile:
    """A safetensors file of low-rank updates and what they are multiplied with."""

    path: Path
    scale: float = 1.0

    def facts(self) -> Lora:
        """What the recipe keeps of it, which says nothing of this machine."""
        return Lora(name=self.path.name, sha256=hash_file(self.path), scale=self.scale)


def parse_lora(text: str) -> LoraFile:
    """'style.safetensors:0.8' -> LoraFile(style.safetensors, 0.8); without a number behind the last colon the scale is 1.

    Raises:
        PcrExportError: the scale is not finite, there is no such file, it is no readable safetensors file, or a tensor of it is none
            of a LoRA.
    """
    name, colon, number = text.rpartition(":")
    try:
        lora = LoraFile(Path(name).expanduser(), float(number)) if colon else LoraFile(Path(text).expanduser())
    except ValueError:
        lora = LoraFile(Path(text).expanduser())  # the colon is the name's
    if not math.isfinite(lora.scale):
        raise PcrExportError(f"--lora {text} has no finite scale: write FILE or FILE:SCALE, such as {lora.path}:0.8")
    if not lora.path.is_file():
        raise PcrExportError(f"--lora {text}: {lora.path} is no file: write FILE or FILE:SCALE")
    if lora.path.suffix.lower() != ".safetensors":
        new = lora.path.with_suffix(".safetensors")
        raise PcrExportError(
            f"--lora {text} is no safetensors file and is not read: convert it where you trust it, {CONVERSION} {lora.path} {new}"
        )
    check_regular(lora.path)
    try:
        with safe_open(lora.path, "numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise PcrExportError(f"--lora {text} is damaged ({error}): fetch it again") from error
    if fault := lora_fault(shapes):
        raise PcrExportError(f"--lora {text} can't be fused, {fault}")
    return lora


def parse_loras(texts: list[str] | None) -> tuple[LoraFile, ...]:
    """Every `--lora`, in their order. Raises PcrExportError as `parse_lora` does, or where fusing them needs peft."""
    files = tuple(parse_lora(text) for text in texts or ())
    if files and importlib.util.find_spec("peft") is None:
        raise PcrExportError("--lora needs peft: pip install 'pcr-export[lora]'")
    return files
