"""Paths that people give as MODEL and that are no pipeline folder: taken where it is clear what is meant, or what to do in one line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from hub_cache import REVISION, cache_of
from safetensors.torch import save_file

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve

UNET = "model.diffusion_model.input_blocks.0.0.weight"
SD = {UNET: (320, 4, 3, 3), "cond_stage_model.transformer.text_model.final_layer_norm.bias": (8,)}
SDXL = {UNET: (320, 4, 3, 3), "conditioner.embedders.0.x": (8,), "conditioner.embedders.1.model.ln_final.bias": (8,)}


def pipeline(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), "utf-8")
    return folder


def weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def refused(model: Path | str) -> str:
    with pytest.raises(PcrExportError) as caught:
        resolve(str(model))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_repository_of_the_cache_is_its_snapshot(tmp_path: Path) -> None:
    snapshot = cache_of(tmp_path / "hub", "org/tiny-model", pipeline(tmp_path / "source"))
    repository = snapshot.parents[1]
    for given in (repository, repository / "snapshots", snapshot):
        assert (resolve(str(given)).source, resolve(str(given)).name) == (str(snapshot), "tiny-model")
    (repository / "refs" / "main").unlink()
    assert resolve(str(repository)).source == str(snapshot)


def test_the_snapshot_of_main_among_several(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "source")
    other = cache_of(tmp_path / "hub", "org/tiny", source, revision="f" * 40, branch="next")
    snapshot = cache_of(tmp_path / "hub", "org/tiny", source)
    assert resolve(str(snapshot.parents[1])).source == str(snapshot)
    (snapshot.parents[1] / "refs" / "main").unlink()
    assert f"has 2 snapshots: give one of {snapshot}, {other}" in refused(snapshot.parents[1])


def test_a_link_to_a_snapshot(tmp_path: Path) -> None:
    snapshot = cache_of(tmp_path / "hub", "org/tiny", pipeline(tmp_path / "source"))
    (tmp_path / "mine").symlink_to(snapshot)
    assert (resolve(str(tmp_path / "mine")).source, resolve(str(tmp_path / "mine")).name) == (
        str(tmp_path / "mine"),
        "tiny",
    )


def test_a_cache_names_its_repositories(tmp_path: Path) -> None:
    for name in ("org/one", "org/two"):
        cache_of(tmp_path / "home" / "hub", name, pipeline(tmp_path / name))
    for given in (tmp_path / "home", tmp_path / "home" / "hub"):
        assert re.search(r"is a cache of the hub, give a repository of it .*: org/one, org/two$", refused(given))


def test_a_repository_without_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    weights(tmp_path / "source" / "model.safetensors", SD)
    snapshot = cache_of(tmp_path / "hub", "org/single", tmp_path / "source")
    assert "holds no snapshot with model_index.json" in refused(snapshot.parents[1])
    assert REVISION in refused(snapshot)
    assert "StableDiffusionPipeline.from_single_file" in refused(snapshot)


def test_a_folder_above_or_below_the_pipeline(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "models" / "mine")
    (folder / "unet").mkdir()
    assert refused(tmp_path / "models").endswith(f"give {folder}")
    assert refused(folder / "unet").endswith(f"is a part of a pipeline, give {folder}")


@pytest.mark.parametrize(("shapes", "name"), [(SD, "StableDiffusionPipeline"), (SDXL, "StableDiffusionXLPipeline")])
@pytest.mark.parametrize("file", ["model.safetensors", "my 'model' v1.5 é.safetensors"])
def test_a_single_file_is_told_the_line_that_converts_it(
    shapes: dict[str, tuple[int, ...]], name: str, file: str, tmp_path: Path
) -> None:
    path = weights(tmp_path / file, shapes)
    for given in (path, tmp_path):  # a folder that holds it alone, too
        command, then = re.split(", then ", refused(given)[refused(given).index("python -c") :])
        words = shlex.split(command)
        assert words[3:] == [str(path), str(path.with_suffix(""))]
        assert then == f"`pcr-export {shlex.quote(str(path.with_suffix('')))}`"
        assert f"diffusers.{name}.from_single_file(" in words[2]
        compile(words[2], "command", "exec")


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({**SD, UNET: (320, 9, 3, 3)}, "a UNet that reads 9 channels, where text-to-image models read 4"),
        ({UNET: (320, 4, 3, 3)}, "holds the weights of one part alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "holds the weights of one part alone"),
        ({"double_blocks.0.img_attn.proj.weight": (8, 8)}, "holds no model that is known here"),
        ({"lora_unet_x.lora_down.weight": (4, 8)}, "is a LoRA: give the model that it was trained for, and --lora"),
        ({"unet.x.lora_A.weight": (4, 8)}, "is a LoRA"),
        ({"lora_unet_x.hada_w1_a": (4, 8)}, "is a LoRA"),
    ],
)
def test_other_files_are_told_what_they_are(shapes: dict[str, tuple[int, ...]], expected: str, tmp_path: Path) -> None:
    assert expected in refused(weights(tmp_path / "some.safetensors", shapes))


def test_files_that_are_not_read(tmp_path: Path) -> None:
    for name in ("old.ckpt", "cut.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"PK\3\4")
    assert re.search(
        r"is a pickled file, .* where you trust it, python -c .*XLPipeline for SDXL", refused(tmp_path / "old.ckpt")
    )
    assert "is damaged" in refused(tmp_path / "cut.safetensors")
    assert "is no folder" in refused(tmp_path / "notes.txt")
    assert "cut.safetensors, old.ckpt: give one of them" in refused(tmp_path)
    assert "is no folder" in refused("models/gone.safetensors")  # no hub id
