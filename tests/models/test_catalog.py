"""Names, folders and hub ids; what people mistype."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import CATALOG, CatalogEntry, fill_in, own_picture_size, read_model_index, resolve


def write_index(folder: Path, class_name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}), "utf-8")
    return folder


def test_every_entry_is_complete() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.num_inference_steps
        assert entry.guidance_scale is not None
        assert entry.height == entry.width
        assert entry.is_hub_id or Path(entry.source).is_absolute()
        assert (entry.relaxed_end is None) == (entry.num_inference_steps < 10)


def test_a_catalog_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_index(tmp_path / "sdxl", "StableDiffusionPipeline")
    assert resolve("sdxl") is CATALOG["sdxl"]
    entry = resolve("./sdxl")
    assert entry.is_local
    assert not entry.is_hub_id


def test_folder_and_hub_id(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "mine", "StableDiffusionXLPipeline")
    assert resolve(str(folder)) == CatalogEntry(name="mine", source=str(folder))
    entry = resolve("org/some-model.v1")
    assert (entry.name, entry.source, entry.is_hub_id) == ("some-model.v1", "org/some-model.v1", True)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("sdx", "did you mean sdxl"),
        ("tiny_sdxl", "did you mean tiny-sdxl"),
        ("zzzzzz", "Known are tiny-sdxl, sd14, sd15, sd21, sdxl, sdxl-turbo, lcm-sdxl"),
        ("./nowhere", "holds model_index.json"),
        ("a/b/c", "holds model_index.json"),
        ("~/nowhere-at-all", "holds model_index.json"),
    ],
)
def test_unknown_model(model: str, advice: str) -> None:
    with pytest.raises(PcrExportError, match=advice) as caught:
        resolve(model)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match=r"has no model_index\.json: a pipeline folder holds"):
        resolve(str(tmp_path))


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    path.write_bytes(b"")
    with pytest.raises(PcrExportError, match="is no folder"):
        resolve(str(path))


def test_pipeline_of_another_class(tmp_path: Path) -> None:
    with pytest.raises(
        PcrExportError, match="FluxPipeline: only StableDiffusionPipeline and StableDiffusionXLPipeline"
    ):
        resolve(str(write_index(tmp_path, "FluxPipeline")))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_damaged_model_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PcrExportError, match=r"model_index\.json .*fetch or export the folder again"):
        read_model_index(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "few_steps", "expected"),
    [
        ("StableDiffusionPipeline", False, (50, 7.5, "last")),
        ("StableDiffusionXLPipeline", False, (50, 5.0, "first")),
        ("StableDiffusionXLPipeline", True, (4, 8.0, None)),
    ],
)
def test_fill_in_what_is_open(class_name: str, few_steps: bool, expected: tuple[int, float, str | None]) -> None:
    entry = fill_in(
        CatalogEntry(name="x", source="o/x"), class_name=class_name, own_size=(512, 512), few_steps=few_steps
    )
    assert (entry.num_inference_steps, entry.guidance_scale, entry.relaxed_end) == expected
    assert (entry.height, entry.width) == (512, 512)


@pytest.mark.parametrize(
    ("sample_size", "expected"),
    [(64, (512, 512)), ([64, 96], (512, 768)), ((96, 64), (768, 512)), (None, None), ("x", None)],
)
def test_own_picture_size(sample_size: object, expected: tuple[int, int] | None) -> None:
    assert own_picture_size(sample_size, 8) == expected


def test_no_size_is_told() -> None:
    entry = CatalogEntry(name="mine", source="o/mine", height=512)
    with pytest.raises(PcrExportError, match=r"mine tells no picture size .*: give --height and --width"):
        fill_in(entry, class_name="StableDiffusionPipeline", own_size=None, few_steps=False)
    filled = fill_in(replace(entry, width=768), class_name="StableDiffusionPipeline", own_size=None, few_steps=False)
    assert (filled.height, filled.width) == (512, 768)


def test_fill_in_keeps_what_is_known() -> None:
    for entry in CATALOG.values():
        assert fill_in(entry, class_name="StableDiffusionXLPipeline", own_size=(8, 8), few_steps=False) == entry


def test_catalog_imports_nothing_heavy() -> None:
    program = (
        "import sys, pcr_export.models.catalog; print([m for m in ('torch', 'diffusers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
