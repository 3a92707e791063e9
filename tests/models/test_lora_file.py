"""`--lora FILE[:SCALE]`: what it means, and what is refused before a model is loaded."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcr_export.errors import PcrExportError
from pcr_export.models.lora_file import LoraFile, parse_lora, parse_loras
from pcr_export.recipe import Lora


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1, 4), "unet.conv_in.lora_B.weight": torch.ones(8, 1)}, path)
    return path


@pytest.mark.parametrize(("end", "scale"), [("", 1.0), (":0.8", 0.8), (":-1", -1.0), (":1e-2", 0.01)])
def test_file_and_scale(file: Path, end: str, scale: float) -> None:
    assert parse_lora(f"{file}{end}") == LoraFile(file, scale)


def test_a_colon_in_the_name(file: Path) -> None:
    other = file.rename(file.with_name("a:b.safetensors"))
    assert parse_lora(str(other)) == LoraFile(other, 1.0)
    assert parse_lora(f"{other}:2") == LoraFile(other, 2.0)


def test_the_recipe_holds_no_path(file: Path) -> None:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert LoraFile(file, 0.5).facts() == Lora(name="style.safetensors", sha256=sha256, scale=0.5)


def test_a_link_is_its_file_by_its_own_name(file: Path) -> None:
    """In the hub's cache a file is a link to a blob whose name tells nothing."""
    blob = file.rename(file.with_name("0123abcd"))
    file.symlink_to(blob.name)
    assert parse_lora(f"{file}:0.5").facts().name == "style.safetensors"


@pytest.mark.parametrize("name", ["a:b.safetensors", "0.5:1.safetensors", "sti'l #1 é.safetensors", "x.SAFETENSORS"])
def test_odd_names(file: Path, name: str) -> None:
    other = file.rename(file.with_name(name))
    assert parse_lora(str(other)) == LoraFile(other, 1.0)
    assert parse_lora(f"{other}:-0.5") == LoraFile(other, -0.5)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scales_are_finite(file: Path, scale: str) -> None:
    with pytest.raises(PcrExportError, match=r"has no finite scale: write FILE or FILE:SCALE"):
        parse_lora(f"{file}:{scale}")


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.safetensors:0.5", "", "."])
def test_no_file(name: str) -> None:
    with pytest.raises(PcrExportError, match="is no file: write FILE or FILE:SCALE"):
        parse_lora(name)


def test_damaged_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(PcrExportError, match=r"is damaged .*: fetch it again") as caught:
        parse_lora(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".PTH", ""])
def test_what_is_no_safetensors_file_is_not_read(file: Path, suffix: str) -> None:
    with pytest.raises(PcrExportError, match="is no safetensors file and is not read: convert it"):
        parse_lora(str(file.rename(file.with_name(f"old{suffix}"))))


def test_pickles_are_refused_with_the_command_that_converts_them(file: Path) -> None:
    pickled = file.with_name("old.bin")
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 3).T, "unet.conv_in.lora_B.weight": torch.ones(8, 3)}
    torch.save(tensors, pickled)
    with pytest.raises(PcrExportError, match="is no safetensors file and is not read: convert it") as caught:
        parse_lora(f"{pickled}:0.5")
    assert "\n" not in str(caught.value)
    command = shlex.split(str(caught.value)[str(caught.value).index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    converted = parse_lora(str(pickled.with_suffix(".safetensors")))
    assert load_file(converted.path)["unet.conv_in.lora_A.weight"].shape == (3, 2)


def test_without_peft(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])  # nothing more can be found
    assert parse_loras(None) == ()
    with pytest.raises(PcrExportError, match=r"--lora needs peft: pip install 'pcr-export\[lora\]'"):
        parse_loras([str(file)])
