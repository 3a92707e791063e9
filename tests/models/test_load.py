"""Loading: from a folder, from the hub's cache, and every way in which it is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hub_cache import cache_of
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from safetensors.torch import load_file, save_file

from pcr_export.errors import PcrExportError, PcrExportWarning
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
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 96]}), "utf-8")
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def rename_to_fp16(folder: Path, parts: str = "*") -> None:
    for path in folder.glob(f"{parts}/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def test_hub_id_from_the_cache(hub: Path, sd: Path) -> None:
    snapshot = cache_of(hub, "org/tiny", sd)
    assert (snapshot / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()
    for given in ("org/tiny", str(snapshot), str(snapshot.parents[1])):
        assert load_denoiser(given).dynamic_axes["timestep"] == {}


@pytest.mark.parametrize("place", ["a b", "it's #1", "é中", "x%20y"])
def test_a_cache_in_a_place_with_an_odd_name(
    place: str, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / place))
    cache_of(tmp_path / place, "org/tiny", sd)
    assert parameters(resolve("org/tiny"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_cache_that_holds_one_variant_of_two(hub: Path, copy: Path, variant: str | None) -> None:
    """As it is after `from_pretrained(..., variant="fp16")`, where the repository has plain weights, too."""
    for path in list(copy.rglob("*.safetensors")):
        shutil.copy(path, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    wanted = (lambda name: ".fp16." in name) if variant else (lambda name: ".fp16." not in name)
    snapshot = cache_of(hub, "org/tiny", copy, has=lambda name: not name.endswith(".safetensors") or wanted(name))
    assert weight_variant(snapshot) == variant
    assert parameters(resolve("org/tiny"))


def test_a_cache_that_was_not_filled(hub: Path, sd: Path) -> None:
    cache_of(hub, "org/tiny", sd, has=lambda name: not name.startswith("vae/diff"))
    with pytest.raises(
        PcrExportError, match=r"the local cache is not whole .*vae/diffusion_pytorch_model.*run `hf download"
    ):
        load_denoiser("org/tiny")


def test_a_repository_that_holds_a_single_file(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "source" / "model.safetensors")
    snapshot = cache_of(hub, "org/single", tmp_path / "source")
    with pytest.raises(PcrExportError, match=r"org/single has no model_index\.json in the local cache") as caught:
        load_denoiser("org/single")
    assert str(snapshot) in str(caught.value)


@pytest.mark.parametrize("revision", ["f" * 40, "next"])
def test_a_revision(hub: Path, sd: Path, copy: Path, revision: str) -> None:
    index = copy / "unet" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text("utf-8")) | {"sample_size": 4}), "utf-8")
    cache_of(hub, "org/tiny", sd)
    cache_of(hub, "org/tiny", copy, revision="f" * 40, branch="next")
    entry = resolve("org/tiny")
    assert load_model(entry).entry.height == 16
    assert load_model(dataclasses.replace(entry, revision=revision)).entry.height == 8


def test_sharded_weights_from_the_cache(hub: Path, sd: Path, tmp_path: Path) -> None:
    pipeline = load_float_pipeline(resolve(str(sd)))
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(sd / "tokenizer" / name, tmp_path / "sharded" / "tokenizer" / name)
    cache_of(hub, "org/tiny", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded" / "text_encoder").glob("*.safetensors"))) > 1
    expected = parameters(resolve(str(sd)))
    assert all(torch.equal(*pair) for pair in zip(parameters(resolve("org/tiny")), expected, strict=True))


@pytest.mark.parametrize("parts", ["unet", "text_encoder", "[uv]*"])
def test_parts_of_which_some_have_a_variant(copy: Path, parts: str) -> None:
    """diffusers takes the variant where it is, and plain weights elsewhere."""
    expected = [p.clone() for p in parameters(resolve(str(copy)))]
    for path in copy.glob("*/*.index.json"):
        path.unlink()  # of one file
    rename_to_fp16(copy, parts)
    assert weight_variant(copy) == "fp16"
    assert all(torch.equal(*pair) for pair in zip(parameters(resolve(str(copy))), expected, strict=True))


def test_another_variant_and_weights_that_are_no_part_of_it(copy: Path) -> None:
    """non_ema beside plain weights (SD 1.4), and a folder that has nothing but bf16."""
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    (unet.with_name("diffusion_pytorch_model.non_ema.safetensors")).write_bytes(b"not read")
    assert weight_variant(copy) is None
    assert parameters(resolve(str(copy)))
    for path in list(copy.rglob("*.safetensors")):
        if ".non_ema." not in path.name:
            path.rename(path.with_name(path.name.replace(".safetensors", ".bf16.safetensors")))
    for path in copy.glob("*/*.index.json"):
        path.unlink()
    assert weight_variant(copy) == "bf16"
    assert parameters(resolve(str(copy)))


def test_variants_that_do_not_go_together(copy: Path) -> None:
    for path in copy.glob("*/*.index.json"):
        path.unlink()
    rename_to_fp16(copy, "unet")
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(
        PcrExportError, match=r"model\.safetensors is missing \((bf16|fp16) is there, which another part has not"
    ):
        load_denoiser(str(copy))


def test_a_link_that_leads_nowhere_is_named(hub: Path, sd: Path) -> None:
    snapshot = cache_of(hub, "org/tiny", sd)
    path = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    path.resolve().unlink()
    with pytest.raises(PcrExportError, match=r"vae/.*\.safetensors is a link to \.\./.*, where no file is"):
        load_denoiser(str(snapshot))


def test_weights_in_a_store_elsewhere(copy: Path, tmp_path: Path) -> None:
    """A folder that a person laid out with links: diffusers reads it, and so do we."""
    for path in copy.rglob("*.safetensors"):
        store = path.rename(tmp_path / f"{path.parent.name}.weights")
        path.symlink_to(store)
    assert parameters(resolve(str(copy)))


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
    snapshot = cache_of(hub, "org/lcm", lcm / "unet")
    assert (snapshot / "config.json").is_symlink()
    model = load_model(entry)
    assert "timestep_cond" in model.denoiser().dynamic_axes
    assert model.entry.num_inference_steps == 4


def test_a_unet_of_another_repository_that_is_cached_as_fp16(hub: Path, tmp_path: Path) -> None:
    cache_of(hub, "org/base", tiny_sdxl(tmp_path / "base"))
    unet = tiny_sdxl(tmp_path / "lcm", time_cond_proj_dim=24, seed=1) / "unet"
    for path in list(unet.glob("*.safetensors")):
        shutil.copy(path, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    plain = "diffusion_pytorch_model.safetensors"
    cache_of(hub, "org/lcm", unet, has=lambda name: not name.startswith(plain))
    entry = CatalogEntry(name="lcm", source="org/base", unet="org/lcm", scheduler="LCMScheduler")
    assert load_model(entry).pipeline.unet.config.time_cond_proj_dim == 24


PARTS_AND_FILES = [
    ("unet", "diffusion_pytorch_model", "UNet2DConditionModel"),
    ("vae", "diffusion_pytorch_model", "AutoencoderKL"),
    ("text_encoder", "model", "CLIPTextModel"),
]


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("part", "stem", "network"), PARTS_AND_FILES)
def test_weights_that_lack_a_tensor_are_not_filled_with_chance(part: str, stem: str, network: str, copy: Path) -> None:
    path = copy / part / f"{stem}.safetensors"
    name = sorted(load_file(path))[3]
    edit_weights(path, lambda tensors: tensors.pop(name))
    with pytest.raises(
        PcrExportError, match=rf"lack tensors of a {network} \(1, such as {re.escape(name)}\): fetch it"
    ):
        load_model(resolve(str(copy)))


@pytest.mark.parametrize(("part", "stem", "network"), PARTS_AND_FILES)
def test_weights_that_have_no_place_are_said_but_older_buffers(part: str, stem: str, network: str, copy: Path) -> None:
    path = copy / part / f"{stem}.safetensors"
    edit_weights(path, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(4)[None]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PcrExportWarning)
        load_model(resolve(str(copy)))
    edit_weights(path, lambda tensors: tensors.update({"adapter.weight": torch.zeros(2)}))
    with pytest.warns(PcrExportWarning, match=rf"{network} has no place for tensors of it \(1, such as adapter.weight"):
        load_model(resolve(str(copy)))
