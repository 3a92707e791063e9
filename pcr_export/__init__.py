"""pcr_export: INT8 deployment artifacts for diffusion models, with one activation scale per denoising step."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "Denoiser": "models.denoiser",
    "DenoiserEvaluation": "qdiffbench.evaluate_denoiser",
    "Job": "export",
    "PcrExportError": "errors",
    "PromptWarning": "errors",
    "Recipe": "recipe",
    "ScheduleWarning": "errors",
    "evaluate_denoiser": "qdiffbench.evaluate_denoiser",
    "export_denoiser": "export",
    "load_pipeline": "deploy.pipeline",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import pcr_export` and the command line stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pcr_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pcr_export.{_HOMES[name]}"), name)
