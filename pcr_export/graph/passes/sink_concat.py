"""Concatenation behind the activation, on its way to the quantizer."""

from __future__ import annotations

from pcr_export.graph.job import MICROSOFT, Emitter, Job, attribute, replace_value


class SinkConcat:
    """SiLU(Concat(x1, x2, ...)) -> Concat(SiLU(x1), SiLU(x2), ...)

    LowerLayers then quantizes the parts and concatenates bytes. Does not fire where something else reads the concatenation.
    """

    def apply(self, job: Job) -> int:
        """Sink; returns how many activations."""
        count = 0
        for node in list(job.graph):
            if node.op_type != "QuickGelu" or node.domain != MICROSOFT or node.inputs[0] is None:
                continue
            concat = node.inputs[0].producer()
            if concat is None or concat.op_type != "Concat" or len(node.inputs[0].uses()) > 1:
                continue
            if node.inputs[0].is_graph_output():
                continue
            emit = Emitter(job, node)
            parts = []
            for i, part in enumerate(concat.inputs):
                shape = None if part is None or part.shape is None else list(part.shape)
                alpha = {"alpha": attribute(node, "alpha")}
                parts.append(emit("QuickGelu", [part], alpha, domain=MICROSOFT, name=f"part{i}", shape=shape))
            whole = node.outputs[0]
            shape = None if whole.shape is None else list(whole.shape)
            replace_value(whole, emit("Concat", parts, {"axis": attribute(concat, "axis")}, name="joined", shape=shape))
            job.graph.remove([node, concat], safe=True)
            count += 1
        return count
