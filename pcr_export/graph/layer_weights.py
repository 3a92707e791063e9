"""The integer weights of the layers, made one layer at a time from the mapped float file."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Job, attribute
from pcr_export.graph.weight_file import row_major

INT4 = (-8, 7)


@dataclass(frozen=True)
class IntegerWeight:
    """Initializers of one quantized layer, or of a part of its output channels."""

    q: ir.Value  # int8 [fan_in, out_channels]; a convolution's fan_in is height-major, channels innermost
    scale: ir.Value  # float32 [out_channels]
    bias: ir.Value | None  # float32 [out_channels]


@dataclass
class LayerWeights:
    """Makes each layer's integer weights once, however many nodes read them."""

    job: Job
    made: dict[tuple[str, int | None, int | None], IntegerWeight] = field(default_factory=dict)
    latest: tuple[str, np.ndarray, np.ndarray] | None = None  # the last layer's name, integers and scales

    def of(self, node: ir.Node) -> IntegerWeight:
        """The weights that a pcr.Linear or pcr.Conv reads."""
        key = (attribute(node, "layer"), attribute(node, "start"), attribute(node, "end"))
        if key not in self.made:
            self.made[key] = self._make(node, *key)
        return self.made[key]

    def _make(self, node: ir.Node, layer: str, start: int | None, end: int | None) -> IntegerWeight:
        q, scale = self.integers(node)
        q = q.transpose(2, 3, 1, 0).reshape(-1, len(q)) if q.ndim == 4 else q.T
        name = layer if start is None else f"{layer}.{start}:{end}"
        part = slice(start, end)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and start is not None:
            assert bias.const_value is not None
            bias = self.job.initializer(bias.const_value.numpy()[part], f"{name}.bias")
        return IntegerWeight(
            q=self._store(q[:, part], f"{name}.weight_q"),
            scale=self.job.initializer(scale[part], f"{name}.weight_scale"),
            bias=bias,
        )

    def _store(self, q: np.ndarray, name: str) -> ir.Value:
        """An int8 value; where 4 bits hold every integer, they lie packed in the file and the engine unpacks them as it loads."""
        if q.min() < INT4[0] or q.max() > INT4[1]:
            return self.job.initializer(q, name)
        packed = self.job.initializer(q.astype(ml_dtypes.int4), f"{name}4")
        return self.job.behind_step()("Cast", [packed], {"to": int(ir.DataType.INT8)}, name=name, shape=q.shape)

    def integers(self, node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
        """int8 in torch's layout [out_channels, in_channels, ...], as in the simulation, and scales float32 [out_channels]."""
        layer = attribute(node, "layer")
        if self.latest is None or self.latest[0] != layer:
            assert node.inputs[1] is not None
            tensor = node.inputs[1].const_value
            assert tensor is not None
            self.latest = (
                layer,
                *self.job.round_weight(layer, _as_torch_has_it(tensor, bool(attribute(node, "transposed", 0)))),
            )
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
        return self.latest[1], self.latest[2]


def _as_torch_has_it(tensor: ir.TensorProtocol, transposed: bool) -> np.ndarray:
    weight = tensor.numpy()
    return row_major(weight.T if transposed else weight)
