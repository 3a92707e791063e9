"""Whether inputs fit what an engine was built for: plain arithmetic on its record, before any GPU is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pcr_export.engines.engine_record import EngineRecord
from pcr_export.errors import PcrExportError

FLAGS = {
    0: "batch",
    2: "height",
    3: "width",
}  # axis of a denoiser's input -> the symbolic axis, and flag, that sizes it

TOKENS, TOKENS_AXIS = "tokens", 1  # of the text


def is_within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    """Whether every axis of `shape` lies in low..high; False for another rank."""
    same_rank = len(shape) == len(low) == len(high)
    return same_rank and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def check_input_ranges(engine: str, record: EngineRecord, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse inputs that the engine was not built for.

    Args:
        engine: its file's name, for the message.
        record: with the smallest and the largest shape of every input.
        shapes: of the inputs, by name.

    Raises:
        PcrExportError: an input is missing or unknown, or an axis lies outside its range: which one, and how to build for it.
    """
    if shapes.keys() != record.inputs.keys():
        raise PcrExportError(f"{engine} takes the inputs {sorted(record.inputs)}, not {sorted(shapes)}")
    for name, (low, _, high) in record.inputs.items():
        shape = shapes[name]
        if len(shape) != len(low):
            raise PcrExportError(f"{engine} takes {name} with {len(low)} axes, not of shape {list(shape)}")
        for axis, size in enumerate(shape):
            if not low[axis] <= size <= high[axis]:
                taken = str(low[axis]) if low[axis] == high[axis] else f"{low[axis]}..{high[axis]}"
                label, advice = _advice(record, axis)
                raise PcrExportError(f"{name} has {size} on axis {axis}{label}, {engine} takes {taken}: {advice}")


def _advice(record: EngineRecord, axis: int) -> tuple[str, str]:
    if axis == TOKENS_AXIS and TOKENS in record.axes:
        return f" ({TOKENS})", "engines read texts of one length, onnxruntime those of any (backend='onnxruntime')"
    flag = FLAGS.get(axis)
    if flag not in record.axes:
        return "", "give inputs of the model that was exported"
    return f" ({flag})", f"rebuild it with a --{flag} MIN:OPT:MAX that holds this: {record.rebuild_command}"
