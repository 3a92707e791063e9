"""What the full-size benchmark rests on: weights written shard by shard, phases measured in processes of their own."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import random_unets
from benchmarks.phase_memory import measure_phase
from benchmarks.random_unets import CONFIGURATIONS, write_random_unet

TINY = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 8, "norm_num_groups": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(CONFIGURATIONS, "tiny", {**TINY, "attention_head_dim": 4})
    monkeypatch.setattr(random_unets, "SHARD_BYTES", 200_000)
    write_random_unet("tiny", tmp_path / "unet", seed=1)
    return tmp_path / "unet"


def test_shards_are_a_folder_that_diffusers_loads(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 2
    unet = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
    assert unet.config.block_out_channels == [8, 16, 16, 16]
    weight = unet.mid_block.resnets[0].conv1.weight
    assert weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.1)  # 2304 samples
    assert unet.conv_norm_out.weight.mean().item() == pytest.approx(1, abs=0.2)  # 8 samples of deviation 0.1


def test_written_once_for_each_seed(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    before, made = first.read_bytes(), first.stat().st_mtime_ns
    write_random_unet("tiny", folder, seed=1)
    assert first.stat().st_mtime_ns == made
    write_random_unet("tiny", folder, seed=2)
    assert first.read_bytes() != before
    assert json.loads((folder / random_unets.SEED_FILE).read_text())["seed"] == 2


@pytest.mark.parametrize(("kind", "count"), [("sdxl", 2_567_463_684), ("sd15", 859_520_964)])
def test_the_configurations_are_the_models(kind: str, count: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGURATIONS[kind])
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


def test_a_phase_is_timed_and_its_memory_seen() -> None:
    result, phase = measure_phase("sleep", time.sleep, 0.5)
    assert result is None
    assert 0.5 <= phase.seconds < 60
    assert phase.peak_anonymous_bytes > 2**20
    assert phase.peak_file_bytes > 2**20


def test_a_phase_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="phase division failed"):
        measure_phase("division", divmod, 1, 0)
