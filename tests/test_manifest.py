"""manifest.json: what it lists, that no changed byte passes, and that no name leads out of the folder."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.manifest import (
    NAME,
    STORED_IMAGE,
    ListedFile,
    Manifest,
    StoredImage,
    check_files,
    manifest_text,
    read_manifest,
    update_manifest,
    write_manifest,
)

DEPLOYED = (
    "images/int8/00000.png",
    "model_index.json",
    "recipe.json",
    "report.json",
    "scheduler/scheduler_config.json",
    "step_scales.safetensors",
    "text_encoder/model.onnx",
    "tokenizer_2/merges.txt",
    "triton/unet/1/model.onnx/model.onnx",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "unet/sm89.engine",
    "unet/sm89.json",
    "unet/tensorrt/model.onnx",
    "vae_decoder/model.onnx",
    "vae_encoder/model.onnx",
)
REWRITTEN = (  # by evaluate, by engines, by builders, by the next run
    ".stages/quantize.json",
    "evaluation.json",
    "evaluation/in/per_image.json",
    "images/float/00000.png",
    "images/int8/00001.png",
    "report.html",
    "unet/model.onnx.tmp",
    "unet/sm89.jit",
    "unet/tensorrt/build_commands.txt",
    "unet/tensorrt/sm89.timing_cache",
)
IMAGE = StoredImage(file=STORED_IMAGE, prompt="a réd circle", seed=7, min_psnr_db=40.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (*DEPLOYED, *REWRITTEN):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the content of {name}")
    write_manifest(tmp_path / "folder", IMAGE)
    return tmp_path / "folder"


def check(folder: Path) -> None:
    check_files(folder, read_manifest(folder))


def forge(folder: Path, *names: str, image: StoredImage | None = None) -> None:
    """A manifest that says so itself: whoever writes a folder can write its manifest."""
    files = {name: ListedFile(sha256="0" * 64, bytes=1) for name in names}
    (folder / NAME).write_text(manifest_text(Manifest(files=files, image=image)))


def test_it_lists_what_deployment_reads(folder):
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == sorted(DEPLOYED)
    assert manifest.image == IMAGE
    assert manifest.files["recipe.json"].bytes == len("the content of recipe.json")
    check(folder)


def test_same_files_same_bytes(folder):
    before = (folder / NAME).read_bytes()
    write_manifest(folder, IMAGE)
    assert (folder / NAME).read_bytes() == before


def test_what_is_rewritten_or_put_beside_is_no_damage(folder):
    for name in (*REWRITTEN, "unet/sm120.engine", "notes.txt", "tokenizer/extra.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")
    check(folder)


def test_without_an_image_of_this_export_none_is_listed(folder):
    manifest = write_manifest(folder)
    assert manifest.image is None
    assert STORED_IMAGE not in manifest.files  # it is an older export's


@pytest.mark.parametrize("name", DEPLOYED)
def test_one_bit_of_a_file(name, folder):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(PcrExportError, match=rf"{name} has sha256 \w+, not \w+: copy the folder again") as refused:
        check(folder)
    assert refused.value.exit_code == 3


def test_every_byte_of_the_manifest_itself(folder):
    good = (folder / NAME).read_bytes()
    for position in range(len(good)):
        (folder / NAME).write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(PcrExportError, match=r"manifest.json"):
            check(folder)
    for text in (good[:-1], good + b"\n", good[:100], b"", b"[]", b"\xff", b"[" * 100_000):
        (folder / NAME).write_bytes(text)
        with pytest.raises(PcrExportError, match="copy the folder again"):
            check(folder)


def test_missing_and_truncated_files_are_named_together(folder):
    (folder / "recipe.json").unlink()
    (folder / "unet/model.onnx_data").write_bytes(b"the")
    with pytest.raises(
        PcrExportError, match=r"recipe.json is missing; unet/model.onnx_data has 3 bytes, not 35: copy the folder again"
    ):
        check(folder)
    for name in DEPLOYED[:5]:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(PcrExportError, match=r"and 3 more"):
        check(folder)


def test_an_export_that_did_not_end(folder):
    (folder / NAME).unlink()
    with pytest.raises(
        PcrExportError, match=r"this export is not finished \(it has no manifest.json\): run the export again"
    ):
        check(folder)


def test_another_format(folder):
    content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(PcrExportError, match="has format 2, this version reads 1"):
        check(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "unet/../../secret", "/etc/passwd", "..", "", "C:/secret", "..\\secret", "a\\b", "a\0b"]
)
def test_names_that_lead_outside_are_refused_unread(name, folder):
    (folder.parent / "secret").write_text("x")
    forge(folder, name)
    with pytest.raises(PcrExportError, match="lies outside the folder"):
        read_manifest(folder)
    forge(folder, image=replace(IMAGE, file=name))
    with pytest.raises(PcrExportError, match="lies outside the folder"):
        read_manifest(folder)


@pytest.mark.parametrize("link", ["recipe.json", "unet"])
def test_a_link_counts_as_its_file(link, folder):
    """As in the hub's cache, or where weights lie on another disk; its bytes are held against the manifest all the same."""
    elsewhere = (folder / link).rename(folder.parent / "elsewhere")
    (folder / link).symlink_to(os.path.relpath(elsewhere, folder))
    check(folder)
    before = (folder / NAME).read_bytes()
    write_manifest(folder, IMAGE)
    assert (folder / NAME).read_bytes() == before
    file = elsewhere if elsewhere.is_file() else next(path for path in sorted(elsewhere.iterdir()) if path.is_file())
    file.write_text("other bytes")
    with pytest.raises(PcrExportError, match=link):
        check(folder)


@pytest.mark.parametrize("change", [{"seed": "7"}, {"seed": True}, {"prompt": None}, {"min_psnr_db": 40}, {"more": 1}])
def test_an_image_of_another_kind_is_refused(change, folder):
    content = json.loads((folder / NAME).read_text())
    content["image"].update(change)
    (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")
    with pytest.raises(PcrExportError, match=r"is damaged \(TypeError\)"):
        read_manifest(folder)


def test_a_file_that_a_tool_of_this_package_rewrote_is_entered_anew(folder):
    path = folder / "unet" / "sm89.json"
    path.write_text("it ran")
    with pytest.raises(PcrExportError, match=r"unet/sm89.json has 6 bytes"):
        check(folder)
    update_manifest(folder, path)
    check(folder)
    assert read_manifest(folder).image == IMAGE
    (folder / NAME).unlink()
    update_manifest(folder, path)
    assert not (folder / NAME).exists()
