"""Loading: from a folder, from the hub's cache, and every way in which it is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from safetensors.torch import load_file, save_file

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import CatalogEntry, resolve
from pcr_export.models.check_folder import check_folder, weight_variant
from pcr_export.models.load import load_denoiser, load_float_pipeline, load_model


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd, tmp_path / "copy"))


def parameters(entry: CatalogEntry) -> list[torch.nn.Parameter]:
    pipeline = load_float_pipeline(entry)
    return [p for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()]


def test_sd_folder(sd: Path) -> None:
    model = load_model(resolve(str(sd)))
    entry = model.entry
    assert (entry.num_inference_steps, entry.guidance_scale, entry.relaxed_end, entry.height) == (50, 7.5, "last", 16)
    assert list(model.denoiser().dynamic_axes) == ["sample", "timestep", "encoder_hidden_states"]
    assert not model.pipeline.unet.training


def test_sdxl_folder(tmp_path: Path) -> None:
    entry = load_model(resolve(str(tiny_sdxl(tmp_path)))).entry
    assert (entry.num_inference_steps, entry.guidance_scale, entry.relaxed_end, entry.height) == (50, 5.0, "first", 16)


def test_half_precision_weights_become_float32(copy: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert {p.dtype for p in parameters(resolve(str(copy)))} == {torch.float32}


def test_fp16_variant_is_found(copy: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert weight_variant(copy) == "fp16"
    assert {p.dtype for p in parameters(resolve(str(copy)))} == {torch.float32}


def test_safety_checker_is_left_out(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text("utf-8"))
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (copy / "model_index.json").write_text(json.dumps(index), "utf-8")
    assert load_float_pipeline(resolve(str(copy))).safety_checker is None


def test_scheduler_of_the_entry(sd: Path) -> None:
    entry = dataclasses.replace(resolve(str(sd)), scheduler="DDIMScheduler")
    scheduler = load_float_pipeline(entry).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.beta_schedule == "scaled_linear"
    few_steps = load_model(dataclasses.replace(resolve(str(sd)), scheduler="LCMScheduler")).entry
    assert few_steps.num_inference_steps == 4


def test_tokenizer_json_alone_is_enough(copy: Path) -> None:
    text = "a red star"
    expected = load_float_pipeline(resolve(str(copy))).tokenizer(text).input_ids
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    assert load_float_pipeline(resolve(str(copy))).tokenizer(text).input_ids == expected


@pytest.mark.parametrize("name", ["EulerScheduler", "FlowMatchEulerDiscreteScheduler", "__name__"])
def test_unknown_scheduler(sd: Path, name: str) -> None:
    with pytest.raises(PcrExportError, match=r"choose one of .*DDIMScheduler"):
        load_float_pipeline(dataclasses.replace(resolve(str(sd)), scheduler=name))


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(PcrExportError, match=f"{name} is missing: fetch the folder again"):
        load_denoiser(str(copy))


def test_cut_off_weights_are_named(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PcrExportError, match=r"unet/diffusion_pytorch_model\.safetensors is damaged .*fetch it again"):
        load_denoiser(str(copy))


def test_damaged_config_is_named(copy: Path) -> None:
    (copy / "text_encoder" / "config.json").write_text("{", "utf-8")
    with pytest.raises(PcrExportError, match=r"text_encoder/config\.json can't be read"):
        load_denoiser(str(copy))


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text("utf-8"))
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}), "utf-8")
    with pytest.raises(PcrExportError, match="can't be loaded as a StableDiffusionPipeline") as caught:
        load_denoiser(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickled_weights_are_refused(copy: Path, name: str) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / name)
    with pytest.raises(PcrExportError, match=r"pickled weights .* safe_serialization=True"):
        load_denoiser(str(copy))


def test_code_in_the_folder_is_not_run(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text("utf-8"))
    (copy / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "MyUNet"]}), "utf-8")
    (copy / "unet" / "my_unet.py").write_text("raise SystemExit('this ran')\n", "utf-8")
    with pytest.raises(PcrExportError, match="no unet that diffusers or transformers can load"):
        check_folder(copy)


def cache_of(hub: Path, hub_id: str, folder: Path) -> None:
    """Lay `folder` out as the hub's cache holds a downloaded repository."""
    repository, revision = hub / f"models--{hub_id.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision, "utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_from_the_cache(hub: Path, sd: Path) -> None:
    cache_of(hub, "org/tiny", sd)
    assert load_denoiser("org/tiny").dynamic_axes["timestep"] == {}


def test_hub_out_of_reach(hub: Path) -> None:
    with pytest.raises(
        PcrExportError, match=r"tiny: org/tiny can't .* `hf download org/tiny --local-dir \./tiny`"
    ) as caught:
        load_denoiser("org/tiny")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_unet_of_another_repository(hub: Path, tmp_path: Path) -> None:
    cache_of(hub, "org/base", tiny_sdxl(tmp_path / "base"))
    lcm = tiny_sdxl(tmp_path / "lcm", time_cond_proj_dim=24, seed=1)
    entry = CatalogEntry(name="lcm", source="org/base", unet="org/lcm", scheduler="LCMScheduler")
    with pytest.raises(PcrExportError, match=r"lcm: org/lcm can't .*`hf download org/base` and `hf download org/lcm`"):
        load_model(entry)
    cache_of(hub, "org/lcm", lcm / "unet")
    model = load_model(entry)
    assert "timestep_cond" in model.denoiser().dynamic_axes
    assert model.entry.num_inference_steps == 4
