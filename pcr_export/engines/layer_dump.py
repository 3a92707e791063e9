"""What a built engine consists of, read from the builder's layer dump or the inspector's JSON; the proof that it is INT8."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INT8 = "Int8"
UNKNOWN = "unknown"
POINTWISE = "kgen"  # a generated kernel: everything that is no product, fused
HOST_JUMPS = ("cjmp", "DeviceToShapeHost")  # the host reads a value from the GPU before it launches what follows
_PRODUCTS = ("gemm", "correlation", "conv", "matrix", "matmul", "fully")
_SECTION = re.compile(r", (Inputs|Constants|Outputs|Metadata): ")
_TYPE = re.compile(r"\b(?:Datatype|Format/Datatype): (\w+)")
_ONNX_NAME = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# TensorRT 10 describes type and layout in one phrase: "Row major linear FP16 format", or only "Half". Whole words: uint8 is no int8.
_WORDS = {
    "int8": INT8,
    "uint8": "UInt8",
    "bf16": "BFloat16",
    "fp16": "Half",
    "half": "Half",
    "fp32": "Float",
    "fp8": "FP8",
    "float": "Float",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Bool",
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of an engine: its builder's type, the data types that it reads and writes, the ONNX nodes that it does."""

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    onnx_names: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether this is a matrix product or a convolution by its type."""
        return any(word in self.kind.lower() for word in _PRODUCTS)

    @property
    def reads_int8(self) -> bool:
        """Whether two of its operands are Int8."""
        return self.operands == (INT8, INT8)

    @property
    def may_multiply_floats(self) -> bool:
        """Whether a generated kernel may hold a product that is not INT8: two operands of one other type, or types not told.

        What prepares or finishes a product reads one activation, and scales of another type.
        """
        others = Counter(kind for kind in self.reads if kind != INT8)
        return not self.reads_int8 and (UNKNOWN in others or max(others.values(), default=0) > 1)

    @property
    def operands(self) -> tuple[str, ...]:
        """The data types of the two factors: the epilogue's scalars and the residual come after them or are not Int8."""
        return (INT8, INT8) if self.reads.count(INT8) >= 2 else self.reads[:2]


def parse_dump(message: str) -> list[Kernel]:
    """The kernels in a builder's VERBOSE message: one line each, `Name: …, LayerType: …, Inputs: [ … ], …, Metadata: …`."""
    lines = message.split("\nName: ")[1:]
    return [kernel for line in lines if (kernel := _parse_line(line.split("\n", 1)[0])) is not None]


def parse_inspector(text: str) -> list[Kernel]:
    """The kernels in EngineInspector's JSON. TensorRT 10 writes `Format/Datatype`, 11 and RTX write `Datatype`.

    An engine that was not built with detailed verbosity lists bare names: those kernels have no data types.
    """
    return [_from_json(layer) for layer in json.loads(text).get("Layers", [])]


def prove_int8(kernels: Iterable[Kernel], layers: Sequence[str]) -> dict[str, str | None]:
    """For each layer None where its product runs in INT8, or the reason why not.

    The product of layer L is the ONNX node `L/product#NUMBER`. It runs in INT8 where a kernel that does that node reads two Int8
    operands, and none that does it may hold a product of anything else: no product kernel (the branches of an `If` are kernels of their
    own) and no generated one. Several layers may share one kernel.
    """
    by_layer: dict[str, list[Kernel]] = {layer: [] for layer in layers}
    for kernel in kernels:
        for name in {name.rsplit("/product#", 1)[0] for name in kernel.onnx_names if "/product#" in name}:
            if name in by_layer:
                by_layer[name].append(kernel)
    return {layer: _why_not_int8(found) for layer, found in by_layer.items()}


def count_kernels(kernels: Iterable[Kernel]) -> tuple[tuple[str, str, str, int], ...]:
    """How many kernels there are by (type, data types read, data types written), the most frequent first.

    Products tell their two factors ("Int8 x Int8"), other kernels the set of what they read.
    """
    counts = Counter(
        (
            kernel.kind,
            " x ".join(kernel.operands) if kernel.is_product else _set(kernel.reads),
            _set(kernel.writes),
        )
        for kernel in kernels
    )
    return tuple((*key, count) for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _why_not_int8(kernels: Sequence[Kernel]) -> str | None:
    if not kernels:
        return "no kernel names it"
    for kernel in kernels:
        if kernel.is_product and not kernel.reads_int8:
            return f"the builder chose {' x '.join(kernel.operands) or UNKNOWN}"
        if not kernel.is_product and kernel.may_multiply_floats:
            return f"fused into {kernel.kind}, which reads {_set(kernel.reads)}"
    if any(kernel.reads_int8 for kernel in kernels):
        return None
    return f"fused into {kernels[0].kind}, which reads {_set(kernels[0].reads)}"


def _parse_line(line: str) -> Kernel | None:
    head = re.match(r"(.*?), LayerType: ([^,]+)", line)
    if head is None:
        return None
    parts = _SECTION.split(line)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return Kernel(
        name=head[1],
        kind=head[2],
        reads=tuple(_TYPE.findall(sections.get("Inputs", "")) + _TYPE.findall(sections.get("Constants", ""))),
        writes=tuple(_TYPE.findall(sections.get("Outputs", ""))),
        onnx_names=tuple(_ONNX_NAME.findall(sections.get("Metadata", ""))),
    )


def _from_json(layer: Mapping[str, Any] | str) -> Kernel:
    if isinstance(layer, str):
        return Kernel(name=layer, kind=UNKNOWN, reads=(), writes=(), onnx_names=tuple(_ONNX_NAME.findall(layer)))
    weights = [layer["Weights"]] if isinstance(layer.get("Weights"), dict) else []
    return Kernel(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", UNKNOWN)),
        reads=tuple(map(_type, [*layer.get("Inputs", []), *weights, *layer.get("Constants", [])])),
        writes=tuple(map(_type, layer.get("Outputs", []))),
        onnx_names=tuple(_ONNX_NAME.findall(str(layer.get("Metadata", "")))),
    )


def _type(tensor: Mapping[str, Any]) -> str:
    phrase = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Type") or "").lower()
    return next((_WORDS[word] for word in re.findall(r"\w+", phrase) if word in _WORDS), UNKNOWN)


def _set(types: Iterable[str]) -> str:
    return ", ".join(sorted(set(types))) or "-"
