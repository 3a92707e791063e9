"""triton/ of an exported folder: links that move with it, and a check that finds what was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from deploy.conftest import ExportedFolder

from pcr_export.deploy.triton_config import read_config
from pcr_export.deploy.triton_repository import check_triton_repository, write_triton_repository
from pcr_export.errors import PcrExportError

NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder")


@pytest.fixture
def folder(sdxl: ExportedFolder, tmp_path: Path) -> Path:
    folder = shutil.copytree(sdxl.folder, tmp_path / "exported")
    write_triton_repository(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sdxl_has_five_models_and_nothing_is_copied(folder: Path) -> None:
    repository = folder / "triton"
    assert sorted(path.name for path in repository.iterdir()) == sorted([*NETWORKS, "pipeline"])
    for name in NETWORKS:
        assert (repository / name / "1" / "model.onnx").readlink() == Path("..", "..", "..", name)
        assert (repository / name / "config.pbtxt").is_file()
    assert (repository / "pipeline" / "1" / "model.py").is_file()


def test_sd_has_one_text_encoder(lcm: ExportedFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(lcm.folder, tmp_path / "exported")
    write_triton_repository(folder)
    assert not (folder / "triton" / "text_encoder_2").exists()
    check_triton_repository(folder)


@pytest.mark.parametrize("links", [True, False])
def test_a_copied_folder_serves(folder: Path, tmp_path: Path, links: bool) -> None:
    """With links as links, and with links followed, as some tools copy; the original is gone."""
    moved = Path(shutil.copytree(folder, tmp_path / "moved", symlinks=links))
    shutil.rmtree(folder)
    check_triton_repository(moved)
    for name in NETWORKS:
        file = moved / "triton" / name / "1" / "model.onnx" / "model.onnx"
        assert onnxruntime.InferenceSession(file).get_inputs()  # its external data is found
    write_triton_repository(moved)
    assert (moved / "triton" / "unet" / "1" / "model.onnx").is_symlink()


def test_written_again_the_same(folder: Path) -> None:
    before = files(folder)
    write_triton_repository(folder)
    assert files(folder) == before


def test_a_changed_config_is_refused(folder: Path) -> None:
    path = folder / "triton" / "unet" / "config.pbtxt"
    path.write_text(path.read_text("utf-8").replace("[-1, 4, -1, -1]", "[-1, 9, -1, -1]", 1), "utf-8")
    with pytest.raises(PcrExportError, match=r"triton/unet: input sample is TYPE_FP32 \[-1, 9, .*export again"):
        check_triton_repository(folder)


def test_another_model_behind_a_config_is_refused(folder: Path) -> None:
    model = onnx.load(folder / "vae_decoder" / "model.onnx", load_external_data=False)
    model.graph.input[0].name = "latents"
    (folder / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PcrExportError, match="triton/vae_decoder: input latent_sample is TYPE_FP32"):
        check_triton_repository(folder)


def test_a_link_that_leads_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    link = folder / "triton" / "unet" / "1" / "model.onnx"
    link.unlink()
    link.symlink_to(shutil.copytree(folder / "vae_decoder", tmp_path / "elsewhere"))
    with pytest.raises(PcrExportError, match=r"triton/unet: 1/model.onnx/model.onnx is not unet/model.onnx"):
        check_triton_repository(folder)


def test_other_code_is_refused(folder: Path) -> None:
    with (folder / "triton" / "pipeline" / "1" / "model.py").open("a") as file:
        file.write("import os\n")
    with pytest.raises(PcrExportError, match=r"triton/pipeline: 1/model.py is not this version's"):
        check_triton_repository(folder)


def test_what_is_the_users_may_be_changed(folder: Path) -> None:
    path = folder / "triton" / "pipeline" / "config.pbtxt"
    text = path.read_text("utf-8").replace("max_batch_size: 8", "max_batch_size: 2")
    path.write_text(text.replace("max_queue_size: 256", "max_queue_size: 9"), "utf-8")
    assert read_config(path).max_queue_size == 9
    check_triton_repository(folder)
