"""How many digits an activation has in this step, as the length of one small vector."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Emitter, Job


class ChoosePlanes:
    """planes = If(bits[step] > 8, [0, 1], [0]);    step <- step + planes[0]

    The If chooses a length and nothing else: every layer stands in the graph once, on as many planes as the vector has entries,
    so that kernels and weights are those of a graph without relaxed steps. planes[0] is 0; adding it makes the rows of the
    tables depend on the choice, without which TensorRT computes each layer's multiplier in a kernel of its own, ahead of it
    (260 pointwise kernels against 509 on a small SDXL UNet, 258 without relaxed steps).
    Does not fire where no step is relaxed.
    """

    def apply(self, job: Job) -> int:
        """Choose; returns the number of relaxed steps."""
        relaxed = job.scales.bits > 8
        if not relaxed.any():
            return 0
        emit = job.behind_step()
        emit.prefix = "planes"
        chosen = emit("Gather", [emit.constant(relaxed, "step/is_relaxed"), job.step], {"axis": 0}, name="is_relaxed")
        branches = {
            "then_branch": ir.AttrGraph("then_branch", _constant_graph("two", [0, 1])),
            "else_branch": ir.AttrGraph("else_branch", _constant_graph("one", [0])),
        }
        job.planes = emit("If", [chosen], branches, name="digits", shape=[None])
        first = emit(
            "Gather", [job.planes, emit.constant(np.array(0, np.int64), "scalar_0")], {"axis": 0}, name="first"
        )
        job.step = emit("Add", [job.step, first], name="step")
        fineness = np.exp2(8 - job.scales.bits.astype(np.float32)).astype(np.float32)[:, None]
        job.fineness = self._row(job, fineness, "fineness")
        job.low_digit = self._row(job, np.where(relaxed[:, None], fineness, 0).astype(np.float16), "low_digit")
        return int(relaxed.sum())

    def _row(self, job: Job, table: np.ndarray, name: str) -> ir.Value:
        emit: Emitter = job.behind_step()
        return emit("Gather", [emit.constant(table, f"step/{name}"), job.step], {"axis": 0}, name=name, shape=[1])


def _constant_graph(name: str, values: list[int]) -> ir.Graph:
    node = ir.node("Constant", [], {"value": ir.tensor(np.array(values, np.int64))}, name=f"planes/{name}")
    node.outputs[0].name = f"planes/{name}"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(values)])
    return ir.Graph([], [node.outputs[0]], nodes=[node], name=f"planes_{name}")
