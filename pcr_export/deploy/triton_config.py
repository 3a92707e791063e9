"""Triton's config.pbtxt: made from a model's signature, written, read, and compared with the signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from pcr_export.engines.onnx_files import Ports, onnx_ports
from pcr_export.errors import PcrExportError
from pcr_export.read_files import read_text
from pcr_export.write_files import write_text

Port = tuple[str, tuple[int, ...]]  # Triton's data type, and every axis with -1 for one of free size
ONNXRUNTIME, TENSORRT, PYTHON = "onnxruntime", "tensorrt", "python"

# The part of Triton's model_config.proto that we write. The text format carries no field numbers, so theirs are not repeated here;
# a map is in text what a repeated message of key and value is.
TYPES = ("TYPE_INVALID", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_STRING", "TYPE_BOOL")
KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
MESSAGES: Mapping[str, Mapping[str, str]] = {
    "Input": {"name": "string", "data_type": "DataType", "dims": "int64*", "optional": "bool"},
    "Output": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "InstanceGroup": {"count": "int64", "kind": "Kind"},
    "QueuePolicy": {"max_queue_size": "uint32"},
    "Batching": {"default_queue_policy": "QueuePolicy"},
    "Filename": {"key": "string", "value": "string"},
    "Value": {"string_value": "string"},
    "Parameter": {"key": "string", "value": "Value"},
    "ModelConfig": {
        "name": "string",
        "platform": "string",
        "backend": "string",
        "max_batch_size": "int64",
        "input": "Input*",
        "output": "Output*",
        "instance_group": "InstanceGroup*",
        "dynamic_batching": "Batching",
        "cc_model_filenames": "Filename*",
        "parameters": "Parameter*",
    },
}
ONNX_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a config.pbtxt says, as far as we write it.

    Args:
        name: of the model, and of its folder.
        backend: "onnxruntime", "tensorrt" or "python".
        max_batch_size: 0 where the axes are all written out, as they are for the networks: `timestep` has no batch axis.
        inputs, outputs: in the model's order; with max_batch_size > 0 the axes behind the batch.
        optional: the inputs that a request may leave out.
        cpu: whether it runs on the CPU whatever GPUs there are; otherwise Triton chooses.
        dynamic_batching: whether waiting requests are handed over together.
        max_queue_size: requests that may wait, and one more is refused; 0: any number. With dynamic batching only, as Triton has it.
        plans: compute capability, such as "8.9" -> file in the version's folder.
        parameters: what the python backend hands to the model, text by name.
    """

    name: str
    backend: str
    max_batch_size: int
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    optional: frozenset[str] = frozenset()
    cpu: bool = False
    dynamic_batching: bool = False
    max_queue_size: int = 0
    plans: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)


def triton_ports(path: Path) -> tuple[dict[str, Port], dict[str, Port]]:
    """Inputs and outputs of an ONNX model as Triton counts them. Its weights are not read.

    An input of rank 0 is `[1]` here: Triton knows no scalars and refuses to reshape to one without a batch axis, and its onnxruntime
    backend takes dims of ones for a scalar.

    Raises:
        PcrExportError: the file is missing or damaged, or a type is none of Triton's.
    """
    inputs, outputs = onnx_ports(path)
    return _triton_ports(path, inputs), _triton_ports(path, outputs)


def _triton_ports(path: Path, ports: Ports) -> dict[str, Port]:
    for name, (kind, axes) in ports.items():
        if kind not in ONNX_TYPES:
            raise PcrExportError(f"{path}: {name} is {kind} {list(axes)}, which Triton can't serve")
    return {
        name: (ONNX_TYPES[kind], tuple(axis if isinstance(axis, int) else -1 for axis in axes) or (1,))
        for name, (kind, axes) in ports.items()
    }


def write_config(path: Path, config: ModelConfig, note: str = "") -> None:
    """Write `config` as Triton's text, with `note` as a comment above it."""
    message = _messages()["ModelConfig"](
        name=config.name, max_batch_size=config.max_batch_size, **_backend_fields(config.backend)
    )
    for name, (kind, dims) in config.inputs.items():
        added = message.input.add(name=name, data_type=kind, dims=dims)
        if name in config.optional:
            added.optional = True
    for name, (kind, dims) in config.outputs.items():
        message.output.add(name=name, data_type=kind, dims=dims)
    if config.cpu:
        message.instance_group.add(count=1, kind="KIND_CPU")
    if config.dynamic_batching:
        message.dynamic_batching.SetInParent()
        if config.max_queue_size:
            message.dynamic_batching.default_queue_policy.max_queue_size = config.max_queue_size
    for key, file in sorted(config.plans.items()):
        message.cc_model_filenames.add(key=key, value=file)
    for key, text in config.parameters.items():
        message.parameters.add(key=key).value.string_value = text
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    write_text(path, comment + text_format.MessageToString(message, use_short_repeated_primitives=True))


def read_config(path: Path) -> ModelConfig:
    """The config.pbtxt in `path`; fields that we never write are passed over.

    Raises:
        PcrExportError: it is missing or no text that Triton would read.
    """
    text = read_text(path, advice="export again")
    try:
        message = text_format.Parse(text, _messages()["ModelConfig"](), allow_unknown_field=True)
    except (text_format.ParseError, RecursionError, ValueError) as error:
        raise PcrExportError(f"{path} is no config.pbtxt ({error}): export again") from error
    return ModelConfig(
        name=message.name,
        backend=TENSORRT if message.platform == "tensorrt_plan" else message.backend,
        max_batch_size=message.max_batch_size,
        inputs=_read_ports(message.input),
        outputs=_read_ports(message.output),
        optional=frozenset(value.name for value in message.input if value.optional),
        cpu=any(KINDS[group.kind] == "KIND_CPU" for group in message.instance_group),
        dynamic_batching=message.HasField("dynamic_batching"),
        max_queue_size=message.dynamic_batching.default_queue_policy.max_queue_size,
        plans={entry.key: entry.value for entry in message.cc_model_filenames},
        parameters={entry.key: entry.value.string_value for entry in message.parameters},
    )


def differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """Where `found` does not describe the model that `expected` was made from, in words.

    Instances, batching, the queue, parameters and the batch of a batched model are the user's to change.
    """
    words = []
    for part, was, wanted in (
        ("name", found.name, expected.name),
        ("backend", found.backend, expected.backend),
        ("batched", found.max_batch_size > 0, expected.max_batch_size > 0),
        ("plans", dict(found.plans), dict(expected.plans)),
    ):
        if was != wanted:
            words.append(f"{part} is {was}, the model's is {wanted}")
    for part, ports, wanted_ports in (
        ("input", found.inputs, expected.inputs),
        ("output", found.outputs, expected.outputs),
    ):
        for name in sorted({*ports, *wanted_ports}):
            if ports.get(name) != wanted_ports.get(name):
                words.append(
                    f"{part} {name} is {_words(ports.get(name))}, the model's is {_words(wanted_ports.get(name))}"
                )
    return words


def _words(port: Port | None) -> str:
    return "absent" if port is None else f"{port[0]} {list(port[1])}"


def _backend_fields(backend: str) -> dict[str, str]:
    return {"platform": "tensorrt_plan"} if backend == TENSORRT else {"backend": backend}


def _read_ports(values: Any) -> dict[str, Port]:
    return {value.name: (TYPES[value.data_type], tuple(value.dims)) for value in values}


@cache
def _messages() -> Mapping[str, Any]:
    """The classes of MESSAGES, made by protobuf."""
    file = descriptor_pb2.FileDescriptorProto(name="triton_config.proto", package="triton", syntax="proto2")
    for enum, names in (("DataType", TYPES), ("Kind", KINDS)):
        values = file.enum_type.add(name=enum).value
        for number, name in enumerate(names):
            values.add(name=name, number=number)
    scalar = {
        "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
        "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
        "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
        "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    }
    for message, fields in MESSAGES.items():
        added = file.message_type.add(name=message)
        for number, (name, kind) in enumerate(fields.items(), 1):
            one = added.field.add(name=name, number=number, label=3 if kind.endswith("*") else 1)
            kind = kind.removesuffix("*")
            if kind in scalar:
                one.type = scalar[kind]
            else:
                one.type_name = f".triton.{kind}"  # protobuf finds out whether it is a message or an enum
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"triton.{name}")) for name in MESSAGES}
