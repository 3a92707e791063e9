"""The `pipeline` model of an export's Triton repository: prompts in, images out; Triton's python backend loads this file."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

# Triton's Python stub knows neither PYTHONPATH nor a virtual environment: this names the folders to add, behind its own.
SITE_PACKAGES = "PCR_EXPORT_SITE_PACKAGES"


class TritonPythonModel:
    """What Triton calls: `initialize` once, `execute` for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the networks of the exported folder, two levels above this model's own."""
        sys.path += filter(None, os.environ.get(SITE_PACKAGES, "").split(os.pathsep))
        from pcr_export.deploy.triton_requests import load_served_model

        given = json.loads(args["model_config"]).get("parameters", {})
        parameters = {name: value.get("string_value", "") for name, value in given.items()}
        folder = Path(args["model_repository"]).parents[1]
        self.model = load_served_model(folder, parameters, _call_model)
        threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for every request; an error goes to the client that it belongs to."""
        from pcr_export.deploy.triton_requests import error_of, paint_requests, read_pictures

        responses: dict[int, Any] = {}
        asked = {}
        for i, request in enumerate(requests):
            try:
                asked[i] = read_pictures(_arrays(request), self.model)
            except Exception as error:  # one that leaves `execute` would fail every client
                told = error_of(error, "the request can't be read")
                responses[i] = _error(told, pb_utils.TritonError.INVALID_ARG)
        owners = list(asked)
        results = paint_requests(self.model, list(asked.values()), lambda i: requests[owners[i]].is_cancelled())
        for i, result in zip(owners, results, strict=True):
            responses[i] = _response(result)
        return [responses[i] for i in range(len(requests))]


def _leave_with(server: int) -> None:
    """End this process when its server is gone: one that exits in mid-request leaves the stub waiting for it for ever."""
    while os.getppid() == server:
        time.sleep(1)
    os._exit(1)


def _call_model(name: str, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Outputs by name of another model of this server, as arrays."""
    from pcr_export.errors import PcrExportError

    request = pb_utils.InferenceRequest(
        model_name=name,
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(port, array) for port, array in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise PcrExportError(f"the model {name} failed: {response.error().message()}")
    return {port: pb_utils.get_output_tensor_by_name(response, port).as_numpy() for port in outputs}


def _arrays(request: Any) -> dict[str, Any]:
    from pcr_export.deploy.triton_requests import INPUTS

    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


def _response(result: Any) -> Any:
    from pcr_export.deploy.triton_requests import RequestCancelledError

    if isinstance(result, RequestCancelledError):
        return _error(result, pb_utils.TritonError.CANCELLED)
    if isinstance(result, Exception):
        return _error(result, pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse([pb_utils.Tensor("IMAGES", result)])


def _error(error: Exception, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
