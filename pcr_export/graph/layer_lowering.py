"""What every dialect's lowering does alike: each marked layer in turn, and what several layers share made once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Job
from pcr_export.graph.layer_weights import LayerWeights


class LayerLowering(ABC):
    """One sweep over the pcr.Linear and pcr.Conv of a graph and its branches; `lower` replaces one of them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.weights = LayerWeights(job)
        self.made: dict[tuple[object, ...], ir.Value] = {}  # what layers share; equal columns of a table are one value
        self.quantizers = 0

    def lower_all(self) -> int:
        """Lower every marked layer; returns how many nodes."""
        nodes = [node for node in self.job.graph.all_nodes() if node.domain == DOMAIN]
        for node in nodes:
            self.lower(node)
        self.job.quantizers = self.quantizers
        return len(nodes)

    @abstractmethod
    def lower(self, node: ir.Node) -> None:
        """Replace a marked layer by operators of the dialect."""

    def share(self, key: tuple[object, ...], make: Callable[[], ir.Value]) -> ir.Value:
        """What was made for this key, or is made now."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
