"""Parts that don't fit each other or the picture are told from their configurations, before weights are read."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models.tiny_pipelines import tiny_sd, tiny_sdxl

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import REFERENCE_MODEL, resolve
from pcr_export.models.check_configs import check_configs
from pcr_export.models.load import load_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations and tokenizers alone: no weights, which the check must not need."""
    folder = tmp_path_factory.mktemp("models")
    sources = {"sd": tiny_sd(folder / "sd"), "xl": tiny_sdxl(folder / "xl")}
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return sources


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a configuration; `...` takes one away."""
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")


def fault(folder: Path, **settings: int) -> str:
    entry = replace(resolve(str(folder)), **settings)
    with pytest.raises(PcrExportError) as caught:
        check_configs(folder, entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_what_fits_passes(name: str, sources: dict[str, Path]) -> None:
    check_configs(sources[name], resolve(str(sources[name])))
    check_configs(REFERENCE_MODEL, resolve("tiny-sdxl"))


UNETS = [
    ("sd", {"in_channels": 9}, "reads 9 channels, where the VAE's latents have 4, the mask .* inpainting models read"),
    ("xl", {"in_channels": 9}, "the mask and the masked picture that inpainting models read .*only text-to-image"),
    ("sd", {"in_channels": 8}, r"the picture that editing models \(instruct-pix2pix\) read"),
    ("sd", {"in_channels": 5}, "the depth that depth-to-image models read"),
    ("sd", {"in_channels": 7}, "the picture that upscalers read"),
    ("sd", {"in_channels": 3}, "reads 3 channels, where the VAE's latents have 4: they are no pair"),
    ("sd", {"out_channels": 8}, "gives 8 channels, where the VAE's latents have 4: .* no variance"),
    (
        "sd",
        {"class_embed_type": "timestep"},
        "class_embed_type is 'timestep', which takes more than a StableDiffusionPipeline",
    ),
    ("sd", {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
    ("sd", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
    ("sd", {"addition_embed_type": "image_hint"}, "addition_embed_type is 'image_hint'"),
    ("xl", {"addition_embed_type": None}, r"addition_embed_type is None, .* \(it gives text_time\)"),
    ("sd", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 32}, "encoder_hid_dim_type is 'image_proj'"),
    ("sd", {"attention_type": "gated"}, "attention_type is 'gated'"),
    ("sd", {"cross_attention_dim": 48}, "reads texts 48 wide, the text encoders give 32"),
    ("sd", {"cross_attention_dim": [32, 48]}, "reads texts 48 wide"),
    ("sd", {"cross_attention_dim": ...}, "reads texts 1280 wide"),  # diffusers' default
    ("sd", {"encoder_hid_dim": 40, "cross_attention_dim": 32}, "reads texts 40 wide"),
    ("xl", {"cross_attention_dim": 16}, "reads texts 16 wide, the text encoders give 32"),
    ("xl", {"projection_class_embeddings_input_dim": 100}, "is 100, where 6 times .* make 80"),
    ("xl", {"addition_time_embed_dim": None}, "make 32"),
    ("sd", {"block_out_channels": 3}, r"unet/config.json is damaged \(Expected `array`, got `int`"),
    ("sd", {"cross_attention_dim": "wide"}, r"unet/config.json is damaged \(Expected `int \| array`, got `str`"),
    ("sd", {"sample_size": None}, "tells no picture size .*: give --height and --width"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), UNETS)
def test_a_unet_that_does_not_fit(
    name: str, changes: dict[str, Any], expected: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources[name], tmp_path / "model"))
    edit(folder / "unet" / "config.json", **changes)
    line = fault(folder)
    assert re.search(expected, line), line
    assert "unet" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_attention_dim": [48, 32]},  # the first block has no attention
        {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 48},
        {"in_channels": ..., "out_channels": ..., "attention_type": ...},  # diffusers fills them in
        {"time_cond_proj_dim": 24, "sample_size": [8, 16]},
    ],
)
def test_a_unet_that_fits(changes: dict[str, Any], sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["sd"], tmp_path / "model"))
    edit(folder / "unet" / "config.json", **changes)
    check_configs(folder, resolve(str(folder)))


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("vae", {"latent_channels": 16}, "reads 4 channels, where the VAE's latents have 16"),
        ("text_encoder", {"hidden_size": 64}, "the text encoders give 80"),
        ("text_encoder_2", {"projection_dim": 64}, "make 112"),
        ("text_encoder", {"hidden_size": "wide"}, r"text_encoder/config\.json"),
        (
            "text_encoder",
            {"max_position_embeddings": 8},
            "tokenizer_config.json: model_max_length is 16, where .* reads 8",
        ),
        (
            "text_encoder_2",
            {"vocab_size": 9},
            r"tokenizer_2/vocab.json has the token \d+, where the text encoder knows 9",
        ),
    ],
)
def test_another_part_that_does_not_fit(
    part: str, changes: dict[str, Any], expected: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["xl"], tmp_path / "model"))
    edit(folder / part / "config.json", **changes)
    line = fault(folder)
    assert re.search(expected, line), line


def test_a_text_encoder_that_wants_a_mask(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["sd"], tmp_path / "model"))
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    assert re.search(r"text_encoder/config\.json: use_attention_mask is true, and .* for tokens alone", fault(folder))


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "UNetMotionModel"), ("vae", "AutoencoderTiny"), ("text_encoder", "T5EncoderModel")]
)
def test_a_part_of_another_class(part: str, name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["sd"], tmp_path / "model"))
    edit(folder / "model_index.json", **{part: ["diffusers" if part != "text_encoder" else "transformers", name]})
    assert f"has a {name} as its {part}: only" in fault(folder)


def test_a_unet_of_its_own(sources: dict[str, Path]) -> None:
    """Which replaces the folder's, as that of lcm-sdxl."""
    unet = json.loads((sources["xl"] / "unet" / "config.json").read_text("utf-8"))
    entry = replace(resolve(str(sources["xl"])), unet="org/lcm")
    check_configs(sources["xl"], entry, unet)
    with pytest.raises(PcrExportError, match=r"config\.json of org/lcm: the UNet reads 9 channels"):
        check_configs(sources["xl"], entry, unet | {"in_channels": 9})


def test_sizes_are_those_of_the_unet(sources: dict[str, Path], tmp_path: Path) -> None:
    """It halves latents, each of which is half a pixel wide, three times here."""
    folder = Path(shutil.copytree(sources["sd"], tmp_path / "model"))
    edit(
        folder / "unet" / "config.json",
        block_out_channels=[32, 64, 64, 64],
        down_block_types=["CrossAttnDownBlock2D"] * 4,
    )
    assert "multiples of 16" in fault(folder, height=32, width=40)
    check_configs(folder, replace(resolve(str(folder)), height=32, width=48))


def test_no_weights_are_read_for_what_configurations_tell(tmp_path: Path) -> None:
    """The whole way: a 9-channel UNet in a text-to-image folder, whose weights are damaged besides."""
    folder = tiny_sd(tmp_path / "model")
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(PcrExportError, match="inpainting models read"):
        load_model(resolve(str(folder)))


def test_a_null_sample_size_with_a_size(tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "model")
    edit(folder / "unet" / "config.json", sample_size=None)
    model = load_model(replace(resolve(str(folder)), height=16, width=24, num_inference_steps=2))
    sample = next(model.denoiser().walk(["a star"], [0]))["sample"]
    assert sample.shape[2:] == (8, 12)
    with pytest.raises(PcrExportError, match="give --height and --width"):
        load_model(resolve(str(folder)))
