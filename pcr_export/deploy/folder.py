"""Everything of an exported pipeline but the UNet's graph, laid out as diffusers and optimum lay out theirs.

    model_index.json  scheduler/  tokenizer/  tokenizer_2/  unet/config.json
    text_encoder/{config.json, model.onnx}  text_encoder_2/...  vae_encoder/... vae_decoder/...  float32, weights in model.onnx_data

Same pipeline, same bytes: no path, no time and no state that the pipeline's use leaves behind is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers

from pcr_export.deploy.onnx_parts import export_text_encoder, export_vae_decoder, export_vae_encoder
from pcr_export.models.catalog import HANDED_OVER
from pcr_export.models.pipelines import Pipeline
from pcr_export.write_files import write_json, write_text

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
VAE_HALVES = ("vae_encoder", "vae_decoder")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
OF_THIS_MACHINE = (
    "_name_or_path",
    "name_or_path",
    "is_local",
    "local_files_only",
)  # keys of configs that are not written


def write_pipeline_folder(pipeline: Pipeline, out: Path) -> None:
    """Write configurations, tokenizers and the float32 ONNX of text encoders and VAE; `unet/model.onnx` comes from elsewhere.

    Args:
        pipeline: float32, in eval mode.
        out: the output folder; made where missing, files replaced where present.

    Raises:
        OSError: the folder can't be written.
    """
    write_configs(pipeline, out)
    for name, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            export_text_encoder(encoder, getattr(pipeline, tokenizer).model_max_length, out / name / "model.onnx")
    for half, export in zip(VAE_HALVES, (export_vae_encoder, export_vae_decoder), strict=True):
        export(pipeline.vae, out / half / "model.onnx")


def write_unet_folder(pipeline: Pipeline, out: Path) -> None:
    """As `write_pipeline_folder`, for machines that have text encoders, tokenizers and VAE from elsewhere: those of `out` are deleted.

    model_index.json names them null, as diffusers writes a component that has to be handed over.
    """
    for pattern in ("text_encoder*", "tokenizer*", "vae_*"):
        for folder in out.glob(pattern):
            shutil.rmtree(folder)
    index = model_index(pipeline)
    write_json(out / "model_index.json", {**index, **{name: [None, None] for name in HANDED_OVER if name in index}})
    write_json(out / "scheduler" / "scheduler_config.json", _diffusers_config(pipeline.scheduler))
    write_json(out / "unet" / "config.json", _diffusers_config(pipeline.unet))


def unet_files(out: Path) -> list[Path]:
    """The files that `write_unet_folder` leaves in `out`."""
    return [out / "model_index.json", out / "scheduler" / "scheduler_config.json", out / "unet" / "config.json"]


def written_files(pipeline: Pipeline, out: Path) -> list[Path]:
    """The files that `write_pipeline_folder` leaves in `out` and that a stage must find to be skipped."""
    folders = [name for name in TEXT_ENCODERS if getattr(pipeline, name, None) is not None]
    tokenizers = [name for name in TOKENIZERS if getattr(pipeline, name, None) is not None]
    return [
        out / "model_index.json",
        out / "scheduler" / "scheduler_config.json",
        out / "unet" / "config.json",
        *(out / name / "tokenizer_config.json" for name in tokenizers),
        *(out / name / file for name in tokenizers for file in ("vocab.json", "merges.txt")),
        *(
            out / name / file
            for name in (*folders, *VAE_HALVES)
            for file in ("config.json", "model.onnx", "model.onnx_data")
        ),
    ]


def write_configs(pipeline: Pipeline, out: Path) -> None:
    """Write every JSON of the folder and the tokenizers; no graph."""
    write_json(out / "model_index.json", model_index(pipeline))
    write_json(out / "scheduler" / "scheduler_config.json", _diffusers_config(pipeline.scheduler))
    write_json(out / "unet" / "config.json", _diffusers_config(pipeline.unet))
    for half in VAE_HALVES:
        write_json(out / half / "config.json", _diffusers_config(pipeline.vae))
    for name in TEXT_ENCODERS:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            write_json(out / name / "config.json", _transformers_config(encoder))
    for name in TOKENIZERS:
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            write_tokenizer(tokenizer, out / name)


def model_index(pipeline: Pipeline) -> dict[str, Any]:
    """model_index.json: the pipeline's class, the library and class of every component, and its options."""
    config: dict[str, Any] = dict(pipeline.config)
    index = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
    absent = {name: [None, None] for name in LEFT_OUT if name in index}
    return _json_value(
        {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__, **index, **absent}
    )


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, vocab.json and merges.txt among them, which transformers 5 leaves out of what it saves."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        files = {path.name: path.read_text("utf-8") for path in Path(temporary).iterdir()}
    if "tokenizer.json" in files:
        fast = json.loads(files["tokenizer.json"])
        fast |= {"padding": None, "truncation": None}  # what the last call left
        files["tokenizer.json"] = json.dumps(fast, indent=2, ensure_ascii=False) + "\n"
        model = fast["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        files.setdefault("vocab.json", json.dumps(model["vocab"], ensure_ascii=False) + "\n")
        files.setdefault("merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    config = json.loads(files["tokenizer_config.json"])
    kept = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
    files["tokenizer_config.json"] = json.dumps(kept, indent=2, sort_keys=True) + "\n"
    for name, text in sorted(files.items()):
        write_text(folder / name, text)


def _diffusers_config(part: Any) -> dict[str, Any]:
    values = json.loads(part.to_json_string())
    return {key: value for key, value in values.items() if key not in OF_THIS_MACHINE}


def _transformers_config(encoder: Any) -> dict[str, Any]:
    """Every value, defaults too: optimum reads num_hidden_layers from it."""
    values = {**encoder.config.to_dict(), "architectures": [type(encoder).__name__], "dtype": "float32"}
    values.pop("torch_dtype", None)
    return {key: _json_value(values[key]) for key in sorted(values) if key not in OF_THIS_MACHINE}


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
