"""A fused LoRA is  W + scale alpha / rank B A  by hand, in every part, and nothing else of the pipeline changes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_lora import find_layer, random_updates, save_as_diffusers, save_as_kohya, update_of_weight
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.fuse_lora import multiply_by_alpha
from pcr_export.models.load import load_float_pipeline, load_model
from pcr_export.models.lora_file import LoraFile

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
ROUNDING = 1e-6  # float32: the product of two matrices, added to weights of order 1
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


@pytest.fixture(scope="module", params=[tiny_sdxl, tiny_sd])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("models") / "source")


def weights(pipeline: Any) -> dict[str, Tensor]:
    parts = {name: part for name in PARTS if (part := getattr(pipeline, name, None)) is not None}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def fused(source: Path, *lora: LoraFile) -> Any:
    return load_float_pipeline(replace(resolve(str(source)), lora=lora))


def add_by_hand(pipeline: Any, updates: dict[tuple[str, str], tuple[Tensor, Tensor]], scales: dict[Any, float]) -> None:
    for (part, name), (a, b) in updates.items():
        find_layer(getattr(pipeline, part), name).weight += scales[part, name] * update_of_weight(a, b)


def assert_equal_weights(pipeline: Any, expected: Any) -> None:
    wanted = weights(expected)
    assert list(weights(pipeline)) == list(wanted)
    for name, tensor in weights(pipeline).items():
        torch.testing.assert_close(tensor, wanted[name], atol=ROUNDING, rtol=0)
        assert not tensor.requires_grad


@needs_peft
def test_weights_are_those_by_hand(source: Path, tmp_path: Path) -> None:
    by_hand = fused(source)
    updates = random_updates(by_hand)
    lora = LoraFile(save_as_diffusers(updates, tmp_path / "style.safetensors"), 0.7)
    pipeline = fused(source, lora)
    before = weights(fused(source))
    assert sum(not torch.equal(before[name], tensor) for name, tensor in weights(pipeline).items()) == len(updates)
    add_by_hand(by_hand, updates, dict.fromkeys(updates, 0.7))
    assert_equal_weights(pipeline, by_hand)
    assert dict(pipeline.unet.config) == dict(by_hand.unet.config)


@needs_peft
def test_unet_output_is_that_by_hand(source: Path, tmp_path: Path) -> None:
    plain = load_model(resolve(str(source)))
    updates = {key: value for key, value in random_updates(plain.pipeline).items() if key[0] == "unet"}
    lora = LoraFile(save_as_diffusers(updates, tmp_path / "style.safetensors"), -1.5)
    denoiser, with_lora = plain.denoiser(), load_model(replace(resolve(str(source)), lora=(lora,))).denoiser()
    inputs = next(denoiser.walk(["a star"], [0]))
    before = denoiser(inputs)
    add_by_hand(plain.pipeline, updates, dict.fromkeys(updates, -1.5))
    torch.testing.assert_close(with_lora(inputs), denoiser(inputs), atol=1e-4, rtol=0)  # through sums of up to 1152
    assert (with_lora(inputs) - before).abs().max() > 1e-2


@needs_peft
def test_kohya_names_and_an_alpha_of_its_own_for_every_layer(source: Path, tmp_path: Path) -> None:
    by_hand = fused(source)
    updates = random_updates(by_hand)
    alphas = {key: float(i + 1) for i, key in enumerate(updates)}
    lora = LoraFile(save_as_kohya(updates, alphas, tmp_path / "kohya.safetensors"), 0.5)
    rank = len(next(iter(updates.values()))[0])
    add_by_hand(by_hand, updates, {key: 0.5 * alpha / rank for key, alpha in alphas.items()})
    assert_equal_weights(fused(source, lora), by_hand)


@needs_peft
def test_alpha_in_the_header(source: Path, tmp_path: Path) -> None:
    """As diffusers' own training scripts write it."""
    by_hand = fused(source)
    updates = {key: value for key, value in random_updates(by_hand).items() if key[0] == "unet"}
    path = save_as_diffusers(updates, tmp_path / "header.safetensors")
    rank = len(next(iter(updates.values()))[0])
    config = {"r": rank, "lora_alpha": 2 * rank, "target_modules": [name for _, name in updates]}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(load_file(path), path, header)
    add_by_hand(by_hand, updates, dict.fromkeys(updates, 2.0))
    assert_equal_weights(fused(source, LoraFile(path)), by_hand)


@needs_peft
def test_one_after_another(source: Path, tmp_path: Path) -> None:
    by_hand = fused(source)
    loras = []
    for seed, scale in ((1, 0.5), (2, 1.0)):
        updates = random_updates(by_hand, seed)
        loras.append(LoraFile(save_as_diffusers(updates, tmp_path / f"{seed}.safetensors"), scale))
        add_by_hand(by_hand, updates, dict.fromkeys(updates, scale))
    assert_equal_weights(fused(source, *loras), by_hand)


@needs_peft
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda name, tensor: {name.replace("mid_block", "middle"): tensor},
            r"2 of its \d+ tensors have no place in it, the first is unet\.middle\.",
        ),
        (lambda name, tensor: {name: tensor[..., :-1]}, "can't be fused into this model"),
        (lambda name, tensor: {name: tensor * torch.nan}, "can't be fused into this model"),
        (
            lambda name, tensor: {f"x.{name}": tensor},
            r"(\d+) of its \1 tensors have no place in it, the first is x\.",
        ),
        (lambda name, tensor: {name.replace("lora_A", "oft_r"): tensor}, "it holds OFT"),
    ],
)
def test_a_lora_of_another_model_is_refused(source: Path, tmp_path: Path, change: Any, match: str) -> None:
    path = save_as_diffusers(random_updates(fused(source)), tmp_path / "style.safetensors")
    tensors = {key: tensor for old in load_file(path).items() for key, tensor in change(*old).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(PcrExportError, match=f"{match}.*: give a LoRA that was trained for it") as caught:
        fused(source, LoraFile(path))
    assert "\n" not in str(caught.value)


@needs_peft
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_names_that_diffusers_passes_over_are_named(source: Path, tmp_path: Path) -> None:
    """Layers in two spellings: peft's first, so that diffusers does not convert the others."""
    updates = {key: value for key, value in random_updates(fused(source)).items() if key[0] == "unet"}
    tensors = load_file(save_as_diffusers(updates, tmp_path / "style.safetensors"))
    layer = next(iter(updates))[1]
    old = {"lora_A": "lora.down", "lora_B": "lora.up"}
    for new, spelling in old.items():
        tensors[f"unet.{layer}.{spelling}.weight"] = tensors.pop(f"unet.{layer}.{new}.weight")
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(PcrExportError, match=rf"2 of its 6 tensors have no place in it, the first is unet\.{layer}"):
        fused(source, LoraFile(tmp_path / "mixed.safetensors"))


@needs_peft
def test_a_second_text_encoder_that_the_model_has_not(source: Path, tmp_path: Path) -> None:
    """A LoRA of SDXL given to SD: diffusers would take its first text encoder's half without a word."""
    updates = {key: value for key, value in random_updates(fused(source)).items() if key[0] == "text_encoder"}
    alphas = dict.fromkeys(updates, 1.0)
    path = save_as_kohya(updates, alphas, tmp_path / "te.safetensors")
    tensors = load_file(path)
    more = {name.replace("lora_te1_", "lora_te2_"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, path)
    if getattr(load_float_pipeline(resolve(str(source))), "text_encoder_2", None) is None:
        with pytest.raises(PcrExportError, match=r"have no place in it, the first is .*text_encoder_2|lora_te2"):
            fused(source, LoraFile(path))
    else:
        fused(source, LoraFile(path))


@needs_peft
def test_alpha_beside_peft_names(source: Path, tmp_path: Path) -> None:
    by_hand = fused(source)
    updates = random_updates(by_hand)
    path = save_as_diffusers(updates, tmp_path / "alpha.safetensors")
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(1.5) for name in load_file(path) if "lora_A" in name}
    save_file(load_file(path) | alphas, path)
    rank = len(next(iter(updates.values()))[0])
    add_by_hand(by_hand, updates, dict.fromkeys(updates, 1.5 / rank))
    assert_equal_weights(fused(source, LoraFile(path)), by_hand)


@needs_peft
def test_a_file_in_the_hubs_cache(source: Path, tmp_path: Path) -> None:
    by_hand = fused(source)
    updates = random_updates(by_hand)
    blob = save_as_diffusers(updates, tmp_path / "style.safetensors").rename(tmp_path / "0123abcd")
    (tmp_path / "a: b é.safetensors").symlink_to(blob.name)
    add_by_hand(by_hand, updates, dict.fromkeys(updates, 1.0))
    assert_equal_weights(fused(source, LoraFile(tmp_path / "a: b é.safetensors")), by_hand)


def test_alpha_is_multiplied_in() -> None:
    tensors = {
        "a.lora_down.weight": torch.ones(4, 2),
        "a.lora_up.weight": torch.ones(3, 4),
        "a.alpha": torch.tensor(2.0),
        "b.lora_up.weight": torch.ones(3, 4),
        "c.lora_A.weight": torch.ones(4, 2),
        "c.lora_B.weight": torch.ones(3, 4),
        "c.alpha": torch.tensor([1.0]),
    }
    found = multiply_by_alpha(tensors)
    assert sorted(found) == sorted(name for name in tensors if not name.endswith("alpha"))
    assert found["c.lora_B.weight"].unique().tolist() == [0.25]
    assert found["a.lora_up.weight"].unique().tolist() == [0.5]
    assert found["b.lora_up.weight"].unique().tolist() == [1.0]
    with pytest.raises(ValueError, match=r"c\.alpha belongs to no layer"):
        multiply_by_alpha({"c.alpha": torch.tensor(1.0)})
