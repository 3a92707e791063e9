"""External data of an ONNX model, written as the tensors come: one in memory at a time."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from pcr_export.write_files import new_file, open_new, temporary_beside

INLINE_BYTES = 1024  # smaller tensors stay inside the model file, where shape inference sees them
ALIGNMENT = 4096  # of tensors in the data file, so that an engine can map them
BLOCK_COLUMNS = 128  # a matrix is transposed by strips that stay in cache: int8 six times as fast


def onnx_files(model_path: Path) -> list[Path]:
    """The model file and the file of its external data beside it."""
    return [model_path, model_path.with_name(model_path.name + "_data")]


def row_major(array: np.ndarray) -> np.ndarray:
    """`array` where it is row-major, else a row-major copy."""
    if array.ndim != 2 or not array.flags.f_contiguous:
        return np.ascontiguousarray(array)
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], BLOCK_COLUMNS):
        strip = slice(start, start + BLOCK_COLUMNS)
        copy[:, strip] = array[:, strip]
    return copy


def _pack(array: np.ndarray) -> np.ndarray:
    """int4 -> uint8 of half as many, the first of two in the low half (ONNX's order), row-major."""
    halves = row_major(array).reshape(-1).view(np.uint8) & 0x0F
    halves = np.append(halves, np.zeros(len(halves) % 2, np.uint8))
    packed: np.ndarray = halves[::2] | (halves[1::2] << 4)
    return packed


class WeightFile:
    """Appends tensors to `<model path>_data` under a temporary name; `commit` puts both files in place.

    Used as a context manager: leaving it without `commit` removes the temporary file.
    """

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        self.data_path = onnx_files(model_path)[1]
        self._temporary = temporary_beside(self.data_path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self.model_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_new(self._temporary)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def store(self, array: np.ndarray, name: str) -> ir.TensorProtocol:
        """Append `array` and return the ONNX tensor that points at it; small ones stay in memory."""
        dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        if array.nbytes < INLINE_BYTES:
            return ir.tensor(np.array(array, order="C"), name=name)
        array = _pack(array) if dtype == ir.DataType.INT4 else array
        assert self._file is not None, "WeightFile is used inside `with`"
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(row_major(array).reshape(-1).view(np.uint8).data)  # tofile does not say that the disk is full
        return ir.ExternalTensor(
            location=self.data_path.name,
            offset=offset,
            length=array.nbytes,
            dtype=dtype,
            shape=shape,
            name=name,
            base_dir=self.model_path.parent,
        )

    def commit(self, model: ir.Model) -> None:
        """Write the model file beside the data and put both under their final names."""
        assert self._file is not None, "WeightFile is used inside `with`"
        self._file.close()
        with new_file(self.model_path) as file:
            file.write(ir.to_proto(model).SerializeToString(deterministic=True))
            self.model_path.unlink(
                missing_ok=True
            )  # so that no reader meets the one file of before and the other of now
            os.replace(self._temporary, self.data_path)
        self._file = None
