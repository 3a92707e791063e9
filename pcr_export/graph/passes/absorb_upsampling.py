"""Nearest-neighbour upsampling inside the convolution that follows it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, constant_array, replace_value


class AbsorbUpsampling:
    """pcr.Conv(Resize(x, nearest, [1, u, u, 1])) -> pcr.Conv(x, upsample=u)

    Copying a pixel commutes with quantizing it, so the copies are made by the indices that gather the convolution's windows.
    Does not fire where anything but such convolutions reads the upsampled picture.
    """

    def apply(self, job: Job) -> int:
        """Absorb; returns how many convolutions."""
        count = 0
        for node in list(job.graph):
            factor = _factor(node) if node.op_type == "Resize" else None
            readers = [use.node for use in node.outputs[0].uses()]
            if factor is None or node.outputs[0].is_graph_output() or not readers:
                continue
            if not all(reader.domain == DOMAIN and reader.op_type == "Conv" for reader in readers):
                continue
            for conv in readers:
                kept = {name: found.value for name, found in conv.attributes.items()}
                shape = None if conv.outputs[0].shape is None else list(conv.outputs[0].shape)
                emit = Emitter(job, conv)
                inputs = [node.inputs[0], *conv.inputs[1:]]
                replace_value(
                    conv.outputs[0], emit("Conv", inputs, {**kept, "upsample": factor}, domain=DOMAIN, shape=shape)
                )
                job.graph.remove(conv, safe=True)
                count += 1
            job.graph.remove(node, safe=True)
        return count


def _factor(resize: ir.Node) -> int | None:
    """u of a channels-last nearest upsampling by the whole number u, or None."""
    scales = constant_array((*resize.inputs, None, None, None)[2])
    nearest = attribute(resize, "mode", "nearest") == "nearest" and attribute(resize, "nearest_mode") == "floor"
    asymmetric = attribute(resize, "coordinate_transformation_mode") == "asymmetric"
    if scales is None or not nearest or not asymmetric or scales.shape != (4,):
        return None
    factor = int(scales[1])
    return factor if factor >= 1 and np.array_equal(scales, [1, factor, factor, 1]) else None
