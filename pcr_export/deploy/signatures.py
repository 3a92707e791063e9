"""What a pipeline feeds each ONNX file of an exported folder and takes from it, held against what the file has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.engines.onnx_files import Ports, onnx_ports
from pcr_export.errors import PcrExportError
from pcr_export.models.part_schemas import ExportedTextConfig, UnetConfig, VaeConfig
from pcr_export.read_files import read_json

Wanted = Mapping[str, tuple[str, tuple[int | None, ...]]]  # name -> data type, and axes; None: of any size
AGAIN = "export the folder again"
SCHEMAS = {
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ExportedTextConfig),
    **dict.fromkeys(("vae_encoder", "vae_decoder"), VaeConfig),
}
PICTURE_CHANNELS = 3  # where a VAE's configuration does not tell
BATCHED_TEXT: tuple[str, tuple[int | None, ...]] = ("FLOAT", (None, None, None))


def check_signatures(folder: Path) -> list[str]:
    """Check every ONNX file that has a configuration beside it; in words, what each one takes and gives.

    Raises:
        PcrExportError: (exit code 3) a name, a data type or an axis is none that the pipeline can use; or a file can't be read.
    """
    said = []
    for path, config in _files(folder):
        inputs, outputs = onnx_ports(path)
        part = path.parent.name
        wanted = _wanted(part, config) if config is not None else (_any(inputs), _any(outputs))
        name = path.relative_to(folder).as_posix()
        unknown = sorted(inputs.keys() - wanted[0].keys())
        if unknown:
            raise _refused(folder, name, f"an input {unknown[0]}, which nothing feeds")
        for kind, ports, expected in (("input", inputs, wanted[0]), ("output", outputs, wanted[1])):
            _compare(folder, name, kind, ports, expected)
        said.append(f"{name if part == 'tensorrt' else part}: {', '.join(inputs)} -> {_few(list(outputs))}")
    return said


def _files(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """The ONNX files, each with its configuration; None for the denoiser of a folder that is no diffusers pipeline's."""
    config = folder / "unet" / "config.json"
    unet = read_json(config, UnetConfig, advice=AGAIN) if config.exists() else None
    dialect = tensorrt_onnx(folder)
    files = [(folder / "unet" / "model.onnx", unet), *([(dialect, unet)] if dialect.is_file() else [])]
    parts = [(folder / name, schema) for name, schema in SCHEMAS.items() if (folder / name).is_dir()]
    others = ((part / "model.onnx", read_json(part / "config.json", schema, advice=AGAIN)) for part, schema in parts)
    return [*files, *others]


def _wanted(part: str, config: Mapping[str, Any]) -> tuple[Wanted, Wanted]:
    """Inputs and outputs of the part that `config` configures."""
    if part.startswith("text_encoder"):
        return _text_encoder_ports(config)
    if part == "vae_encoder":
        parameters = _picture(2 * config.get("latent_channels", 0) or None)  # mean and log variance
        images = _picture(config.get("in_channels", PICTURE_CHANNELS))
        return {"sample": images}, {"latent_parameters": parameters}
    if part == "vae_decoder":
        images = _picture(config.get("out_channels", PICTURE_CHANNELS))
        return {"latent_sample": _picture(config.get("latent_channels"))}, {"sample": images}
    return _unet_ports(config)


def _picture(channels: int | None) -> tuple[str, tuple[int | None, ...]]:
    return "FLOAT", (None, channels, None, None)


def _unet_ports(config: Mapping[str, Any]) -> tuple[Wanted, Wanted]:
    inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "sample": _picture(config.get("in_channels")),
        "timestep": ("FLOAT", ()),
        "encoder_hidden_states": ("FLOAT", (None, None, text_width(config))),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs |= {"text_embeds": ("FLOAT", (None, None)), "time_ids": ("FLOAT", (None, None))}
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = ("FLOAT", (None, config["time_cond_proj_dim"]))
    return inputs, {"out_sample": _picture(config.get("out_channels"))}


def text_width(config: Mapping[str, Any]) -> int | None:
    """Width of a token as a UNet is given it; None where the configuration does not tell.

    Where the UNet projects the text itself, it is what the projection reads. Blocks of different widths have no common one.
    """
    width = config.get("cross_attention_dim")
    if config.get("encoder_hid_dim") is not None and config.get("encoder_hid_dim_type") in (None, "text_proj"):
        width = config["encoder_hid_dim"]
    widths = set(width) if isinstance(width, list | tuple) else {width}
    (only,) = widths if len(widths) == 1 else (None,)
    return only if isinstance(only, int) else None


def _text_encoder_ports(config: Mapping[str, Any]) -> tuple[Wanted, Wanted]:
    projects = any(str(name).endswith("WithProjection") for name in config.get("architectures") or ())
    pooled = "text_embeds" if projects else "pooler_output"
    hidden = {f"hidden_states.{index}": BATCHED_TEXT for index in range(config.get("num_hidden_layers", 0))}
    outputs: Wanted = {"last_hidden_state": BATCHED_TEXT, pooled: ("FLOAT", (None, None)), **hidden}
    return {"input_ids": ("INT64", (None, None))}, outputs


def _any(ports: Ports) -> Wanted:
    return {name: (dtype, (None,) * len(axes)) for name, (dtype, axes) in ports.items()}


def _compare(folder: Path, file: str, kind: str, ports: Ports, wanted: Wanted) -> None:
    for name, (dtype, axes) in wanted.items():
        if name not in ports:
            raise _refused(folder, file, f"no {kind} {name}; it has {_few(list(ports))}")
        found, sizes = ports[name]
        fits = len(sizes) == len(axes) and all(
            wish is None or isinstance(size, str) or size == wish for size, wish in zip(sizes, axes, strict=True)
        )
        if found != dtype or not fits:
            raise _refused(
                folder, file, f"{kind} {name} as {found} {_axes(sizes)}, where {dtype} {_axes(axes)} is needed"
            )


def _refused(folder: Path, file: str, what: str) -> PcrExportError:
    return PcrExportError(f"{folder / file} has {what}: export the folder again", exit_code=3)


def _axes(axes: tuple[int | str | None, ...]) -> str:
    return f"[{', '.join('any' if axis is None else str(axis) for axis in axes)}]"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
