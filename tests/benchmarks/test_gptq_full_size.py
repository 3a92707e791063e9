"""GPTQ's benchmark: every layer belongs to one kind of block, and one kind is rounded for real."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 8, "norm_num_groups": 4}


def test_kinds_of_a_small_unet_and_one_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("gptq_full_size")
    monkeypatch.setitem(benchmark.CONFIGURATIONS, "tiny", {**TINY, "attention_head_dim": 4})
    monkeypatch.setitem(benchmark.PIXELS, "tiny", 64)
    kinds = benchmark.find_kinds("tiny")
    with torch.device("meta"):
        network = UNet2DConditionModel(**benchmark.CONFIGURATIONS["tiny"])
    modules = [m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert sum(kind.count * len(kind.layers) for kind in kinds) == len(modules) - 2  # conv_in and conv_out stay float
    assert len(kinds) < sum(kind.count for kind in kinds)
    transformer = next(kind for kind in kinds if "transformer_blocks" in kind.block)
    facts = benchmark.round_block("tiny", transformer, 2, 0)
    assert facts["fan_in"] == max(4 * channels for channels in (8, 16) if channels == transformer.args[0][1])
    assert facts["rounding_seconds"] > 0
