"""`verify`: a whole folder passes, and every way in which one can differ ends it with one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_tiny_sdxl import export_from

from pcr_export.cli import main
from pcr_export.deploy.run import generate
from pcr_export.deploy.verify import verify_folder
from pcr_export.errors import PcrExportError
from pcr_export.manifest import read_manifest, write_manifest
from pcr_export.qdiffbench.images import write_png
from pcr_export.recipe import read_recipe


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy", symlinks=True))


def run_command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcr_export", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(folder: Path, *, paint: bool = False) -> str:
    """The one line of a folder that does not pass."""
    with pytest.raises(PcrExportError) as stop:
        list(verify_folder(folder, paint=paint))
    assert stop.value.exit_code == 3
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_a_whole_folder_passes_a_line_per_check(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pcr-export", "verify", str(exported)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "files"],
        *[["ok", "signature"]] * 6,
        ["ok", "engine"],
        ["ok", "image"],
    ]
    assert "images/int8/00000.png painted again: PSNR" in lines[-1]


def test_a_damaged_file_ends_it_with_one_line(copy: Path) -> None:
    data = bytearray((copy / "unet" / "model.onnx_data").read_bytes())
    data[-1] ^= 128
    (copy / "unet" / "model.onnx_data").write_bytes(data)
    ran = run_command("verify", copy)
    assert ran.returncode == 3
    (line,) = ran.stderr.strip().splitlines()
    assert "unet/model.onnx_data has sha256" in line
    assert line.endswith("copy the folder again from where it is whole, or export it again")


def test_every_file_that_deployment_reads_is_held(copy: Path) -> None:
    names = set(read_manifest(copy).files)
    left_out = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} - names
    assert {name for name in left_out if not name.startswith((".stages/", "images/"))} == {
        "manifest.json",
        "report.html",
        "unet/tensorrt/build_commands.txt",
    }
    for name in names:
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert f"{name} has sha256" in refused(copy)
        (copy / name).write_bytes(good)


def edited(path: Path, edit) -> None:
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)


def rename_input(graph: onnx.GraphProto) -> None:
    graph.input[0].name = "latents"


def wrong_type(graph: onnx.GraphProto) -> None:
    graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64


def wrong_rank(graph: onnx.GraphProto) -> None:
    graph.input[2].type.tensor_type.shape.dim.add().dim_value = 1


def wrong_channels(graph: onnx.GraphProto) -> None:
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8


def one_more_input(graph: onnx.GraphProto) -> None:
    graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("strength", onnx.TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (rename_input, "an input latents, which nothing feeds"),
        (wrong_type, "input timestep as INT64 [], where FLOAT [] is needed"),
        (
            wrong_rank,
            "input encoder_hidden_states as FLOAT [batch, tokens, 32, 1], where FLOAT [any, any, 32] is needed",
        ),
        (
            wrong_channels,
            "output out_sample as FLOAT [batch, 8, height, width], where FLOAT [any, 4, any, any] is needed",
        ),
        (one_more_input, "an input strength, which nothing feeds"),
    ],
)
@pytest.mark.parametrize("file", ["unet/model.onnx", "unet/tensorrt/model.onnx"])
def test_signatures_that_the_pipeline_can_not_use(edit, expected: str, file: str, copy: Path) -> None:
    edited(copy / file, edit)
    write_manifest(copy)
    assert f"{file} has {expected}: export the folder again" in refused(copy)


def test_a_text_encoder_without_a_hidden_state(copy: Path) -> None:
    edited(copy / "text_encoder" / "model.onnx", lambda graph: graph.output.pop())
    write_manifest(copy)
    assert "text_encoder/model.onnx has no output hidden_states.1" in refused(copy)


def test_an_engine_of_another_graph(copy: Path) -> None:
    edited(copy / "unet" / "tensorrt" / "model.onnx", lambda graph: setattr(graph, "doc_string", "another"))
    write_manifest(copy)
    assert "sm89.engine is stale: built for ONNX file" in refused(copy)


def test_another_image_is_refused_and_rounding_is_not(copy: Path) -> None:
    image = read_manifest(copy).image
    assert image is not None
    png = copy / image.file
    pixels = generate(copy, image.prompt, seed=image.seed)
    rng = np.random.default_rng(0)
    for noise, passes in ((1, True), (40, False)):
        write_png(
            (pixels.astype(int) + rng.integers(-noise, noise + 1, pixels.shape)).clip(0, 255).astype(np.uint8), png
        )
        write_manifest(copy, image)
        if passes:
            assert "painted again: PSNR" in list(verify_folder(copy))[-1][1]
        else:
            assert "paints another image than images/int8/00000.png from the same prompt" in refused(copy, paint=True)


def test_without_the_image(copy: Path) -> None:
    assert list(verify_folder(copy, paint=False))[-1] == ("image", "not painted: --no-image")
    write_manifest(copy)
    assert "none is stored" in list(verify_folder(copy))[-1][1]


def test_folders_that_are_no_exports(tmp_path: Path) -> None:
    for folder, expected in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "is no exported folder")):
        with pytest.raises(PcrExportError, match=expected):
            next(verify_folder(folder))


@pytest.mark.slow
def test_the_same_export_again_ends_with_the_same_manifest_and_a_stripped_one_says_so(
    exported: Path, copy: Path
) -> None:
    before, source = (exported / "manifest.json").read_bytes(), Path(read_recipe(exported).model)
    copy = copy.rename(copy.with_name(exported.name))
    export_from(source, copy.parent)
    assert (copy / "manifest.json").read_bytes() == before
    export_from(source, copy.parent, "--strip-encoders")
    assert not [path for path in copy.iterdir() if path.name.startswith(("text_encoder", "tokenizer", "vae"))]
    assert list(verify_folder(copy))[-1] == ("image", "not painted: the folder was exported with --strip-encoders")
    assert (copy / "unet" / "model.onnx_data").read_bytes() == (exported / "unet" / "model.onnx_data").read_bytes()
    export_from(source, copy.parent)
    assert (copy / "manifest.json").read_bytes() == before
    assert "painted again" in list(verify_folder(copy))[-1][1]
