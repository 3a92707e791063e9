"""`triton/` of an exported folder: a model repository whose networks are links into the folder, and its check."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcr_export.deploy.triton_config import (
    ONNXRUNTIME,
    PYTHON,
    TENSORRT,
    ModelConfig,
    differences,
    read_config,
    triton_ports,
    write_config,
)
from pcr_export.deploy.triton_plan import find_plans, plan_onnx, write_plan_onnx
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.errors import PcrExportError
from pcr_export.write_files import temporary_beside, write_bytes

REPOSITORY = "triton"
NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder")
PIPELINE = "pipeline"
PIPELINE_CODE = Path(__file__).with_name("triton_pipeline") / "model.py"
MAX_BATCH = 8  # images of one walk; waiting requests are joined up to it
MAX_QUEUE = 256  # requests that wait, 32 walks of MAX_BATCH: whoever came later would wait for minutes, and its inputs fill the memory

PIPELINE_NOTE = """\
PROMPT -> IMAGES (uint8, height x width x 3); all inputs but PROMPT may be left out.
parameters: networks, "own" to run them in this model or "triton" to call the models beside it; threads, of each own network;
engine, such as sm89, for the UNet's engine in place of onnxruntime (then set max_batch_size to the --batch of its build).
max_queue_size: requests that may wait; one more is refused at once."""


def write_triton_repository(folder: Path) -> None:
    """Write `folder`/triton: a config.pbtxt and a version for each network and for the pipeline, and check it.

    A network's `1/model.onnx` is a relative link to its folder of the export, so nothing is copied. onnxruntime looks for the external data
    beside the file that it finds behind the link, and Triton takes a folder of that name for a model with external data. The
    repository moves with its folder: copied with links as links it stays small, copied with links followed it is whole.

    Where TensorRT's dialect of the UNet was written, the graph for Triton's plans is too; plans that lie in `unet/1` (sm89.plan)
    are served in place of the ONNX.

    Raises:
        PcrExportError: a network is missing or damaged.
        OSError: the folder can't be written to.
    """
    if tensorrt_onnx(folder).is_file():
        write_plan_onnx(folder)
    else:
        plan_onnx(folder).unlink(missing_ok=True)  # of older scales
    for config in expected_configs(folder):
        home = folder / REPOSITORY / config.name
        write_config(home / "config.pbtxt", config, PIPELINE_NOTE if config.name == PIPELINE else "")
        if config.name == PIPELINE:
            write_bytes(home / "1" / "model.py", PIPELINE_CODE.read_bytes())
        elif config.backend == ONNXRUNTIME:
            _link(home / "1" / "model.onnx", folder / config.name)
    check_triton_repository(folder)


def repository_paths(folder: Path) -> list[Path]:
    """What `write_triton_repository` writes: files, and for each network that onnxruntime runs a folder (a link to its own)."""
    networks = _networks(folder)
    homes = {name: folder / REPOSITORY / name for name in (*networks, PIPELINE)}
    links = [homes[name] / "1" / "model.onnx" for name in networks if name != "unet" or not _plans(folder)]
    plans = [plan_onnx(folder)] if tensorrt_onnx(folder).is_file() else []
    return [*(home / "config.pbtxt" for home in homes.values()), homes[PIPELINE] / "1" / "model.py", *links, *plans]


def repository_key(folder: Path) -> dict[str, str]:
    """What the repository depends on beside the networks: plans that lie in it, and whether there is a graph for plans."""
    return {"triton plans": ", ".join(_plans(folder)), "graph for plans": str(tensorrt_onnx(folder).is_file())}


def check_triton_repository(folder: Path) -> None:
    """Compare `folder`/triton with the networks of `folder`.

    Raises:
        PcrExportError: in one line, every place where a config.pbtxt, a link or the pipeline's code is not what it has to be.
    """
    wrong = [
        f"{REPOSITORY}/{config.name}: {fault}"
        for config in expected_configs(folder)
        for fault in _faults(folder, config)
    ]
    if wrong:
        raise PcrExportError(f"{folder} does not fit its Triton repository: {'; '.join(wrong)}: export again")


def expected_configs(folder: Path) -> Iterator[ModelConfig]:
    """What each config.pbtxt has to say of the models in `folder`. Raises PcrExportError as `triton_ports` does."""
    for name in _networks(folder):
        yield _network_config(folder, name)
    yield ModelConfig(
        name=PIPELINE,
        backend=PYTHON,
        max_batch_size=MAX_BATCH,
        inputs={
            "PROMPT": ("TYPE_STRING", (1,)),
            "NEGATIVE_PROMPT": ("TYPE_STRING", (1,)),
            "SEED": ("TYPE_INT64", (1,)),
            "STEPS": ("TYPE_INT32", (1,)),
            "GUIDANCE_SCALE": ("TYPE_FP32", (1,)),
        },
        outputs={"IMAGES": ("TYPE_UINT8", (-1, -1, 3))},
        optional=frozenset({"NEGATIVE_PROMPT", "SEED", "STEPS", "GUIDANCE_SCALE"}),
        cpu=True,
        dynamic_batching=True,
        max_queue_size=MAX_QUEUE,
        parameters={"networks": "own", "threads": "", "engine": ""},
    )


def _networks(folder: Path) -> list[str]:
    return [name for name in NETWORKS if name != "text_encoder_2" or (folder / name).exists()]  # only SDXL has two


def _plans(folder: Path) -> dict[str, str]:
    return find_plans(folder / REPOSITORY / "unet" / "1")


def _network_config(folder: Path, name: str) -> ModelConfig:
    plans = _plans(folder) if name == "unet" else {}
    inputs, outputs = triton_ports(plan_onnx(folder) if plans else folder / name / "model.onnx")
    return ModelConfig(
        name=name,
        backend=TENSORRT if plans else ONNXRUNTIME,
        max_batch_size=0,
        inputs=inputs,
        outputs=outputs,
        cpu=name == "unet" and not plans,  # its integer products have kernels on the CPU only
        plans=plans,
    )


def _faults(folder: Path, config: ModelConfig) -> list[str]:
    home = folder / REPOSITORY / config.name
    faults = differences(read_config(home / "config.pbtxt"), config)
    if config.name == PIPELINE:
        code = home / "1" / "model.py"
        if not code.is_file() or code.read_bytes() != PIPELINE_CODE.read_bytes():
            faults.append("1/model.py is not this version's")
        return faults
    if config.backend == TENSORRT:
        return faults
    file, original = home / "1" / "model.onnx" / "model.onnx", folder / config.name / "model.onnx"
    if not file.is_file() or (not file.samefile(original) and file.read_bytes() != original.read_bytes()):
        faults.append(f"1/model.onnx/model.onnx is not {config.name}/model.onnx")
    return faults


def _link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # what a copy with links followed made of the link
    os.replace(temporary, path)
