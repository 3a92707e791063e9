"""Attention on [batch, tokens, width], where the kernel itself walks the heads."""

from __future__ import annotations

import onnx_ir as ir

from pcr_export.graph.job import Emitter, Job, attribute, remove_unread, replace_value, static_dim

HEADS_FIRST = (0, 2, 1, 3)


class FlattenAttention:
    """Four reshapes and four transposes around an attention -> none:

    Reshape(Transpose(Attention(T(R(q)), T(R(k)), T(R(v)), mask))) -> Attention(q, k, v, mask, q_num_heads, kv_num_heads)

    with q, k, v [batch, tokens, heads * size]. Does not fire where one of the three is no such reshape, where the reshape moves
    tokens to the batch (attention in windows), or where a reader wants another form of the result.
    """

    def apply(self, job: Job) -> int:
        """Flatten; returns how many."""
        count = sum(self._flatten(job, node) for node in list(job.graph) if node.op_type == "Attention")
        remove_unread(job.graph)
        return count

    def _flatten(self, job: Job, node: ir.Node) -> bool:
        sources = [_flat_source(value) for value in node.inputs[:3]]
        result = _flat_result(node.outputs[0])
        if result is None or any(source is None for source in sources):
            return False
        heads = [static_dim(value, 1) for value in node.inputs[:2] if value is not None]
        if any(count is None for count in heads):
            return False
        kept = {name: found.value for name, found in node.attributes.items() if not name.endswith("num_heads")}
        shape = None if result.shape is None else list(result.shape)
        attention = Emitter(job, node)(
            "Attention",
            [*sources, *node.inputs[3:]],
            {**kept, "q_num_heads": heads[0], "kv_num_heads": heads[1]},
            shape=shape,
        )
        replace_value(result, attention)
        return True


def _flat_source(value: ir.Value | None) -> ir.Value | None:
    """x of Transpose(Reshape(x)) when x is [batch, tokens, heads * size]."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose" or tuple(attribute(transpose, "perm", ())) != HEADS_FIRST:
        return None
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if reshape is None or reshape.op_type != "Reshape":
        return None
    source, parts = reshape.inputs[0], reshape.outputs[0]
    heads, size = static_dim(parts, 2), static_dim(parts, 3)
    if source is None or source.shape is None or len(source.shape) != 3 or heads is None or size is None:
        return None
    return source if static_dim(source, 2) == heads * size and _same_rows(source, parts) else None


def _flat_result(value: ir.Value) -> ir.Value | None:
    """y of Reshape(Transpose(value)) when y is [batch, tokens, heads * size] and nothing else reads the parts."""
    heads, size, parts = static_dim(value, 1), static_dim(value, 3), value
    for op_type in ("Transpose", "Reshape"):
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            return None
        node = next(iter(uses)).node
        if node.op_type != op_type or (op_type == "Transpose" and tuple(attribute(node, "perm", ())) != HEADS_FIRST):
            return None
        parts, value = value, node.outputs[0]
    if heads is None or size is None or value.shape is None or len(value.shape) != 3:
        return None
    return value if static_dim(value, 2) == heads * size and _same_rows(value, parts) else None


def _same_rows(flat: ir.Value, parts: ir.Value) -> bool:
    """Whether batch and tokens of [batch, tokens, heads * size] are those of [batch, tokens, heads, size].

    One of the two, by number or by name, decides for the other: both hold as many numbers. Names of equal sizes may differ.
    """
    assert flat.shape is not None
    assert parts.shape is not None
    return any(flat.shape[axis] == parts.shape[axis] and _is_known(flat.shape[axis]) for axis in (0, 1))


def _is_known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or dim.value is not None
