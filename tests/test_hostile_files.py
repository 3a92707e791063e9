"""Files that are meant to harm: each reader ends in one line, at once, and no library is told to fetch or run code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from models.tiny_pipelines import tiny_sd

from pcr_export.cli import main
from pcr_export.deploy.run import load_exported_model
from pcr_export.deploy.signatures import check_signatures
from pcr_export.engines.onnx_files import onnx_sha256
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.manifest import write_manifest
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_float_pipeline
from pcr_export.models.schedulers import check_walk, read_scheduler
from pcr_export.prompts import read_prompts
from pcr_export.qdiffbench.images import read_images, write_png
from pcr_export.qdiffbench.scores import _read_real_images
from pcr_export.recipe import read_recipe
from pcr_export.report import read_report
from pcr_export.step_scales import read_step_scales

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
text (int64[batch, tokens] input_ids) => (float[batch, tokens, 8] last_hidden_state) {
    last_hidden_state = ConstantOfShape (input_ids)
}
"""
SOON = 20  # seconds on a busy machine; each of these had no end


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(autouse=True)
def ends_soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def replace_by(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10 * 2**30)  # of holes


def load(path: Path) -> object:
    return load_float_pipeline(resolve(str(path.parents[1])))


def first_images(path: Path) -> object:
    return read_images(path.parent, 0, 1)


def run_onnx(path: Path) -> None:
    with OnnxRuntimeEngine(path.with_name("model.onnx"), threads=1):
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "model/model_index.json": lambda path: resolve(str(path.parent)),
    "model/unet/config.json": load,
    "model/text_encoder/config.json": load,
    "model/scheduler/scheduler_config.json": load,
    "model/tokenizer/tokenizer.json": load,
    "model/tokenizer/tokenizer_config.json": load,
    "recipe.json": lambda path: read_recipe(path.parent),
    "report.json": lambda path: read_report(path.parent),
    "step_scales.safetensors": read_step_scales,
    "prompts.jsonl": read_prompts,
    "images/00000.png": first_images,
    "real.png": lambda path: list(_read_real_images([path], None)),
    "part/model.onnx": onnx_sha256,
}


@pytest.mark.parametrize("name", READERS)
def test_what_has_no_end_is_not_read(name: str, model: Path) -> None:
    path = model.parent / name
    for kind in ("pipe", "device", "10 GB of holes"):
        replace_by(path, kind)
        with pytest.raises(PcrExportError) as refused:
            READERS[name](path)
        assert name.rpartition("/")[2] in str(refused.value), kind
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_a_pipe(name: str, model: Path) -> None:
    replace_by(model / name, "pipe")
    with pytest.raises(PcrExportError, match="is a pipe"):
        load(model / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_graph_beside_a_pipe(name: str, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "model.onnx")
    replace_by(tmp_path / name, "pipe")
    with pytest.raises(PcrExportError, match="is a pipe"):
        run_onnx(tmp_path / name)


def test_prompts_from_a_device(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(PcrExportError, match="is a pipe, a socket or a device"):
        read_prompts(Path("/dev/zero"))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000)])
def test_an_image_of_too_many_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(png_of(*size))
    for read in (first_images, lambda path: list(_read_real_images([path], None))):
        with pytest.raises(PcrExportError, match=r"00000\.png .*(pixels|can't be read)"):
            read(path)


def test_an_image_that_another_program_would_draw(tmp_path: Path) -> None:
    """Pillow hands PostScript to ghostscript, whatever the file's name."""
    (tmp_path / "00000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(PcrExportError, match="can't be read"):
        first_images(tmp_path / "00000.png")


def test_images_of_two_sizes(tmp_path: Path) -> None:
    for index in range(2):
        write_png(np.zeros((8 + 8 * index, 8, 3), np.uint8), tmp_path / f"{index:05d}.png")
    with pytest.raises(PcrExportError, match="another size"):
        read_images(tmp_path, 0, 2)


COUNTS = {
    "unet/config.json": [
        {"layers_per_block": 10**9},
        {"layers_per_block": [10**9, 1]},
        {"transformer_layers_per_block": 10**9},
        {"block_out_channels": [32, 10**9]},
        {"block_out_channels": [32] * 10**4},
        {"cross_attention_dim": 10**9},
        {"sample_size": 10**9},
        {"addition_time_embed_dim": -1},
    ],
    "vae/config.json": [{"layers_per_block": 10**9}, {"block_out_channels": [10**9, 4]}, {"latents_mean": "x"}],
    "text_encoder/config.json": [
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"vocab_size": 10**12},
        {"max_position_embeddings": 10**9},
        {"hidden_size": True},
    ],
    "tokenizer/tokenizer_config.json": [
        {"model_max_length": 10**9},
        {"model_max_length": -1},
        {"pad_token": []},
        {"added_tokens_decoder": {"x": 1}},
    ],
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_out_of_every_range(name: str, model: Path) -> None:
    good = (model / name).read_text("utf-8")
    for change in COUNTS[name]:
        (model / name).write_text(good, "utf-8")
        edit(model / name, **change)
        with pytest.raises(PcrExportError) as refused:
            load(model / name)
        assert "\n" not in str(refused.value), change


def test_layers_without_end_of_an_exported_encoder(tmp_path: Path) -> None:
    part = tmp_path / "text_encoder"
    part.mkdir()
    (tmp_path / "unet").mkdir()
    for folder in (part, tmp_path / "unet"):
        onnx.save(onnx.parser.parse_model(GRAPH), folder / "model.onnx")
    (part / "config.json").write_text(json.dumps({"num_hidden_layers": 10**9, "architectures": ["CLIPTextModel"]}))
    with pytest.raises(PcrExportError, match=r"num_hidden_layers"):
        check_signatures(tmp_path)


SCHEDULERS = [
    {"num_train_timesteps": 10**9},
    {"num_train_timesteps": 0},
    {"num_train_timesteps": "many"},
    {"num_train_timesteps": 2.5},
    {"num_train_timesteps": None},
    {"trained_betas": [0.1]},
    {"trained_betas": [0.1] * 200_000},
    {"trained_betas": ["x"] * 1000},
    {"trained_betas": {}},
    {"beta_start": "x"},
    {"beta_start": None},
    {"beta_start": -5},
    {"beta_end": 10**30},
    {"beta_end": []},
    {"beta_schedule": 7},
    {"beta_schedule": []},
    {"beta_schedule": "none"},
    {"prediction_type": 7},
    {"steps_offset": 10**9},
    {"steps_offset": "1"},
    {"timestep_spacing": []},
    {"timestep_spacing": "none"},
    {"set_alpha_to_one": "x"},
    {"_class_name": []},
    {"_class_name": "logging"},
    {"beta_start": {"a": {}}},
]


def test_a_scheduler_that_can_not_be(model: Path) -> None:
    """It walks, or a line says why not, before any network is read."""
    path = model / "scheduler" / "scheduler_config.json"
    good = path.read_text("utf-8")
    shutil.copytree(model / "vae", model / "vae_decoder")
    for change in SCHEDULERS:
        path.write_text(good, "utf-8")
        edit(path, **change)
        write_manifest(model)  # as whoever can change a file can
        with pytest.raises(PcrExportError) as refused:
            load_exported_model(model)
        assert "\n" not in str(refused.value), change


@pytest.mark.parametrize("text", ['{"beta_start": NaN}', '{"solver_order": 1000000000}', '{"beta_end": 1e999}'])
def test_numbers_that_no_scheduler_has(text: str, model: Path) -> None:
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    (model / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(PcrExportError):
        check_walk(read_scheduler(model), 4, type(load_float_pipeline))


def test_infinity_is_a_number_of_schedulers(model: Path) -> None:
    """diffusers writes it: lambda_min_clipped of DPM-Solver."""
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit(model / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"))
    assert read_scheduler(model).config.lambda_min_clipped == float("-inf")


EVENTS: list[str] = []  # of what Python tells while `watched` is set: connections, pickles, files that are imported
WATCHED: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if WATCHED and event in ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "exec", "subprocess.Popen"):
        if event != "exec":
            EVENTS.append(f"{event} {arguments[1:]}")
        elif WATCHED[0] in str(getattr(arguments[0], "co_filename", "")):
            EVENTS.append(f"{event} {arguments[0].co_filename}")


class Loud:
    """A pickle that would be noticed."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "evil/base", "auto_mapping": None, "task_type": None}
HOOKS: dict[str, Callable[[Path], object]] = {
    "attention kernels": lambda model: edit(
        model / "text_encoder/config.json",
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
        _attn_implementation_internal="evil/kernel",
        _experts_implementation="evil/kernel",
    ),
    "code of a text encoder": lambda model: (
        edit(model / "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}, trust_remote_code=True),
        (model / "text_encoder" / "evil.py").write_text("raise SystemExit(9)"),
    ),
    "an adapter": lambda model: (model / "text_encoder/adapter_config.json").write_text(json.dumps(ADAPTER)),
    "a distributed checkpoint": lambda model: [
        (model / "text_encoder" / name).write_bytes(pickle.dumps(Loud()))
        for name in (".metadata", "shard-00000-model-00001-of-00001.safetensors")
    ],
    "a name of a type": lambda model: edit(model / "text_encoder/config.json", dtype="load", torch_dtype="load"),
    "code of a tokenizer": lambda model: (
        edit(
            model / "tokenizer/tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.Evil", None]},
            tokenizer_class="Evil",
            processor_class="Evil",
            name_or_path="evil/tokenizer",
            vocab="/etc/passwd",
            merges="/etc/passwd",
            gguf_file="evil.gguf",
            fast_tokenizer_files=["tokenizer.9.json"],
            is_local=False,
        ),
        (model / "tokenizer" / "evil.py").write_text("raise SystemExit(9)"),
        (model / "tokenizer" / "tokenizer.model").write_bytes(pickle.dumps(Loud())),
    ),
    "code of a UNet": lambda model: (
        edit(
            model / "unet/config.json",
            auto_map={"AutoModel": "evil.Evil"},
            _attention_backend="evil/kernel",
            attn_processor="evil",
            custom_pipeline="evil",
        ),
        (model / "unet" / "evil.py").write_text("raise SystemExit(9)"),
    ),
    "code of a scheduler": lambda model: (
        edit(model / "scheduler/scheduler_config.json", auto_map={"AutoScheduler": "evil.Evil"}, _class_name="evil"),
        (model / "scheduler" / "evil.py").write_text("raise SystemExit(9)"),
    ),
    "a pipeline of its own": lambda model: (
        edit(model / "model_index.json", _custom_pipeline="evil", custom_pipeline="evil", auto_map={"x": "evil.Evil"}),
        (model / "pipeline.py").write_text("raise SystemExit(9)"),
        (model / "evil.py").write_text("raise SystemExit(9)"),
    ),
}


@pytest.mark.parametrize("hook", ["all of them", *(pytest.param(name, marks=pytest.mark.slow) for name in HOOKS)])
def test_nothing_is_fetched_and_no_code_is_run(hook: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook is dropped: the weights are those of the folder without it."""
    monkeypatch.chdir(model.parent)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in HOOKS if hook == "all of them" else [hook]:
        HOOKS[name](model)
    sys.addaudithook(_watch)
    EVENTS.clear()
    WATCHED.append(str(model))
    try:
        pipeline = load_float_pipeline(resolve(str(model)))
    finally:
        WATCHED.clear()
    assert EVENTS == []
    assert not Path("unpickled").exists()
    assert pipeline.text_encoder.config._attn_implementation in ("sdpa", "eager")
    assert pipeline.tokenizer("a red cat").input_ids[0] == pipeline.tokenizer.bos_token_id


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_quantized_already(part: str, model: Path) -> None:
    edit(model / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(PcrExportError, match="quantization_config, for its weights are quantized already"):
        load(model / part / "config.json")


@pytest.mark.parametrize("name", ["AutoTokenizer", "T5Tokenizer", "pipeline", "os"])
def test_a_tokenizer_of_another_class(name: str, model: Path) -> None:
    edit(model / "model_index.json", tokenizer=["transformers", name])
    with pytest.raises(PcrExportError, match="only CLIPTokenizer"):
        load(model / "tokenizer" / "x")


def test_a_token_without_a_vector(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"][0]["id"] = 5000
    content["model"]["vocab"][content["added_tokens"][0]["content"]] = 5000
    path.write_text(json.dumps(content))
    with pytest.raises(PcrExportError, match=r"has the token|readable tokenizer"):
        load(path)


def test_the_command_line_tells_one_line(model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    replace_by(model / "report.json", "pipe")
    write_manifest(model)
    monkeypatch.setattr(sys, "argv", ["pcr-export", "inspect", str(model)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "report.json is a pipe" in line
