"""report.json (format 1): what was done, with what, and how good the result is. Plain data in, plain data out."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.read_files import check_schema, read_json
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import format_steps
from pcr_export.report_schema import Report
from pcr_export.sites import Layer

FORMAT = 1
NO_REASON = "no reason is told"  # why a layer stays float
AGAIN = "write it again, with this version"
PACKAGES = (
    "pcr-export",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "tensorrt_rtx",
    "tensorrt",
)

Facts = Mapping[str, Any]


def environment() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}", **versions}


def check_format(path: Path, found: object) -> None:
    """Raise PcrExportError where a file is of a format that is not read here."""
    if found != FORMAT:
        raise PcrExportError(f"{path} has format {found}, this version reads {FORMAT}: write it again")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an exported folder. Raises PcrExportError where it is missing, damaged or of another format."""
    return read_facts(folder / "report.json", Report)


def read_facts(path: Path, schema: Any) -> dict[str, Any]:
    """A JSON file with a format, such as report.json. Raises PcrExportError where it is missing, damaged or of another format."""
    facts = read_json(path, advice=AGAIN)
    check_format(path, facts.get("format"))
    check_schema(facts, schema, path, advice=AGAIN)
    return facts


def site_rows(
    layers: Sequence[Layer],
    recipe: Recipe,
    weights: Mapping[str, Facts],
    sensitivities: Mapping[str, float],
    sqnr_db: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row per layer.

    Args:
        weights: {bits, error, rtn_error, sensitivity} by layer, where their rounding was learned.
        sensitivities: by layer, where layers that stay float were searched: `SensitivitySearch.run`.
        sqnr_db: by site, its activations against their quantized values.
    """
    return [
        {
            "name": layer.name,
            "op": layer.op,
            "site": layer.site,
            "bits": _bits(layer, weights.get(layer.name, {}).get("bits", recipe.weight_bits), recipe),
            "quantized": layer.site is not None,
            "reason": layer.reason,
            "sqnr_db": finite(sqnr_db.get(layer.site or "")),
            "weight_error": weights.get(layer.name, {}).get("error"),
            "weight_rtn_error": weights.get(layer.name, {}).get("rtn_error"),
            "weight_sensitivity": weights.get(layer.name, {}).get("sensitivity"),
            "sensitivity": sensitivities.get(layer.name),
        }
        for layer in layers
    ]


def _bits(layer: Layer, weight_bits: int, recipe: Recipe) -> str:
    return f"w{weight_bits}a{recipe.activation_bits}" if layer.site else "float32"


def make_report(
    recipe: Recipe,
    layers: Sequence[Layer],
    *,
    calibration: Facts,
    relaxed: Facts,
    sensitivities: Mapping[str, float],
    weights: Facts,
    graph: Facts,
    parts: Facts,
    engines: Sequence[Facts],
    validation: Facts,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole report. `validation` is empty where validation was not asked for."""
    fidelity = dict(validation.get("fidelity", {}))
    site_sqnr = fidelity.pop("sites", {})
    return {
        "format": FORMAT,
        "model": recipe.model,
        "recipe": {
            **vars(recipe),
            "skip": list(recipe.skip),
            "lora": [vars(lora) for lora in recipe.lora],
            "hash": recipe.hash(),
        },
        "environment": environment(),
        "calibration": dict(calibration),
        "relaxed": dict(relaxed),
        "weights": {"seconds": weights["seconds"]},
        "sites": site_rows(layers, recipe, weights["layers"], sensitivities, site_sqnr),
        "graph": dict(graph),
        "parts": dict(parts),
        "engines": list(engines),
        "fidelity": fidelity or None,
        "quality": validation.get("quality"),
        "warnings": list(warnings),
    }


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report in a dozen lines for the terminal: (what, value)."""
    calibration, graph, sites = report["calibration"], report["graph"], report["sites"]
    quantized = sum(site["quantized"] for site in sites)
    rows = [
        ("model", report["model"]),
        ("layers", f"{quantized} INT8, {len(sites) - quantized} float"),
        (
            "calibration",
            f"{calibration['prompts']} prompts, {calibration['steps']} steps, {calibration['unet_batches']} UNet calls, "
            f"{calibration['seconds']:.0f} s, peak {calibration['peak_memory_bytes'] / 2**30:.1f} GiB",
        ),
        *_range_rows(calibration),
        *_relaxed_rows(report["relaxed"]),
        *_weight_rows(report),
        ("UNet file", f"{graph['onnx_bytes'] / 2**20:.1f} MiB (float {graph['float_bytes'] / 2**20:.1f} MiB)"),
        *part_rows(report.get("parts", {})),
    ]
    for engine in report["engines"]:
        rows.extend(_onnxruntime_rows(engine) if engine["backend"] == "onnxruntime" else _tensorrt_rows(engine))
    if report["fidelity"]:
        fidelity = report["fidelity"]
        worst = min(fidelity["per_step"], default=None, key=_sortable)
        artifact = _db(fidelity["artifact_vs_simulation_sqnr_db"])
        rows += [
            ("artifact against simulation", f"{artifact}, worst step {_db(worst)}"),
            ("rounding alone", _db(fidelity["rounding_floor_sqnr_db"])),
            ("simulation against FP32", _db(fidelity["simulation_vs_fp32_sqnr_db"])),
        ]
    if report["quality"]:
        rows.extend(_quality_rows(report["quality"]))
    return [*rows, *(("warning", line) for line in report.get("warnings", ()))]


def build_commands(report: Mapping[str, Any]) -> list[str]:
    """The command lines that build the report's engines without this package."""
    return [engine["trtexec"] for engine in report["engines"] if "trtexec" in engine]


def _range_rows(calibration: Facts) -> list[tuple[str, str]]:
    if "range_sqnr_db" not in calibration:
        return []
    tried = ", ".join(f"{name} {_db(value)}" for name, value in calibration["range_sqnr_db"].items())
    return [("ranges", f"{calibration['ranges']}; final latents of a few prompts: {tried}")]


def _relaxed_rows(relaxed: Facts) -> list[tuple[str, str]]:
    rows = []
    if relaxed.get("steps"):
        mean = f"{relaxed['mean_activation_bits']:.2f} activation bits on average"
        rows.append(("relaxed steps", f"{format_steps(relaxed['steps'])} ({mean})"))
    if "errors" in relaxed:
        errors = ", ".join(f"{name} {error:.3g}" for name, error in relaxed["errors"].items())
        rows.append(("searched", f"{relaxed['choice']}; errors: {errors}"))
    return rows


def _weight_rows(report: Facts) -> list[tuple[str, str]]:
    recipe = report["recipe"]
    learned = [site for site in report["sites"] if site["weight_error"] is not None]
    if not learned:
        return []
    error, nearest = (
        sum(site[name] for site in learned) / len(learned) for name in ("weight_error", "weight_rtn_error")
    )
    kept = sum(not site["bits"].startswith(f"w{recipe['weight_bits']}a") for site in learned)
    return [
        (
            "weights",
            f"{recipe['weights']}, mean error of a layer's output {error:.3g} of its energy (to nearest {nearest:.3g}), "
            f"{kept} layers at 8 bits, {report['weights']['seconds']:.0f} s",
        )
    ]


def sampling_words(recipe: Facts) -> str:
    """How a recipe, as JSON, samples: steps, the scheduler where one was asked for, and guidance."""
    scheduler = f" of {recipe['scheduler']}" if recipe.get("scheduler") else ""
    rescale = f" rescaled by {recipe['guidance_rescale']:g}" if recipe.get("guidance_rescale") else ""
    return f"{recipe['num_inference_steps']} steps{scheduler}, guidance scale {recipe['guidance_scale']:g}{rescale}"


def part_rows(parts: Facts) -> list[tuple[str, str]]:
    """Text encoders and VAE whose weights were to be stored smaller: the form that each has, and how far each form is from float32."""
    rows = []
    for name, part in parts.items():
        errors = ", ".join(f"{form} {_db(value)}" for form, value in part["sqnr_db"].items())
        sizes = f"{part['bytes'] / 2**20:.1f} MiB (float {part['float_bytes'] / 2**20:.1f} MiB)"
        rows.append((name, f"{part['form']}, {sizes}; against fp32: {errors}"))
    return rows


def _onnxruntime_rows(engine: Facts) -> list[tuple[str, str]]:
    quantized, floating = engine["latency_ms"]["p50"], engine["float_latency_ms"]["p50"]
    relaxed = f", relaxed step {engine['relaxed_latency_ms']['p50']:.1f}" if "relaxed_latency_ms" in engine else ""
    where = f"batch {engine['batch']}, {engine['threads']} threads"
    rows = [("onnxruntime ms", f"{quantized:.1f}{relaxed}, FP32 {floating:.1f}: {engine['speedup']:.2f}x ({where})")]
    if "peak_memory_bytes" in engine:
        rows.append(("onnxruntime memory", session_memory(engine)))
    return rows


def _tensorrt_rows(engine: Facts) -> list[tuple[str, str]]:
    if not engine["built"]:
        return [(f"{engine['backend']} {engine['target']}", "not built here")]
    floats = f", {len(engine['float_layers'])} FLOAT" if engine["float_layers"] else ""
    ran = "run on this GPU" if "int8_ms" in engine else "built, not run"
    rows = [
        (
            f"{engine['backend']} {engine['target']}",
            f"{engine['file']}, {engine['int8_layers']} layers INT8{floats}, {engine['engine_bytes'] / 2**20:.1f} MiB; {ran}",
        ),
        (f"{engine['target']} memory", engine_memory(engine)),
    ]
    if "int8_ms" in engine:
        against = f", FP16 {engine['fp16_ms']['p50']:.2f}: {engine['speedup']:.2f}x" if "fp16_ms" in engine else ""
        rows.append((f"{engine['target']} ms", f"{engine['mean_ms']:.2f} (mean over the steps){against}"))
    if "warning" in engine:
        rows.append(("warning", engine["warning"]))
    return rows


def session_memory(engine: Facts) -> str:
    """Memory of onnxruntime's session at most, loading and running once."""
    ours, floats = (engine[name] / 2**20 for name in ("peak_memory_bytes", "float_peak_memory_bytes"))
    return f"{ours:.1f} MiB at most (FP32 {floats:.1f} MiB)"


def engine_memory(engine: Facts) -> str:
    """Device memory of an engine as its builder tells: weights, and activations at the largest shapes that it takes."""
    told = {name: engine[f"{name[:-1]}_bytes"] for name in ("weights", "activations")}
    parts = [f"{size / 2**20:.1f} MiB {name}" for name, size in told.items() if size is not None]
    return " + ".join(parts) or "not told by the builder"


def _quality_rows(quality: Facts) -> list[tuple[str, str]]:
    rows = [("images", f"{quality['n_images']}, extractor {quality['protocol']['extractor'] or 'none'}")]
    if quality["fid_to_fp32"] is not None:
        rows.append(("Frechet distance to FP32", f"{quality['fid_to_fp32']:.4f}"))
        rows.append(("CLIP score", f"{quality['clip_score']:.2f} (FP32 {quality['clip_score_fp32']:.2f})"))
    rows.append(("PSNR to FP32", f"{quality['psnr_db']:.1f} dB, SSIM {quality['ssim']:.3f}"))
    if quality["warning"]:
        rows.append(("note", quality["warning"]))
    return rows


def finite(value: float | None) -> float | None:
    """JSON has no infinity: no error at all is null, too."""
    return None if value is None or value == float("inf") else round(value, 3)


def _sortable(value: float | None) -> float:
    return float("inf") if value is None else value


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
