"""Passes that cut a product or join heads: a part of a part, and heads that are no heads, against the simulation."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from min_max import feed, min_max_scales, sqnr_db
from torch import Tensor, nn

from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.graph.quantize import GraphReport, quantize_onnx
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.models.denoiser import Denoiser

TIMESTEPS = (900.0, 100.0)
WIDTH, TOKENS = 8, 12
# The artifact against the simulation: one activation of 400 on the other side of a rounding edge, which another CPU's gelu may put
# there, costs its unit: some 55 dB. The wrong rows of the weights have 23.
FLIPS_DB = 40
Forward = Callable[["Network", Tensor], Tensor]


class Network(nn.Module):
    """Two layers on tokens, and what is done between them."""

    def __init__(self, between: Forward, middle: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 24)
        self.last = nn.Linear(middle, WIDTH)
        self._between = between

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self._between(self, self.first(x))) + 0 * timestep


def chunk_of_a_chunk(_network: Network, y: Tensor) -> Tensor:
    """24 -> 12 + 12; the second half -> a gated unit of 6 + 6."""
    kept, gated = y.chunk(2, dim=-1)
    value, gate = gated.chunk(2, dim=-1)
    return torch.cat([kept[..., :6], value * F.gelu(gate)], dim=-1)


def chunks_three_deep(_network: Network, y: Tensor) -> Tensor:
    """24 -> 3 x 8, the last -> 2 x 4, the last of these -> 2 x 2, each of its own size."""
    first, second, third = y.chunk(3, dim=-1)
    low, high = third.chunk(2, dim=-1)
    even, odd = high.chunk(2, dim=-1)
    return torch.cat([first * F.gelu(second), low, even.tanh() - odd], dim=-1)


def attention_of_heads(_network: Network, y: Tensor) -> Tensor:
    return _attention(y, TOKENS)


def attention_in_windows(_network: Network, y: Tensor) -> Tensor:
    """Every four tokens look at each other alone: the batch of the attention is batch times windows."""
    return _attention(y, 4)


def _attention(y: Tensor, window: int) -> Tensor:
    batch, tokens, width = y.shape
    q, k, v = (part.reshape(-1, window, 2, width // 6).transpose(1, 2) for part in y.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def quantized_distance(between: Forward, middle: int, folder: Path) -> tuple[float, GraphReport]:
    """The artifact against the simulation, dB."""
    torch.manual_seed(0)
    denoiser = Denoiser(
        network=Network(between, middle).eval(),
        call=lambda network, inputs: network(inputs["x"], inputs["timestep"]),
        walk=lambda conditions, seeds: iter(()),
        timesteps=(),
        dynamic_axes={"x": {0: "batch"}, "timestep": {}},
    )
    inputs = {"x": torch.randn(3, TOKENS, WIDTH), "timestep": torch.tensor(TIMESTEPS[0])}
    scales, layers = min_max_scales(denoiser, inputs, TIMESTEPS, skip=())
    export_float_onnx(denoiser, inputs, folder / "float.onnx")
    report = quantize_onnx(folder / "float.onnx", scales, layers, folder / "model.onnx")
    with (
        OnnxRuntimeEngine(folder / "model.onnx", threads=1) as engine,
        Simulation(denoiser, layers, NEAREST_8) as simulation,
    ):
        simulated = simulated_call(simulation, scales, "timestep")(inputs).numpy()
        return sqnr_db(simulated, engine.run(feed(inputs))), report


@pytest.mark.parametrize(("between", "cuts"), [(chunk_of_a_chunk, 2), (chunks_three_deep, 3)])
def test_a_part_of_a_part_has_its_own_rows_of_the_weights(tmp_path: Path, between: Forward, cuts: int) -> None:
    middle = {chunk_of_a_chunk: 12, chunks_three_deep: 14}[between]
    distance, report = quantized_distance(between, middle, tmp_path)
    assert report.rewrites["SplitGated"] == cuts
    assert distance > FLIPS_DB


@pytest.mark.parametrize("between", [attention_of_heads, attention_in_windows])
def test_heads_are_joined_where_every_token_sees_every_other(tmp_path: Path, between: Forward) -> None:
    distance, report = quantized_distance(between, 8, tmp_path)
    assert report.rewrites["FlattenAttention"] == (between is attention_of_heads)
    assert distance > FLIPS_DB
    operators = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert operators.count("Attention") == 1
