"""TensorRT and TensorRT-RTX: which of the two is here, and for which GPUs it builds."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pcr_export.errors import PcrExportError

FLAVOURS = ("tensorrt", "tensorrt-rtx")
CURRENT = "current"  # the target that means: this machine's GPU
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_SM75 = "sm75 is refused: its builder runs the INT8 pattern silently in FP16; name sm86 or newer"
_CC_MAJOR, _CC_MINOR = 75, 76  # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two libraries, loaded.

    `targets` are the GPUs that it builds for without having one, such as sm89; TensorRT has none.
    """

    name: str
    module: Any
    version: str
    targets: tuple[str, ...]


def load_flavour(name: str) -> Flavour:
    """Import "tensorrt" or "tensorrt-rtx".

    Raises:
        PcrExportError: no such flavour, or it is not installed or does not load.
    """
    if name not in FLAVOURS:
        raise PcrExportError(f"{name} is no engine builder: the builders are {', '.join(FLAVOURS)}")
    try:
        module = _import(name)
    except ModuleNotFoundError as error:
        elsewhere = ", or build on another machine with the trtexec line" if name == "tensorrt" else ""
        message = f"{name} is not installed: pip install 'pcr-export[{_EXTRAS[name]}]'{elsewhere}"
        raise PcrExportError(message) from error
    except (ImportError, OSError) as error:
        raise PcrExportError(f"{name} does not load ({error}): install it again") from error
    ahead_of_time = getattr(module, "ComputeCapability", None) if name == "tensorrt-rtx" else None
    members = getattr(ahead_of_time, "__members__", {})
    targets = tuple(member.lower() for member in members if member.startswith("SM") and member != "SM75")
    return Flavour(name=name, module=module, version=module.__version__, targets=targets)


def check_targets(flavour_name: str, targets: Sequence[str]) -> tuple[str, ...]:
    """`targets` in lower case, each once, "current" replaced by this machine's GPU.

    No target at all means this machine's GPU on TensorRT, which builds for no other. Cheap: meant to be called
    before a long calibration.

    Raises:
        PcrExportError: the flavour is not installed, or it can't build for a target on this machine.
    """
    flavour = load_flavour(flavour_name)
    names = list(dict.fromkeys(target.strip().lower() for target in targets if target.strip()))
    if "sm75" in names:
        raise PcrExportError(f"--target {_SM75}")
    gpu = gpu_target() if flavour.name == "tensorrt" or CURRENT in names else None
    return resolve_targets(flavour, names, gpu)


def resolve_targets(flavour: Flavour, names: Sequence[str], gpu: str | None) -> tuple[str, ...]:
    """The targets that `names` mean on a machine whose GPU is `gpu` (such as "sm89"; None: it has none)."""
    if flavour.name == "tensorrt":
        return (_only_this_gpu(names, gpu),)
    if not names:
        raise PcrExportError(
            f"{flavour.name} builds ahead of time: name the GPUs, --target {','.join(flavour.targets)}"
        )
    if CURRENT in names and gpu is None:
        raise PcrExportError(f"this machine has no GPU: name the GPUs, --target {','.join(flavour.targets)}")
    resolved = tuple(dict.fromkeys(str(gpu) if name == CURRENT else name for name in names))
    unknown = [name for name in resolved if name not in flavour.targets]
    if unknown:
        known = ", ".join(flavour.targets) or "no GPU but this machine's; update it"
        raise PcrExportError(
            f"{flavour.name} {flavour.version} does not build for {', '.join(unknown)}: it builds for {known}"
        )
    return resolved


def _only_this_gpu(names: Sequence[str], gpu: str | None) -> str:
    if gpu is None:
        raise PcrExportError(
            "tensorrt builds on the GPU that runs the engine, and this machine has none: "
            "use tensorrt-rtx, or build on the GPU's machine with the trtexec line"
        )
    others = [name for name in names if name not in (CURRENT, gpu)]
    if others:
        raise PcrExportError(
            f"tensorrt builds only for this machine's GPU, {gpu}, not for {', '.join(others)}: "
            "use tensorrt-rtx, or build there with the trtexec line"
        )
    if gpu == "sm75":
        raise PcrExportError(_SM75)
    return gpu


def compute_capability(target: str) -> str:
    """ "8.9" for "sm89", "12.0" for "sm120".

    Raises:
        PcrExportError: `target` is not of that form.
    """
    match = re.fullmatch(r"sm(\d+)(\d)", target)
    if not match:
        raise PcrExportError(f"{target} is no target: write sm86, sm89, sm120, ...")
    return f"{match[1]}.{match[2]}"


def gpu_target() -> str | None:
    """This machine's first GPU, such as "sm89", as the CUDA driver tells; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device)
    )
    return None if failed else f"sm{major.value}{minor.value}"


def _import(name: str) -> Any:
    if name == "tensorrt":
        import tensorrt as module
    else:
        import tensorrt_rtx as module
    return module
