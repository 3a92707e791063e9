"""One node for SiLU."""

from __future__ import annotations

from pcr_export.graph.job import MICROSOFT, Emitter, Job, remove_unread, replace_value


class FuseSilu:
    """Mul(x, Sigmoid(x)) -> QuickGelu(x, alpha=1) = x * sigmoid(1 * x), which is SiLU exactly, in one pass over memory."""

    def apply(self, job: Job) -> int:
        """Fuse; returns how many."""
        count = 0
        for node in list(job.graph):
            if node.op_type != "Mul" or node.graph is None:
                continue
            for x, gate in (node.inputs, reversed(node.inputs)):
                sigmoid = gate.producer() if gate is not None else None
                if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not x:
                    continue
                shape = None if x is None or x.shape is None else list(x.shape)
                fused = Emitter(job, node)("QuickGelu", [x], {"alpha": 1.0}, domain=MICROSOFT, shape=shape)
                replace_value(node.outputs[0], fused)
                count += 1
                break
        remove_unread(job.graph)
        return count
