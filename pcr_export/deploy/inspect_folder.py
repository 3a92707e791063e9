"""What an exported folder says of itself, from its small files alone: sites, bits, scales by step, reasons, versions, engines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from pcr_export.engines.engine_folder import engine_targets
from pcr_export.engines.engine_record import read_engine_record
from pcr_export.errors import PcrExportError
from pcr_export.manifest import check_finished, read_manifest
from pcr_export.read_files import read_json
from pcr_export.report import NO_REASON, read_report
from pcr_export.sites import block_of
from pcr_export.stages import Facts
from pcr_export.step_scales import StepScales, read_step_scales

FORMAT = 1
MOST_GROUPS = 32  # rows of the picture; beyond, whole blocks make a row each
ENGINE_FACTS = (
    "flavour",
    "version",
    "engine_bytes",
    "weight_bytes",
    "activation_bytes",
    "kernels",
    "ran",
    "onnx_sha256",
    "rebuild_command",
)
TIMINGS = ("int8_ms", "relaxed_ms", "fp16_ms", "mean_ms", "speedup")


class PipelineIndex(TypedDict):
    """What is shown of a model_index.json."""

    _class_name: str


def inspect_folder(folder: Path) -> Facts:
    """Everything that `pcr-export inspect` shows, as plain JSON. Reads report.json, the scales, the manifest and the engines' records.

    Raises:
        PcrExportError: the folder is no export, or one of these files is damaged or of another version.
    """
    check_finished(folder)
    path = folder / "report.json"
    report, scales = read_report(folder), read_step_scales(folder / "step_scales.safetensors")
    index = folder / "model_index.json"
    with _reading(path):
        return {
            "format": FORMAT,
            "folder": str(folder),
            "model": report["model"],
            "pipeline": read_json(index, PipelineIndex)["_class_name"] if index.exists() else None,
            "recipe": report["recipe"],
            "weights": _weights(report),
            "activations": {
                "bits": scales.bits.tolist(),
                "mean_bits": round(float(scales.bits.mean()), 4),
                "relaxed_steps": [step for step, bits in enumerate(scales.bits.tolist()) if bits > 8],
            },
            "scales": {"timesteps": scales.timesteps.tolist(), "groups": scale_groups(scales)},
            "layers": report["sites"],
            "float": _reasons(report["sites"]),
            "versions": report["environment"],
            "other_parts": report.get("parts", {}),
            "engines": [*_onnxruntime(report), *(_engine(folder, report, each) for each in engine_targets(folder))],
            **_files(folder),
        }


def scale_groups(scales: StepScales) -> list[Facts]:
    """The sites by part of the network, and the mean over them of log2(scale / the site's geometric mean over the steps) by step."""
    names = [block_of(site, depth=1) for site in scales.sites]
    if len(set(names)) > MOST_GROUPS:
        names = [block_of(site) for site in scales.sites]
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        members[name].append(index)
    deviation = scales.deviation()
    return [
        {"name": name, "sites": len(some), "log2": [round(value, 4) for value in deviation[:, some].mean(1).tolist()]}
        for name, some in members.items()
    ]


def _weights(report: Mapping[str, Any]) -> Facts:
    layers: dict[str, int] = defaultdict(int)
    for layer in report["sites"]:
        layers[layer["bits"]] += 1
    sites = {layer["site"] for layer in report["sites"] if layer["quantized"]}
    graph = report["graph"]
    return {
        "layers_by_bits": dict(layers),
        "sites": len(sites),
        "onnx_bytes": graph["onnx_bytes"],
        "float_bytes": graph["float_bytes"],
    }


def _reasons(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Why layers stayed float: reason -> module paths."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if not layer["quantized"]:
            reasons[layer["reason"] or NO_REASON].append(layer["name"])
    return dict(reasons)


def _onnxruntime(report: Mapping[str, Any]) -> list[Facts]:
    """onnxruntime, which every export can be run by; its latency where the export measured it."""
    measured = [engine for engine in report["engines"] if engine["backend"] == "onnxruntime"]
    return measured or [{"backend": "onnxruntime", "target": "cpu", "built": True, "ran": False}]


def _engine(folder: Path, report: Mapping[str, Any], target: str) -> Facts:
    record = read_engine_record(folder / "unet" / f"{target}.engine")
    timed: Mapping[str, Any] = next((each for each in report["engines"] if each["target"] == target), {})
    return {
        "backend": record.flavour,
        "target": target,
        "file": f"unet/{target}.engine",
        **{name: getattr(record, name) for name in ENGINE_FACTS},
        "axes": {name: list(sizes) for name, sizes in record.axes.items()},
        "int8_layers": len(record.sites) - len(record.floats),
        "float_layers": record.floats,
        **{name: timed[name] for name in TIMINGS if name in timed},
    }


def _files(folder: Path) -> Facts:
    """Names, sizes and hashes as the manifest has them (`verify` holds the files against it), and the bytes of each part."""
    files = read_manifest(folder).files
    parts: dict[str, int] = defaultdict(int)
    for name, listed in files.items():
        parts[name.split("/")[0] if "/" in name else "settings"] += listed.bytes
    return {
        "files": {name: {"sha256": listed.sha256, "bytes": listed.bytes} for name, listed in files.items()},
        "parts": dict(parts),
    }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PcrExportError(f"{path} is damaged ({type(error).__name__}: {error}): export again") from error
