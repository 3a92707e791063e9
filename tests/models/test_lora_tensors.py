"""Every tensor of a LoRA file is half of an update or its alpha, or the refusal calls the kind by name and names the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_file import parse_lora
from pcr_export.models.lora_tensors import lora_fault

LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{LAYER}.lora_down.weight": (4, 32), f"{LAYER}.lora_up.weight": (64, 4)}
# as LyCORIS, sd-scripts, peft and others write them
OTHER_FILES = {
    "LoHa": {f"{LAYER}.hada_{each}": (4, 4) for each in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {f"{LAYER}.lokr_w1": (8, 8), f"{LAYER}.lokr_w2_a": (8, 4), f"{LAYER}.lokr_w2_b": (4, 8)},
    "DoRA": {**PAIR, f"{LAYER}.dora_scale": (1, 32)},
    r"LoCon with a Tucker core \(lora_mid\)": {**PAIR, f"{LAYER}.lora_mid.weight": (4, 4, 3, 3)},
    "OFT": {f"{LAYER}.oft_blocks": (4, 8, 8)},
    "IA3": {f"{LAYER}.weight": (32,), f"{LAYER}.on_input": ()},
    "GLoRA": {f"{LAYER}.{each}.weight": (4, 4) for each in ("a1", "a2", "b1", "b2")},
    r"whole differences of weights \(diff\)": {**PAIR, "lora_unet_conv_in.diff": (8, 4, 3, 3)},
    r"weights of norm layers \(w_norm\)": {**PAIR, "lora_unet_conv_norm_out.w_norm": (32,)},
    "textual inversion": {**PAIR, "bundle_emb.style.clip_l": (2, 32)},
}


def saved(shapes: dict[str, tuple[int, ...]], path: Path) -> Path:
    tensors: dict[str, Tensor] = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_kinds_are_called_by_name_before_a_model_is_loaded(kind: str, tmp_path: Path) -> None:
    path = saved({**OTHER_FILES[kind], f"{LAYER}.alpha": ()}, tmp_path / "other.safetensors")
    with pytest.raises(PcrExportError, match=f"it holds {kind} .*only LoRA.*can be fused: merge the file") as caught:
        parse_lora(str(path))
    assert "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in OTHER_FILES[kind])


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({}, "no update of any layer"),
        ({f"{LAYER}.alpha": ()}, "no update of any layer"),
        ({**PAIR, "te3.something": (3,)}, r"what is no part of a LoRA \(te3.something\)"),
        ({**PAIR, "text_encoder.x.lora_B.bias": (3,)}, r"no part of a LoRA \(text_encoder.x.lora_B.bias\)"),
        ({f"{LAYER}.lora_down.weight": (4, 32)}, f"has no {LAYER}.lora_up.weight beside it"),
        ({f"{LAYER}.lora_up.weight": (64, 4)}, f"has no {LAYER}.lora_down.weight beside it"),
        ({**PAIR, f"{LAYER}.lora_up.weight": (64, 8)}, r"has rank \(4,\), .* \(8,\)"),
        ({**PAIR, "lora_unet_other.alpha": ()}, "lora_unet_other.alpha belongs to no layer"),
        ({**PAIR, f"{LAYER}.alpha": (2,)}, "is no number"),
        ({**PAIR, "unet.a.lora_A.weight": (4, 3), "unet.a.lora_B.weight": (3, 4)}, "mixes kohya's names with others"),
    ],
)
def test_what_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], expected: str, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match=expected):
        parse_lora(str(saved(shapes, tmp_path / "odd.safetensors")))


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        (f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"),
        ("unet.x.lora_A.weight", "unet.x.lora_B.weight", "unet.x.alpha"),
        (
            "unet.x.processor.to_q_lora.down.weight",
            "unet.x.processor.to_q_lora.up.weight",
            "unet.x.processor.to_q.alpha",
        ),
        ("unet.x.lora.down.weight", "unet.x.lora.up.weight", "unet.x.lora.alpha"),
        (
            "text_encoder.x.lora_linear_layer.down.weight",
            "text_encoder.x.lora_linear_layer.up.weight",
            "text_encoder.x.alpha",
        ),
        (
            "unet.model.diffusion_x.lora_A.weight",
            "unet.model.diffusion_x.lora_B.weight",
            "unet.model.diffusion_x.alpha",
        ),
    ],
)
def test_every_spelling_of_a_layer_is_known(down: str, up: str, alpha: str) -> None:
    for rest in ((), (1, 1)):  # of a Linear and of a convolution
        shapes = {down: (4, 32, *rest), up: (64, 4, *rest)}
        assert lora_fault(shapes) is None
        assert lora_fault({**shapes, alpha: ()}) is None
        assert lora_fault({**shapes, alpha: (1,)}) is None
