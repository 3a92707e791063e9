"""A network of an export as a model of Triton's python backend: stands in for the onnxruntime backend where a server has none."""

import os
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        sys.path += os.environ["PCR_EXPORT_SITE_PACKAGES"].split(os.pathsep)
        import onnxruntime

        folder = Path(args["model_repository"]).parents[1] / args["model_name"]
        self.session = onnxruntime.InferenceSession(folder / "model.onnx")

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        feed = {}
        for value in self.session.get_inputs():
            array = pb_utils.get_input_tensor_by_name(request, value.name).as_numpy()
            feed[value.name] = (
                array if value.shape else array.reshape(())
            )  # the one of the onnxruntime backend: [1] is a scalar
        names = [value.name for value in self.session.get_outputs()]
        arrays = self.session.run(names, feed)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(names, arrays, strict=True)])
