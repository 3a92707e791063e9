"""Where an exported folder keeps its engines."""

from __future__ import annotations

from pathlib import Path

from pcr_export.errors import PcrExportError

FLOAT_SUFFIX = "-fp16"  # sm89-fp16.engine: the network without quantization, to time against


def tensorrt_onnx(folder: Path) -> Path:
    """TensorRT's dialect of the UNet, from which its engines are built."""
    return folder / "unet" / "tensorrt" / "model.onnx"


def engine_targets(folder: Path) -> tuple[str, ...]:
    """The GPUs that the folder has an engine for, such as sm89, sorted."""
    names = (path.stem for path in (folder / "unet").glob("*.engine"))
    return tuple(sorted(name for name in names if not name.endswith(FLOAT_SUFFIX)))


def find_engine(folder: Path, target: str) -> Path:
    """The engine for `target`.

    Raises:
        PcrExportError: there is none: which there are, and how to build it.
    """
    path = folder / "unet" / f"{target}.engine"
    if not path.is_file():
        there = ", ".join(engine_targets(folder)) or "none"
        raise PcrExportError(
            f"{folder} has no engine for {target} (there: {there}): "
            f"export again with --backend tensorrt-rtx --target {target}"
        )
    return path


def float_engine(path: Path) -> Path | None:
    """The engine without quantization beside the engine `path`, sm89-fp16.engine beside sm89.engine; None where there is none."""
    other = path.with_name(f"{path.stem}{FLOAT_SUFFIX}.engine")
    return other if other.is_file() else None
