"""The networks of an exported pipeline as calls of other models: what `pipeline` asks its Triton server for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pcr_export.deploy.parts import TITLES, ExportedUnet, OnnxPart, OnnxTextEncoder, OnnxVae, part_config
from pcr_export.deploy.refusals import Axes, GraphPart, check_inputs
from pcr_export.deploy.triton_config import read_config
from pcr_export.deploy.triton_repository import REPOSITORY

Arrays = dict[str, np.ndarray]
CallModel = Callable[[str, Arrays, list[str]], Arrays]  # (model, its inputs, names of its outputs) -> the outputs


def served_network(folder: Path, name: str, call: CallModel) -> nn.Module:
    """The part `name` ("unet", "text_encoder", "text_encoder_2", "vae_decoder") of the exported `folder`, run by `call`.

    Raises:
        PcrExportError: its configuration is missing or damaged.
    """
    run = _Run(folder, name, call)
    if name == "unet":
        return ExportedUnet(folder / name, lambda inputs: run(inputs)[run.outputs[0]], run.ports)
    return _ServedVae(folder / name, run) if name == "vae_decoder" else _ServedTextEncoder(folder / name, run)


class _Run:
    """A network of the server. A scalar is [1] to Triton."""

    def __init__(self, folder: Path, name: str, call: CallModel) -> None:
        config = read_config(folder / REPOSITORY / name / "config.pbtxt")
        self.name, self.call, self.outputs = name, call, list(config.outputs)
        self.ports: dict[str, Axes] = {
            port: [None if size < 0 else size for size in dims] for port, (_, dims) in config.inputs.items()
        }
        if "timestep" in self.ports:
            self.ports["timestep"] = ()

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        check_inputs(TITLES[self.name], self.ports, inputs)
        arrays = {name: np.atleast_1d(tensor.contiguous().numpy()) for name, tensor in inputs.items()}
        return {name: torch.from_numpy(array) for name, array in self.call(self.name, arrays, self.outputs).items()}


class _ServedPart(OnnxPart):
    def __init__(self, folder: Path, run: _Run) -> None:
        GraphPart.__init__(self)  # no session of its own
        self.title = TITLES[run.name]
        self.config = part_config(folder)
        self.call_model = run

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.call_model(inputs)


class _ServedTextEncoder(_ServedPart, OnnxTextEncoder):
    pass


class _ServedVae(_ServedPart, OnnxVae):
    pass
