"""Text encoders and VAE with weights of fewer bytes, where that is measured to be safe: float16, or INT8 per output channel.

Weights are stored smaller and become float32 in the graph, so that nothing overflows and no signature changes:

    fp16   float16 -> Cast -> float32              exact for a model that was published in float16; widened once, as onnxruntime loads it
    int8   int8, one scale per output channel -> DequantizeLinear -> float32; embedding tables in float16

onnxruntime makes one kernel of DequantizeLinear and a MatMul whose width divides by 32 (MatMulNBits), which takes its input in INT8 too,
a scale for every 32 values. What is measured is what it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.deploy.folder import TEXT_ENCODERS, TOKENIZERS
from pcr_export.engines.onnx_files import load_onnx
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.graph.to_onnx import save_model
from pcr_export.graph.weight_file import onnx_files
from pcr_export.models.pipelines import Pipeline, decode_latents, unscale_latents
from pcr_export.qdiffbench.fidelity import sqnr_db
from pcr_export.report import finite
from pcr_export.request import PART_FORMS
from pcr_export.stages import Facts
from pcr_export.write_files import new_folder

# Asked of a part's outputs against its float32 form, in dB. tiny-sdxl's INT8 encoders have 31.6 dB, and its images with all parts in INT8
# a PSNR of 57 dB to those with float32 parts (benchmarks/smaller_parts.py); those of its quantized UNet have 48 dB.
SAFE_DB = {"text_encoder": 30.0, "text_encoder_2": 30.0, "vae_encoder": 40.0, "vae_decoder": 40.0}
READERS = {("MatMul", 1), ("Gemm", 1), ("Conv", 1), ("Gather", 0)}  # operators, and which input of theirs is a weight
FEWEST_ELEMENTS = 1024


def part_inputs(pipeline: Pipeline, prompts: Sequence[str], latents: torch.Tensor) -> dict[str, dict[str, np.ndarray]]:
    """What each part is fed while `prompts` are painted: ids of the prompts, the latents before the VAE's scaling, and their images.

    Args:
        latents: float32 [batch, channels, h, w], as the sampler leaves them.
    """
    inputs = {}
    for name, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
        if getattr(pipeline, name, None) is not None:
            inputs[name] = {"input_ids": _token_ids(getattr(pipeline, tokenizer), prompts)}
    images = decode_latents(pipeline.vae, latents) * 2 - 1
    return {
        **inputs,
        "vae_encoder": {"sample": images.numpy()},
        "vae_decoder": {"latent_sample": unscale_latents(pipeline.vae, latents).numpy()},
    }


def shrink_parts(
    folder: Path, form: str, inputs: Mapping[str, Mapping[str, np.ndarray]], advance: Callable[[int], None]
) -> Facts:
    """Replace the float32 parts of an exported folder by the smallest form, `form` at the smallest, that is measured to be safe.

    Args:
        form: "fp16" or "int8".
        inputs: by part and input, as `part_inputs` gives them.
        advance: told of each part that is done.

    Returns:
        By part: its form, the dB of every form that was tried, bytes of its files now and in float32.

    Raises:
        PcrExportError: a part does not load or run.
    """
    facts = {}
    for name, feed in inputs.items():
        facts[name] = _shrink_part(folder / name / "model.onnx", form, feed, SAFE_DB[name])
        advance(1)
    return facts


def _shrink_part(path: Path, form: str, feed: Mapping[str, np.ndarray], safe_db: float) -> Facts:
    expected, float_bytes = _outputs(path, feed), _size(path)
    tried: dict[str, float] = {}
    found = PART_FORMS[0]
    for candidate in reversed(PART_FORMS[1 : PART_FORMS.index(form) + 1]):
        model = load_onnx(path)
        store_smaller(model, candidate)
        with new_folder(path) as folder:
            save_model(model, folder / path.name)
            tried[candidate] = _worst_db(expected, _outputs(folder / path.name, feed))
            if tried[candidate] >= safe_db:
                found = candidate
                path.unlink()  # so that no reader meets the one file of before and the other of now
                for file in reversed(onnx_files(folder / path.name)):
                    file.replace(path.with_name(file.name))
                break
    return {
        "form": found,
        "sqnr_db": {name: finite(value) for name, value in tried.items()},
        "bytes": _size(path),
        "float_bytes": float_bytes,
    }


def store_smaller(model: ir.Model, form: str) -> None:
    """Store the weights of MatMul, Gemm, Conv and Gather as `form` ("fp16" or "int8"), in place; everything else stays float32."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor, readers = value.const_value, list(value.uses())
        operators = {(node.op_type, index) for node, index in readers}
        if tensor is None or len(operators) != 1 or not operators <= READERS:
            continue
        if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or tensor.size < FEWEST_ELEMENTS:
            continue
        ((operator, index),) = operators
        reader, weight, name = readers[0][0], tensor.numpy(), str(value.name)
        if operator == "Gather":
            half = _constant(graph, f"{name}.half", weight.astype(np.float16))
            for node, _ in readers:
                _cast_behind(graph, node, half)
        else:
            if form == "fp16":
                half = _constant(graph, f"{name}.half", weight.astype(np.float16))
                node = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT.value})
            else:
                node = _dequantize(graph, name, weight, _channel_axis(reader, weight.ndim))
            graph.insert_before(graph[0], node)
            for each, _ in readers:
                each.replace_input_with(index, node.outputs[0])
        del graph.initializers[name]


def _cast_behind(graph: ir.Graph, gather: ir.Node, table: ir.Value) -> None:
    """Let `gather` read the float16 table, and cast the rows that it finds instead of the whole of it."""
    rows = gather.outputs[0]
    cast = ir.node("Cast", [rows], attributes={"to": ir.DataType.FLOAT.value})
    rows.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, rows)
    cast.outputs[0].shape, cast.outputs[0].type = rows.shape, rows.type
    rows.type = ir.TensorType(ir.DataType.FLOAT16)
    gather.replace_input_with(0, table)
    graph.insert_after(gather, cast)


def _dequantize(graph: ir.Graph, name: str, weight: np.ndarray, axis: int) -> ir.Node:
    integers, scales = quantize_weight(np.moveaxis(weight, axis, 0))
    stored = _constant(graph, f"{name}.int8", np.moveaxis(integers, 0, axis))
    return ir.node("DequantizeLinear", [stored, _constant(graph, f"{name}.scale", scales)], attributes={"axis": axis})


def _channel_axis(reader: ir.Node, ndim: int) -> int:
    """Which axis of a weight counts the output channels."""
    if reader.op_type == "Conv" or (
        reader.op_type == "Gemm" and "transB" in reader.attributes and reader.attributes["transB"].as_int()
    ):
        return 0
    return ndim - 1


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.val(name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _token_ids(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    length = tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return np.asarray(tokens.input_ids, np.int64)


def _outputs(path: Path, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    with OnnxRuntimeEngine(path) as engine:
        return list(engine.session.run(None, dict(feed)))


def _worst_db(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The least signal-to-noise ratio of an output; infinite where all are the same."""
    return min(
        sqnr_db(float(np.square(one, dtype=np.float64).sum()), float(np.square(one - other, dtype=np.float64).sum()))
        for one, other in zip(expected, found, strict=True)
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in onnx_files(path))
