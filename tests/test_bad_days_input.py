"""Damaged files of every format that is read, and settings that make no sense: one line that says what to do, nothing else."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from class_conditional import class_conditional_denoiser
from engines.small_record import small_record
from models.tiny_pipelines import tiny_sd
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from test_export import float_graph

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.state import CalibrationState, CallRecord
from pcr_export.calibrate.weights.block_inputs import read_block_call
from pcr_export.calibrate.weights.rounding import LearnedRounding, write_rounded
from pcr_export.cli import main
from pcr_export.engines.engine_record import read_engine_record, write_engine_record
from pcr_export.engines.onnx_files import onnx_sha256
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.graph.quantize import write_half_onnx
from pcr_export.models.catalog import resolve
from pcr_export.models.check_folder import check_folder
from pcr_export.models.load import load_model
from pcr_export.prompts import read_prompts
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.images import read_images, write_png
from pcr_export.recipe import read_recipe
from pcr_export.stages import Stages
from pcr_export.step_scales import read_step_scales
from pcr_export.study_table import StudyRequest, run_study

DEEP = b"[" * 100_000


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


# how a file is damaged: its bytes -> others; None: the file is gone, or a folder stands in its place
DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "gone": None,
    "a folder": None,
    "empty": lambda data: b"",
    "cut at a third": lambda data: data[: len(data) // 3],
    "first byte flipped": lambda data: flipped(data, 0),
    "ninth byte flipped": lambda data: flipped(data, 8),
    "no text": lambda data: b"\xff\xfe\x00\x80" * 20,
    "nested too deep": lambda data: DEEP,
}
JSON_DAMAGES: dict[str, Callable[[dict], object]] = {
    "a list": lambda content: [content],
    "no field": lambda content: {},
    "every field null": lambda content: dict.fromkeys(content),
    "every field a list": lambda content: {name: [] for name in content},
    "every field a text": lambda content: dict.fromkeys(content, "../x"),
    "numbers as texts": lambda content: {name: str(x) if type(x) in (int, float) else x for name, x in content.items()},
    "another version": lambda content: {**content, "format": 99, "format_version": 99, "of_tomorrow": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of each format: an exported denoiser, a pipeline, and what else is read."""
    folder = tmp_path_factory.mktemp("whole")
    export_denoiser(toy_job(folder / "toy"))
    tiny_sd(folder / "model")
    write_others(folder)
    return folder


def toy_job(folder: Path) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)
    return Job(
        denoiser=class_conditional_denoiser(),
        recipe=recipe,
        conditions=[0, 1, 2],
        folder=folder,
        float_graph=float_graph,
    )


def write_others(folder: Path) -> None:
    write_rounded({"a": (np.ones((2, 3), np.int8), np.ones(2, np.float32))}, folder / "learned/block_00000.safetensors")
    state = CalibrationState(folder / "calls", "key")
    state.write(0, CallRecord([torch.zeros(1, 3)], {"a": Quantizer(1.0, 128)}))
    save_tensors(
        {"a|0": torch.zeros(2, 3)}, folder / "learned" / "call_00000.safetensors", {"plain": json.dumps({"a": {}})}
    )
    for kind in ("float", "int8"):
        (folder / "toy" / "images" / kind).mkdir(parents=True)
        for index in range(2):
            write_png(np.full((16, 16, 3), 9 * index, np.uint8), folder / "toy" / "images" / kind / f"{index:05d}.png")
    per_image = {"prompts": ["a", "b"], "psnr_db": [20.0, 21.0], "ssim": [0.5, 0.6], "lpips": []}
    (folder / "toy" / "images" / "per_image.json").write_text(json.dumps(per_image))
    scores = {"psnr_db": 20.5, "ssim": 0.55, "n_images": 2, "protocol": {"extractor": None}, "warning": None}
    names = {"fp32": "images/float", "artifact": "images/int8", "per_image": "images/per_image.json"}
    domain = {"name": "own", "prompts_file": "p.txt", "prompts_sha256": "0" * 64, "n_images": 2, **names}
    evaluation = {"format": 1, "command": "x", "seed": 0, "domains": [{**domain, "scores": scores}]}
    (folder / "toy" / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "study.json").write_text(json.dumps({"format": 1, "rows": [{"scheme": "no key"}]}))
    coco = {"annotations": [{"image_id": 1, "id": 1, "caption": "a cat"}]}
    (folder / "prompts.json").write_text(json.dumps(coco))
    (folder / "prompts.jsonl").write_text('{"Prompt": "a cat"}\n')
    (folder / "prompts.csv").write_text('Prompt,Category\n"a cat",x\n')
    (folder / "prompts.tsv").write_text("Prompt\tCategory\na cat\tx\n")
    (folder / "prompts.txt").write_text("a cat on a mat\n")


def study(path: Path) -> None:
    if path.exists():  # without one, a study begins
        run_study(StudyRequest(model="tiny-sdxl", out=path.parent / "out", json_file=path, images=2))


def run_onnx(path: Path) -> None:
    with OnnxRuntimeEngine(path.with_name("model.onnx"), threads=1):
        pass


# file -> what reads it
READERS: dict[str, Callable[[Path], object]] = {
    "toy/recipe.json": lambda path: read_recipe(path.parent),
    "toy/step_scales.safetensors": read_step_scales,
    "toy/report.json": lambda path: write_html_report(path.parent),
    "toy/evaluation.json": lambda path: write_html_report(path.parent),
    "toy/images/per_image.json": lambda path: write_html_report(path.parents[1]),
    "toy/images/int8/00001.png": lambda path: read_images(path.parent, 0, 2),
    "toy/images/float/00000.png": lambda path: write_html_report(path.parents[2]),
    "toy/unet/model.onnx": run_onnx,
    "toy/unet/model.onnx_data": run_onnx,
    "model/model_index.json": lambda path: check_folder(path.parent),
    "model/unet/config.json": lambda path: load_model(resolve(str(path.parents[1]))),
    "model/text_encoder/config.json": lambda path: load_model(resolve(str(path.parents[1]))),
    "model/scheduler/scheduler_config.json": lambda path: load_model(resolve(str(path.parents[1]))).denoiser(),
    "model/tokenizer/tokenizer.json": lambda path: load_model(resolve(str(path.parents[1]))),
    "model/unet/diffusion_pytorch_model.safetensors": lambda path: check_folder(path.parents[1]),
    "model/text_encoder/model.safetensors": lambda path: check_folder(path.parents[1]),
    "learned/block_00000.safetensors": lambda path: LearnedRounding(path.parent)("a", np.ones((2, 3), np.float32)),
    "learned/call_00000.safetensors": lambda path: read_block_call(path.parent, "a"),
    "calls/call_00000.safetensors": lambda path: CalibrationState(path.parent, "key").read(),
    "prompts.txt": read_prompts,
    "prompts.json": read_prompts,
    "prompts.jsonl": read_prompts,
    "prompts.csv": read_prompts,
    "prompts.tsv": read_prompts,
    "study.json": study,
}
# What a reader can't see, or needs not: the rest of the file is good, or another file says the same.
UNSEEN = {
    "toy/evaluation.json": {"gone"},  # not evaluated yet
    "toy/images/per_image.json": {"no field", "every field a list", "numbers as texts"},  # no image to show
    "toy/unet/model.onnx": {"ninth byte flipped"},  # the producer's name
    "toy/unet/model.onnx_data": {
        "first byte flipped",
        "ninth byte flipped",
        "nested too deep",
    },  # other weights: see the test of stages
    "model/model_index.json": {
        "numbers as texts",
        "another version",
    },  # diffusers' file has no format, and fields that it may have
    "model/unet/config.json": {"ninth byte flipped", "another version"},
    "model/text_encoder/config.json": {"ninth byte flipped", "another version"},
    "model/scheduler/scheduler_config.json": {"ninth byte flipped", "no field", "another version"},
    "model/tokenizer/tokenizer.json": {"gone", "numbers as texts"},  # vocab.json and merges.txt are there
    "learned/call_00000.safetensors": {"gone"},
    "calls/call_00000.safetensors": {"gone"},
    "study.json": {"gone"},
    "prompts.txt": {"cut at a third", "first byte flipped", "ninth byte flipped"},  # any line is a prompt
    "prompts.json": {"numbers as texts", "another version"},
    "prompts.csv": {"ninth byte flipped"},
    "prompts.tsv": {"ninth byte flipped"},
}


def copied(whole: Path, name: str, folder: Path) -> Path:
    """A copy of the part of `whole` that `name` lies in."""
    part = name.split("/")[0]
    if (whole / part).is_dir():
        shutil.copytree(whole / part, folder / part)
    else:
        shutil.copy(whole / part, folder / part)
    if name == "toy/images/per_image.json":
        (folder / "toy" / "images" / "per_image.json").touch()
    return folder / name


def damage(path: Path, kind: str) -> None:
    change = DAMAGES[kind]
    data = path.read_bytes()
    if change is not None:
        path.write_bytes(change(data))
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()


def line_of(action: Callable[[], object]) -> str | None:
    """The line of the error, or None where there is a value. Any other exception is a traceback that a person would see."""
    try:
        action()
    except (PcrExportError, OSError) as error:  # the command line prints either
        return str(error)
    return None


def cases() -> list[tuple[str, str]]:
    return [(name, kind) for name in READERS for kind in (*DAMAGES, *(JSON_DAMAGES if name.endswith(".json") else ()))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), cases())
def test_damaged_file(name: str, kind: str, whole: Path, tmp_path: Path, record_property: Callable) -> None:
    path = copied(whole, name, tmp_path)
    if kind in DAMAGES:
        damage(path, kind)
    else:
        path.write_text(json.dumps(JSON_DAMAGES[kind](json.loads(path.read_text()))))
    line = line_of(lambda: READERS[name](path))
    record_property("line", (line or "").replace(str(tmp_path), "."))
    assert (line is None) == (kind in UNSEEN.get(name, ()))
    if line is not None:
        assert "\n" not in line.strip()
        assert re.search(f"{path.stem}|{path.parent.name}|recipe|{path.parents[1].name}", line), (
            line
        )  # which file it is


def test_there_are_enough_cases() -> None:
    assert len(cases()) > 200


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The line on stderr of a run of the program that is refused."""
    monkeypatch.setattr(sys, "argv", ["pcr-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code not in (0, None)
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--steps", 10**9), "at most 1000"),
        (("--steps", -1), "--num-inference-steps must be at least 1"),
        (("--height", 10**9), "at most 16384"),
        (("--width", 10**40), "at most 16384"),
        (("--relax", "0:99999999999999999999"), "is not understood"),
        (("--relax", "0:999999999"), "names step"),
        (("--guidance-scale", "nan"), "finite"),
        (("--guidance-scale", "inf"), "finite"),
        (("--bits", f"w{10**30}a8"), "is not understood"),
        (("--scheme", "static", "--observed-steps", "normal:999999999"), "must name 1 to"),
        (("--percentile", "nan"), "must lie in"),
        (("--smooth-quant", "nan"), "must lie in"),
        (("--bits", "w4a8", "--keep", "9" * 5000), "is not understood"),
        (("--parts", "int4"), "choose one of fp32, fp16, int8"),
        (("--parts", "fp16", "--strip-encoders"), "leaves out: choose one"),
        (("--calib-size", -5), "at least 1"),
        (("--batch", "99999999999999999999999:1:1"), "MIN <= OPT <= MAX"),
        (("--prompts-file", "/dev/null"), "is a pipe, a socket or a device"),
        (("--prompts-file", "/"), "is a folder"),
    ],
)
def test_settings_that_make_no_sense(
    options: tuple, expected: str, whole: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, record_property: Callable
) -> None:
    line = run(monkeypatch, capsys, whole / "model", "--out", tmp_path / "out", *options)
    record_property("line", line.replace(str(whole), "."))
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.txt", b"a " * 5_000_000, "10000 are taken"),
        ("p.txt", b"caf\xe9\n", "can't be read"),
        ("p.txt", b"# all\n\n", "holds no prompt"),
        ("p.jsonl", b'{"Prompt": "\\ud800"}', "half a character|is no JSON object"),
        ("p.json", b'{"annotations": [{"image_id": Infinity, "id": 1, "caption": "x"}]}', "can't be read"),
        ("p.csv", b'Prompt\n"' + b"a" * 10_000_000 + b'"', "can't be read"),
        ("p.csv", b'Prompt\n"open', "can't be read"),
        ("p.tsv", b"Prompt\n" + b"b" * 10_001, "10000 are taken|field larger"),
        ("p.parquet", b"PAR1", "parquet"),
        ("p.json", b"1" * 10_000_000, "can't be read"),
    ],
)
def test_prompts_that_are_none(
    name: str, data: bytes, expected: str, tmp_path: Path, record_property: Callable
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PcrExportError, match=expected) as refused:
        read_prompts(tmp_path / name)
    record_property("line", str(refused.value).replace(str(tmp_path), ".")[:300])
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("prompt", ["../../etc/passwd", 'a/b\\c:*?"<>|', "-o --help", "\x00\x1b[31m", "%s{x}"])
def test_a_prompt_is_no_path(prompt: str, whole: Path) -> None:
    """Any text that is short enough is drawn, and no file is named after it."""
    denoiser = load_model(replace(resolve(str(whole / "model")), num_inference_steps=2)).denoiser()
    before = sorted(whole.rglob("*"))
    assert torch.isfinite(next(denoiser.walk([prompt], [0]))["encoder_hidden_states"]).all()
    assert sorted(whole.rglob("*")) == before


@pytest.mark.parametrize(
    ("prompt", "seed", "expected"),
    [
        ("x" * 10_000_000, 0, "10000000 characters"),
        ("\udcff", 0, "no Unicode"),
        ("a", 2**70, "seed"),
        ("a", -1, "seed"),
    ],
)
def test_a_prompt_or_seed_that_can_not_be_drawn(prompt: str, seed: int, expected: str, whole: Path) -> None:
    denoiser = load_model(replace(resolve(str(whole / "model")), num_inference_steps=2)).denoiser()
    with pytest.raises(PcrExportError, match=expected):
        next(denoiser.walk([prompt], [seed]))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a safetensors file or the content of a JSON file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_tensors(path)
        change(tensors)
        save_tensors(tensors, path, {"format": "pt"})


UNET, ENCODER, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (UNET, lambda x: x["conv_out.weight"].fill_(math.nan), r"unet.conv_out.weight holds NaN"),
        (ENCODER, lambda x: x.update({k: v * math.inf for k, v in x.items()}), "text_encoder.*holds NaN"),
        (VAE, lambda x: x["decoder.conv_in.bias"].fill_(math.inf), "vae.decoder.conv_in.bias holds NaN"),
        (UNET, lambda x: x.update({"conv_in.weight": torch.zeros(3, 3)}), "can't be loaded"),
        (UNET, lambda x: x.update({"conv_in.weight": torch.zeros(0)}), "can't be loaded"),
        ("model_index.json", lambda x: x.update({"unet": ["os", "system"]}), "unet that diffusers"),
        ("model_index.json", lambda x: x.update({"unet": ["diffusers", "Nonesuch"]}), "only UNet2DConditionModel can"),
        ("model_index.json", lambda x: x.update({"unet": ["my_unet.py", "Unet"]}), "unet that diffusers"),
        ("model_index.json", lambda x: x.update({"extra": ["../evil", "Evil"]}), "extra that diffusers"),
        (
            "model_index.json",
            lambda x: x.update({"../../x": ["diffusers", "UNet2DConditionModel"]}),
            r"\.\./\.\./x that",
        ),
        ("model_index.json", lambda x: x.update({"vae": []}), "vae that diffusers"),
        ("model_index.json", lambda x: x.update({"_class_name": "../Pipeline"}), "can be exported"),
        ("model_index.json", lambda x: x.pop("text_encoder"), "names no text_encoder: fetch"),
        ("scheduler/scheduler_config.json", lambda x: x.update({"num_train_timesteps": 2}), "knows 2"),
        ("scheduler/scheduler_config.json", lambda x: x.update({"num_train_timesteps": "many"}), "Expected `int`"),
        ("unet/config.json", lambda x: x.update({"in_channels": 10**12}), "Expected `int` <= 65536"),
        ("unet/config.json", lambda x: x.update({"cross_attention_dim": 7}), "they are no pair"),
        ("unet/config.json", lambda x: x.update({"block_out_channels": [32, 96]}), "can't be loaded"),
    ],
)
def test_a_model_that_can_not_be(
    name: str, change: Callable, expected: str, whole: Path, tmp_path: Path, record_property: Callable
) -> None:
    model = shutil.copytree(whole / "model", tmp_path / "model")
    edit(model / name, change)
    with pytest.raises(PcrExportError, match=expected) as refused:
        load_model(replace(resolve(str(model)), num_inference_steps=4)).denoiser()
    record_property("line", str(refused.value).replace(str(tmp_path), "."))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(part: str, whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole / "model", tmp_path / "model")
    shutil.rmtree(model / part)
    with pytest.raises(PcrExportError, match=f"{part}.* is missing"):
        load_model(resolve(str(model)))


class Loud:
    """A pickle that would be noticed."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize(
    ("name", "part"),
    [("diffusion_pytorch_model.bin", "unet"), ("model.ckpt", "unet"), ("pytorch_model.bin", "text_encoder")],
)
def test_no_pickle_is_loaded(
    name: str, part: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(whole / "model", tmp_path / "model")
    for path in (model / part).glob("*.safetensors"):
        path.unlink()
    (model / part / name).write_bytes(pickle.dumps(Loud()))
    with pytest.raises(PcrExportError, match="safe_serialization=True"):
        load_model(resolve(str(model)))
    assert not Path("unpickled").exists()


def test_shards_do_not_lead_outside(whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole / "model", tmp_path / "model")
    shutil.move(model / UNET, tmp_path / "outside.safetensors")
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../outside.safetensors"}}))
    with pytest.raises(PcrExportError, match="does not lie in"):
        load_model(resolve(str(model)))


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "", None, "a\0b"])
@pytest.mark.parametrize("field", ["fp32", "artifact", "per_image"])
def test_an_evaluation_does_not_lead_outside(field: str, name: object, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole / "toy", tmp_path / "toy")
    edit(folder / "evaluation.json", lambda content: content["domains"][0].update({field: name}))
    with pytest.raises(PcrExportError, match="does not lie in"):
        write_html_report(folder)


def move_data(path: Path, location: str) -> None:
    """Let an ONNX file find its weights at `location`, where they are."""
    model = onnx.load(path, load_external_data=False)
    shutil.copy(path.with_name("model.onnx_data"), path.parent / location)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    onnx.save(model, path)


@pytest.mark.parametrize("location", ["../../outside_data", "absolute"])
@pytest.mark.parametrize(
    "read", [run_onnx, onnx_sha256, lambda path: write_half_onnx(path, path.with_name("half.onnx"))]
)
def test_weights_of_a_graph_do_not_lie_outside(location: str, read: Callable, whole: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole / "toy", tmp_path / "toy") / "unet" / "model.onnx"
    move_data(path, str(tmp_path / "data") if location == "absolute" else location)
    with pytest.raises(PcrExportError):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "\x00", '{"key": {}, "facts": {}}', "[" * 100_000, '{"key": 1, "facts": {}, "outputs": {}}'],
)
def test_a_damaged_stamp_is_no_stamp(text: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert Stages(tmp_path).run("stage", {}, [], lambda: {"ran": True}) == {"ran": True}
        (tmp_path / "stage.json").write_text(text)


@pytest.mark.parametrize("kind", [*DAMAGES, *JSON_DAMAGES])
def test_a_damaged_engine_record(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sm89.json"
    write_engine_record(path, small_record())
    if kind in DAMAGES:
        damage(path, kind)
    else:
        path.write_text(json.dumps(JSON_DAMAGES[kind](json.loads(path.read_text()))))
    assert "build the engine" in str(line_of(lambda: read_engine_record(path)))


def test_a_damaged_output_is_made_again(whole: Path, tmp_path: Path) -> None:
    """A bit flips in what a finished stage wrote: the same command mends it."""
    folder = shutil.copytree(whole / "toy", tmp_path / "toy")
    data = folder / "unet" / "model.onnx_data"
    good = data.read_bytes()
    data.write_bytes(flipped(good, len(good) // 2))
    export_denoiser(toy_job(folder))
    assert data.read_bytes() == good


@pytest.mark.parametrize(
    ("where", "expected"),
    [("middle.conv", "layer middle.conv: weight holds NaN"), ("middle.norm", "site middle.conv, step 0")],
)
def test_what_is_not_finite_is_named(where: str, expected: str, tmp_path: Path) -> None:
    denoiser = class_conditional_denoiser()
    denoiser.network.get_submodule(where).weight.data.fill_(math.nan)
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)
    with pytest.raises(PcrExportError, match=expected):
        export_denoiser(Job(denoiser=denoiser, recipe=recipe, conditions=[0, 1], folder=tmp_path))


def test_an_activation_that_overflows_late_is_named_with_its_step(tmp_path: Path) -> None:
    denoiser = class_conditional_denoiser()

    def call(network: torch.nn.Module, inputs: dict) -> torch.Tensor:
        late = inputs["t"] < 600
        return denoiser.call(network, {**inputs, "x": torch.where(late, math.inf, inputs["x"])})

    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)
    with pytest.raises(PcrExportError, match="step 2: activations hold NaN"):
        export_denoiser(Job(denoiser=replace(denoiser, call=call), recipe=recipe, conditions=[0, 1], folder=tmp_path))
    assert list((tmp_path / ".stages" / "calibration").glob("call_*"))  # of the steps before: nothing is lost
