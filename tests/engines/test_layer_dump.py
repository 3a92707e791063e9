"""Proof of INT8 from the two texts in which a builder tells what it built."""

import json

import pytest

from pcr_export.engines.layer_dump import Kernel, count_kernels, parse_dump, parse_inspector, prove_int8

TENSOR = "{{ Name: {0}, Dimensions: [2,64], Strides: [64,1], StrideOrder: [1,0], Datatype: {1}, Format: (Linear) Row major }}"


def line(name: str, kind: str, reads: list[str], constants: list[str], writes: list[str], onnx: list[str]) -> str:
    def many(types: list[str]) -> str:
        return "[ " + ", ".join(TENSOR.format(f"t{index}", kind) for index, kind in enumerate(types)) + "]"

    metadata = "".join(f"[ONNX Layer: {each}]" for each in onnx)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {many(reads)}, Constants: {many(constants)}, "
        f"Outputs: {many(writes)}, TacticName: stub, StreamId: 0, Metadata: {metadata}"
    )


DUMP = "\n".join(
    [
        "Layers:",
        line("q#0", "kgen", ["Half", "Float"], [], ["Int8"], ["a.to_q/q#1", "a.to_q/product#9"]),
        line("qkv", "gemm", ["Int8"], ["Int8", "Float"], ["Half"], ["a.to_q/product#9", "a.to_k/product#10", "dq#3"]),
        line("conv", "correlation", ["Half", "Half"], ["Half", "Float"], ["Half"], ["conv/product#4"]),
        line("sum", "gemm", ["Int8", "Half"], ["Int8"], ["Half"], ["with_residual/product#5"]),
        line("weight only", "gemm", ["Half"], ["Int8"], ["Half"], ["weight_only/product#6"]),
        line("wait", "wait", [], [], [], []),
        "",
        "I/O Tensors:",
        " Name: sample, IOMode: Input, DataType: Float, Dimensions: [2,4,32,32], Location: Device",
    ]
)


def test_a_dump_is_read_line_by_line() -> None:
    kernels = parse_dump(DUMP)
    assert [kernel.name for kernel in kernels] == ["q#0", "qkv", "conv", "sum", "weight only", "wait"]
    assert kernels[1] == Kernel(
        name="qkv",
        kind="gemm",
        reads=("Int8", "Int8", "Float"),
        writes=("Half",),
        onnx_names=("a.to_q/product#9", "a.to_k/product#10", "dq#3"),
    )


def test_text_that_is_no_dump_has_no_kernels() -> None:
    assert parse_dump("Layers:") == []
    assert parse_dump("Layers:\nName: an entry without a type") == []


def test_every_layer_is_int8_or_has_a_reason() -> None:
    layers = ["a.to_q", "a.to_k", "conv", "with_residual", "weight_only", "lost"]
    assert prove_int8(parse_dump(DUMP), layers) == {
        "a.to_q": None,  # merged with to_k into one product; the kernel that prepares it does not count
        "a.to_k": None,
        "conv": "the builder chose Half x Half",
        "with_residual": None,
        "weight_only": "the builder chose Half x Int8",
        "lost": "no kernel names it",
    }


def test_one_float_branch_is_enough_to_doubt_a_layer() -> None:
    def product(*reads: str) -> Kernel:
        return Kernel(name="k", kind="gemm", reads=reads, writes=("Half",), onnx_names=("l/product#1",))

    assert prove_int8([product("Int8", "Int8"), product("Int8", "Int8")], ["l"]) == {"l": None}
    assert prove_int8([product("Int8", "Int8"), product("Half", "Half")], ["l"]) == {
        "l": "the builder chose Half x Half"
    }


def test_a_product_inside_a_generated_kernel_is_judged_by_what_it_reads() -> None:
    def fused(*reads: str) -> Kernel:
        return Kernel(name="k", kind="kgen", reads=reads, writes=("Half",), onnx_names=("l/product#1",))

    assert prove_int8([fused("Half"), fused("Int8", "Int8", "Float")], ["l"]) == {"l": None}
    assert prove_int8([fused("Half", "Half")], ["l"]) == {"l": "fused into kgen, which reads Half"}


@pytest.mark.parametrize(
    "reads", [("Half", "Half"), ("Int8", "Float", "Float"), ("unknown", "Int8"), ("UInt8", "UInt8")]
)
@pytest.mark.parametrize("kind", ["kgen", "gemm"])
def test_one_int8_kernel_of_several_is_no_proof(kind: str, reads: tuple[str, ...]) -> None:
    def kernel(kind: str, *reads: str) -> Kernel:
        return Kernel(name="k", kind=kind, reads=reads, writes=("Half",), onnx_names=("l/product#1",))

    proven = [kernel("kgen", "Half", "Float"), kernel(kind, "Int8", "Int8", "Float", "Float")]
    assert prove_int8(proven, ["l"]) == {"l": None}
    for kernels in ([*proven, kernel("kgen", *reads)], [kernel("kgen", *reads), *proven]):
        assert prove_int8(kernels, ["l"])["l"] == f"fused into kgen, which reads {', '.join(sorted(set(reads)))}"
    assert prove_int8([*proven, kernel("gemm", *reads)], ["l"])["l"] is not None


def test_unsigned_bytes_are_not_signed_ones() -> None:
    layer = {"Name": "k", "LayerType": "gemm", "Outputs": [], "Metadata": "[ONNX Layer: l/product#1]"}
    for phrase, name in (
        ("UInt8", "UInt8"),
        ("Row major linear uint8 format", "UInt8"),
        ("Vectorized Int8 format", "Int8"),
    ):
        inputs = [{"Name": "x", "Format/Datatype": phrase}] * 2
        (kernel,) = parse_inspector(json.dumps({"Layers": [{**layer, "Inputs": inputs}]}))
        assert kernel.reads == (name, name)
        assert (prove_int8([kernel], ["l"])["l"] is None) == (name == "Int8")


def test_a_layer_is_not_mistaken_for_one_whose_name_it_ends() -> None:
    kernels = parse_dump("Layers:\n" + line("k", "gemm", ["Int8"], ["Int8"], ["Half"], ["block.1.conv/product#7"]))
    assert prove_int8(kernels, ["conv", "block.1.conv"]) == {"conv": "no kernel names it", "block.1.conv": None}


def test_kernels_are_counted_by_type_and_data_types() -> None:
    table = count_kernels(parse_dump(DUMP))
    assert table[0] == ("gemm", "Int8 x Int8", "Half", 2)
    assert ("kgen", "Float, Half", "Int8", 1) in table
    assert ("wait", "-", "-", 1) in table


def test_the_inspectors_json_of_both_generations() -> None:
    eleven = {
        "Name": "qkv",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Dimensions": [2, 64], "Datatype": "Int8", "Format": "Row major linear format"}],
        "Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "alpha", "Datatype": "Float"}],
        "Outputs": [{"Name": "y", "Datatype": "Half"}],
        "Metadata": "[ONNX Layer: a.to_q/product#9]\u001e[ONNX Layer: a.to_k/product#10]",
    }
    ten = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        "Weights": {"Type": "Int8", "Count": 131072},
        "Bias": {"Type": "Float", "Count": 256},
        "Metadata": "[ONNX Layer: conv/product#4]",
    }
    dynamic = {
        "Name": "late",
        "LayerType": "CaskGemmMatrixMultiply",
        "Inputs": [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}] * 2,
        "Outputs": [],
        "Metadata": "[ONNX Layer: late/product#5]",
    }
    text = json.dumps({"Layers": [eleven, ten, dynamic], "Bindings": ["x", "y"]})
    kernels = parse_inspector(text)
    assert kernels[1].reads == ("Int8", "Int8")
    assert kernels[1].writes == ("Half",)
    assert prove_int8(kernels, ["a.to_q", "a.to_k", "conv", "late"]) == {
        "a.to_q": None,
        "a.to_k": None,
        "conv": None,
        "late": "the builder chose unknown x unknown",
    }


def test_an_engine_without_detail_proves_nothing() -> None:
    kernels = parse_inspector(json.dumps({"Layers": ["gemm [ONNX Layer: conv/product#4]", "reformat"]}))
    assert prove_int8(kernels, ["conv"])["conv"] is not None
