"""An exported folder as a pipeline of diffusers: text to image, image to image, inpainting; on onnxruntime or TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import diffusers
from torch import nn

from pcr_export.deploy.folder import TOKENIZERS
from pcr_export.deploy.parts import OnnxTextEncoder, OnnxUnet, OnnxVae, TensorRtUnet, part_config, vae_encoder
from pcr_export.deploy.refusals import LORA, SAVING
from pcr_export.engine_settings import BACKENDS
from pcr_export.engines.engine_folder import engine_targets, find_engine
from pcr_export.engines.engine_record import read_engine_record
from pcr_export.engines.flavours import gpu_target
from pcr_export.errors import PcrExportError
from pcr_export.manifest import check_exported_folder, check_finished
from pcr_export.models.catalog import read_model_index
from pcr_export.models.clean_part import read_tokenizer
from pcr_export.models.pipelines import Pipeline
from pcr_export.models.schedulers import read_scheduler

TASKS = {"text-to-image": "Pipeline", "image-to-image": "Img2ImgPipeline", "inpainting": "InpaintPipeline"}


def load_pipeline(
    folder: str | Path,
    *,
    backend: str = "onnxruntime",
    target: str | None = None,
    task: str = "text-to-image",
    threads: int | None = None,
) -> Pipeline:
    """The diffusers pipeline of an exported folder, called as any other one; no torch weights are read.

    Its class is that of model_index.json; `StableDiffusionXLImg2ImgPipeline(**pipeline.components)` and `from_pipe` work on it too.
    Any scheduler and number of steps will do: a timestep takes the scales of the nearest calibrated step, and a schedule that
    was not calibrated is warned of once (ScheduleWarning). `prompt_embeds` may have any number of tokens on onnxruntime. What a
    pipeline hands over that a graph has no input for (a ControlNet's residuals, masks, a LoRA's scale), and calls that need torch
    weights or another device, are refused with a PcrExportError.

    Args:
        folder: what an export wrote, such as engines/sdxl-w8a8.
        backend: of the UNet: "onnxruntime" (CPU), "tensorrt-rtx" or "tensorrt". The text encoders and the VAE run on the CPU.
        target: the GPU whose engine is meant, such as "sm89"; None for this machine's.
        task: "text-to-image", "image-to-image" or "inpainting".
        threads: of each onnxruntime session; None for onnxruntime's choice.

    Raises:
        PcrExportError: the folder is no export, a part of it is missing or damaged, or the engine can't run here.
    """
    if task not in TASKS:
        raise PcrExportError(f"task {task!r} is unknown: choose one of {', '.join(TASKS)}")
    if backend not in BACKENDS:
        raise PcrExportError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    folder = Path(folder)
    check_finished(folder)
    engine = None if backend == "onnxruntime" else _engine_target(folder, backend, target)
    if backend == "onnxruntime" and target is not None:
        raise PcrExportError(f"target {target!r} is an engine's: give backend='tensorrt-rtx' or 'tensorrt' with it")
    return load_exported_pipeline(folder, threads, engine=engine, task=task)


def _engine_target(folder: Path, backend: str, target: str | None) -> str:
    """The target whose engine runs here. Raises PcrExportError where there is none, or another backend built it."""
    target = target or gpu_target()
    if target is None:
        there = ", ".join(engine_targets(folder)) or "none"
        raise PcrExportError(
            f"no CUDA GPU here for {backend} (engines there: {there}): use backend='onnxruntime', or copy {folder} to the GPU's machine"
        )
    built_by = read_engine_record(find_engine(folder, target).with_suffix(".json")).flavour
    if built_by != backend:
        raise PcrExportError(f"{folder} has an engine of {built_by} for {target}: give backend={built_by!r}")
    return target


def load_exported_pipeline(
    folder: Path,
    threads: int | None = None,
    *,
    engine: str | None = None,
    task: str = "text-to-image",
    network: Callable[[str], nn.Module] | None = None,
) -> Pipeline:
    """The diffusers pipeline of an exported folder, its networks run by onnxruntime on the CPU; no torch weights are read.

    Args:
        folder: with model_index.json and the ONNX of every part.
        threads: of each session; None for onnxruntime's choice.
        engine: the target, such as "sm89", whose TensorRT engine runs the UNet on the GPU; None for onnxruntime. The text encoders
            and the VAE stay on the CPU.
        task: one of TASKS.
        network: gives the part of a name ("unet", "vae_decoder", "text_encoder", "text_encoder_2") in place of all of these.

    Raises:
        PcrExportError: the folder is no export, a part of it is missing or damaged, or the engine can't run here.
    """
    check_exported_folder(folder)
    index = read_model_index(folder)
    if not (folder / "unet" / "model.onnx").is_file():
        raise PcrExportError(
            f"{folder} has no unet/model.onnx, so it is no exported folder: make one with `pcr-export {folder}`"
        )
    if task != "text-to-image":
        vae_encoder(folder)

    def own_network(name: str) -> nn.Module:
        if name == "unet":
            return OnnxUnet(folder / name, threads) if engine is None else TensorRtUnet(folder, engine)
        return OnnxVae(folder, threads) if name == "vae_decoder" else OnnxTextEncoder(folder / name, threads)

    network = network or own_network
    parts: dict[str, Any] = {
        "unet": network("unet"),
        "vae": network("vae_decoder"),
        "text_encoder": network("text_encoder"),
        "tokenizer": _read_tokenizer(folder / "tokenizer"),
        "scheduler": read_scheduler(folder),
    }
    if index["_class_name"] == "StableDiffusionXLPipeline":
        parts |= {
            "text_encoder_2": network("text_encoder_2"),
            "tokenizer_2": _read_tokenizer(folder / "tokenizer_2"),
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
            "add_watermarker": False,
        }
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    class_name = index["_class_name"].removesuffix("Pipeline") + TASKS[task]
    pipeline: Pipeline = getattr(diffusers, class_name)(**parts)
    # before diffusers saves a folder without networks, or asks for a library that would not help
    for name, advice in (("save_pretrained", SAVING), ("load_lora_weights", LORA)):
        setattr(pipeline, name, partial(_refuse_call, f"an exported pipeline has no {name}: {advice}"))
    return pipeline


def _refuse_call(message: str, *_arguments: Any, **_named: Any) -> NoReturn:
    raise PcrExportError(message)


def read_tokenizers(folder: Path) -> list[Any]:
    """The tokenizers of an exported folder; none where it was exported without. Raises PcrExportError where one is damaged."""
    return [_read_tokenizer(folder / name) for name in TOKENIZERS if (folder / name).is_dir()]


def _read_tokenizer(folder: Path) -> Any:
    """The tokenizer of an exported folder, which makes no more and no other tokens than its text encoder reads."""
    encoder = part_config(folder.with_name(folder.name.replace("tokenizer", "text_encoder")))
    tokenizer = read_tokenizer(folder, most_tokens=encoder["max_position_embeddings"], advice="export again")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= encoder["vocab_size"]:
        raise PcrExportError(
            f"{folder} has the token {highest}, where the text encoder knows {encoder['vocab_size']}: export again"
        )
    return tokenizer
