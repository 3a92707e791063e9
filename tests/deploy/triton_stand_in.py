"""What Triton's python backend hands a model, as far as ours uses it: tensors, requests and responses without a server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from pcr_export.deploy.triton_repository import PIPELINE_CODE


@dataclass(frozen=True)
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> np.ndarray:
        if isinstance(self.array, Exception):
            raise self.array
        return self.array


@dataclass(frozen=True)
class Request:
    inputs: Mapping[str, Any]

    def is_cancelled(self) -> bool:
        return False


@dataclass(frozen=True)
class TritonError:
    text: str
    code: str

    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"


@dataclass(frozen=True)
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


def pipeline_model() -> Any:
    """The module 1/model.py of `pipeline`, imported as Triton imports it."""
    backend = ModuleType("triton_python_backend_utils")
    vars(backend).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=lambda request, name: (
            Tensor(name, request.inputs[name]) if name in request.inputs else None
        ),
    )
    spec = importlib.util.spec_from_file_location("pipeline_model", PIPELINE_CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(backend.__name__)
    sys.modules[backend.__name__] = backend
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[backend.__name__]
        if before is not None:
            sys.modules[backend.__name__] = before
    return module
