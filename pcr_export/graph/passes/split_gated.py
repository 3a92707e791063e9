"""Gated feed-forward layers: two products instead of one product and a copy of both halves."""

from __future__ import annotations

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, replace_value, static_dim


class SplitGated:
    """Split(pcr.Linear(x, W), n) over the last axis -> n times pcr.Linear(x, rows of W).

    The integers stay the same: weights are quantized per output channel before their rows are dealt out. A part may be split
    again: its rows are counted from where it starts.
    Does not fire where the product has another reader, or the parts differ in size.
    """

    def apply(self, job: Job) -> int:
        """Split; returns how many layers."""
        count = 0
        for node in list(job.graph):
            linear = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] is not None else None
            if linear is None or linear.domain != DOMAIN or linear.op_type != "Linear":
                continue
            product = linear.outputs[0]
            width, parts = static_dim(product, len(product.shape or ()) - 1), len(node.outputs)
            axis = attribute(node, "axis", 0) % max(len(product.shape or ()), 1)
            equal = attribute(node, "num_outputs") is not None and width is not None and width % parts == 0
            if (
                len(product.uses()) > 1
                or product.is_graph_output()
                or axis != len(product.shape or ()) - 1
                or not equal
            ):
                continue
            assert width is not None
            first, size = attribute(linear, "start", 0), width // parts
            emit = Emitter(job, linear, prefix=attribute(linear, "layer"))
            settings = {name: found.value for name, found in linear.attributes.items()}
            for part, output in enumerate(node.outputs):
                rows = {"start": first + part * size, "end": first + (part + 1) * size}
                shape = None if output.shape is None else list(output.shape)
                replace_value(
                    output,
                    emit("Linear", linear.inputs, {**settings, **rows}, domain=DOMAIN, name=f"part{part}", shape=shape),
                )
            assert node.graph is not None
            node.graph.remove([node, linear], safe=True)
            count += 1
        return count
