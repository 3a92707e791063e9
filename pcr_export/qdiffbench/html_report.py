"""report.html of an exported folder: figures, image pairs, scales, error by step and where the bits went, on one page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.path_inside import path_inside
from pcr_export.qdiffbench.image_pairs import PairGroup, choose_pairs
from pcr_export.qdiffbench.metrics import METRICS, NOT_MEASURED, format_metric
from pcr_export.qdiffbench.page import Chart, Section, Table, write_page
from pcr_export.qdiffbench.report_figures import draw_bits, draw_error_by_step, draw_scales, draw_sensitivity
from pcr_export.qdiffbench.scores import PerImage
from pcr_export.read_files import read_json
from pcr_export.relaxed_steps import format_steps
from pcr_export.report import AGAIN, NO_REASON, engine_memory, read_facts, read_report, sampling_words, summary_rows
from pcr_export.report_schema import Evaluation, Sensitivity
from pcr_export.report_schema import PerImage as PerImageFacts
from pcr_export.step_scales import StepScales, read_step_scales

NAME = "report.html"
Facts = Mapping[str, Any]


def write_html_report(folder: Path) -> Path:
    """Write FOLDER/report.html from the files of an exported folder. The same files give the same bytes.

    It reads report.json and step_scales.safetensors, and where they exist evaluation.json with its images and
    sensitivity.json. A page without an evaluation shows the images of the export's own validation.

    Raises:
        PcrExportError: a file is missing or damaged, or was written by another version.
    """
    report = read_report(folder)
    scales = read_step_scales(folder / "step_scales.safetensors")
    relaxed = [step for step, bits in enumerate(scales.bits.tolist()) if bits > 8]
    with reading(folder / "report.json"):
        recipe = report["recipe"]
        title = f"{report['model']}: quantized to {recipe['weight_bits']}-bit weights, {recipe['activation_bits']}-bit activations"
        summary = _summary(report, recipe, scales, relaxed)
        sections = [
            *_quality_sections(folder, report),
            _scales_section(scales, relaxed),
            _error_section(folder, report, recipe, relaxed),
            _bits_section(report, recipe, scales, relaxed),
            *_engine_sections(report),
        ]
    return write_page(folder / NAME, title, summary, sections)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a field that is missing or of another kind into the one line that says which file has it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PcrExportError(
            f"{path} was written by another version or is damaged ({type(error).__name__}: {error}): write it again"
        ) from error


def protocol_table(protocol: Facts, caption: str) -> Table:
    """How the figures were measured, nested names joined by dots."""
    return Table(caption=caption, head=(), rows=list(_flatten(protocol)), numeric=False)


def _flatten(facts: Facts, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary(report: Facts, recipe: Facts, scales: StepScales, relaxed: Sequence[int]) -> list[tuple[str, str]]:
    rows = dict(summary_rows({**report, "fidelity": None, "quality": None}))
    return [
        ("image", f"{recipe['width']} x {recipe['height']} pixels"),
        ("sampling", sampling_words(recipe)),
        ("scales", f"{recipe['scheme']}, ranges by {recipe['ranges']}"),
        ("relaxed steps", f"{format_steps(relaxed)}; {scales.bits.mean():.2f} activation bits on average"),
        *((name, value) for name, value in rows.items() if name not in ("model", "relaxed steps")),
        ("recipe", f"sha256 {report['recipe']['hash'][:16]}"),
    ]


def _quality_sections(folder: Path, report: Facts) -> list[Section]:
    path = folder / "evaluation.json"
    if not path.exists():
        return _validation_sections(folder, report)
    evaluation = read_facts(path, Evaluation)
    with reading(path):
        domains = evaluation["domains"]
        names = [domain["name"] for domain in domains]
        scores = [domain["scores"] for domain in domains]
        notes = [f"Measured by: {evaluation['command']}", *_warnings(scores)]
        about = [
            protocol_table(
                {
                    "seed": evaluation["seed"],
                    "prompts": domain["prompts_file"],
                    "prompts sha256": domain["prompts_sha256"],
                    **domain["scores"]["protocol"],
                },
                f"Protocol, {name}",
            )
            for name, domain in zip(names, domains, strict=True)
        ]
        groups, missing = [], []
        for name, domain in zip(names, domains, strict=True):
            group = _evaluated_pairs(folder, domain, name)
            groups.extend([group] if group else [])
            missing.extend([] if group else [f"The images of {name} are no longer in the folder."])
    return [
        Section(heading="Figures", notes=notes, tables=[_figures_table(names, scores)]),
        Section(heading="Worst, median and best images", notes=[_order_note(groups), *missing], groups=groups),
        Section(heading="Protocol", tables=about),
    ]


def _evaluated_pairs(folder: Path, domain: Facts, title: str) -> PairGroup | None:
    """The pairs of one domain; None where its images were deleted."""
    names, source = ("fp32", "artifact", "per_image"), folder / "evaluation.json"
    reference, quantized, per_image = (path_inside(folder, domain[name], source) for name in names)
    if not (reference.is_dir() and quantized.is_dir()):
        return None
    return read_pairs(title, reference, quantized, per_image)


def read_pairs(title: str, reference: Path, quantized: Path, per_image: Path) -> PairGroup:
    """The worst, median and best pairs of two folders by the figures in `per_image`. Raises PcrExportError where that is damaged."""
    facts = read_json(per_image, PerImageFacts, advice=AGAIN)
    with reading(per_image):
        return PairGroup(title=title, pairs=choose_pairs(reference, quantized, PerImage(**facts)))


def _validation_sections(folder: Path, report: Facts) -> list[Section]:
    """What the export's own validation says, where there is no evaluation."""
    no_evaluation = f"This folder has not been evaluated yet: run pcr-export evaluate {folder.name}."
    quality = report["quality"]
    if not quality:
        return [Section(heading="Figures", notes=[no_evaluation, "It was exported without validation, too."])]
    notes = [
        f"{no_evaluation} Until then, the figures are those of the validation at the export.",
        *_warnings([quality]),
    ]
    figures = Section(heading="Figures", notes=notes, tables=[_figures_table(["validation"], [quality])])
    protocol = Section(heading="Protocol", tables=[protocol_table(quality["protocol"], "Protocol of the validation")])
    images = folder / "images"
    there = all((images / name).exists() for name in ("float", "int8", "per_image.json"))
    groups = [read_pairs("", images / "float", images / "int8", images / "per_image.json")] if there else []
    pairs = Section(heading="Worst, median and best images", notes=[_order_note(groups)], groups=groups)
    return [figures, pairs, protocol]


def _order_note(groups: Sequence[PairGroup]) -> str:
    """What the pairs are ordered by."""
    pairs = [pair for group in groups for pair in group.pairs]
    if not pairs:
        return "There are no images to show."
    by = "LPIPS" if all(pair.lpips is not None for pair in pairs) else "PSNR, as LPIPS was not measured"
    return f"Both images of a pair are painted from the same prompt and noise. Ordered by {by}."


def _figures_table(names: Sequence[str], scores: Sequence[Facts]) -> Table:
    rows = [
        (metric.head, *(format_metric(name, each) for each in scores))
        for name, metric in METRICS.items()
        if any(each.get(name) is not None for each in scores)
    ]
    return Table(caption="The exported artifact; ↓ lower is better, ↑ higher is better", head=("", *names), rows=rows)


def _warnings(scores: Sequence[Facts]) -> list[str]:
    return [f"Note: {warning}." for warning in dict.fromkeys(each.get("warning") for each in scores) if warning]


def _scales_section(scales: StepScales, relaxed: Sequence[int]) -> Section:
    chart = Chart(
        svg=draw_scales(scales),
        alt=f"Heat map of the activation scales of {len(scales.sites)} sites over {scales.num_steps} steps",
        caption=f"{len(scales.sites)} sites from the network's input (top) to its output. Red: a scale above the site's "
        f"geometric mean over the steps; blue: below it.{' Orange bar: relaxed steps.' if relaxed else ''}",
    )
    return Section(heading="Scale by step", charts=[chart])


def _error_section(folder: Path, report: Facts, recipe: Facts, relaxed: Sequence[int]) -> Section:
    notes, charts = [], []
    fidelity = report["fidelity"]
    if fidelity:
        by_step = (fidelity["simulation_vs_fp32_per_step"], fidelity["per_step"])
        lowest = [min((value for value in values if value is not None), default=None) for values in by_step]
        said = " and ".join("no error" if value is None else f"{value:.1f} dB at the worst step" for value in lowest)
        charts.append(
            Chart(
                svg=draw_error_by_step(*by_step, relaxed, _asked(fidelity, recipe)),
                alt=f"Signal to error ratio by step: simulation to FP32 and artifact to simulation have {said}",
                caption="Signal to error ratio of the UNet's output at each step; higher is better. Shaded: relaxed steps.",
            )
        )
    else:
        notes.append("The error by step was not measured: the folder was exported without validation.")
    path = folder / "sensitivity.json"
    if path.exists():
        charts.append(_sensitivity_chart(path, relaxed))
    else:
        notes.append("The sensitivity of each step was not measured: an export with --relax auto:8.4 does that.")
    return Section(heading="Error by step", notes=notes, charts=charts)


def _asked(fidelity: Facts, recipe: Facts) -> list[float]:
    """The least SQNR of the artifact at each step, in dB; reports of before have one for all steps."""
    steps = len(fidelity["per_step"])
    if recipe["min_sqnr_db"] is not None:
        return [recipe["min_sqnr_db"]] * steps
    return list(fidelity["asked_per_step"])


def _sensitivity_chart(path: Path, relaxed: Sequence[int]) -> Chart:
    sensitivity = read_json(path, Sensitivity, advice=AGAIN)
    with reading(path):
        gains = [float(row["gain"]) for row in sensitivity["steps"]]
        best = max(range(len(gains)), key=gains.__getitem__)
        return Chart(
            svg=draw_sensitivity(gains, relaxed),
            alt=f"Error removed by relaxing each step alone; most at step {best}",
            caption=f"What relaxing one step alone to {sensitivity['relax_bits']} bits takes off the mean squared error of the "
            f"final latents to FP32 ({sensitivity['base_error']:.3g} with none relaxed; {sensitivity['prompts']} prompts). "
            f"Orange: below zero.",
        )


def _bits_section(report: Facts, recipe: Facts, scales: StepScales, relaxed: Sequence[int]) -> Section:
    bits, layers, graph = scales.bits.tolist(), report["sites"], report["graph"]
    chart = Chart(
        svg=draw_bits(bits),
        alt=f"Activation bits by step: {scales.bits.mean():.2f} on average, relaxed are {format_steps(relaxed)}",
        caption=f"Activation bits of each step, {scales.bits.mean():.2f} on average.",
    )
    by_width: dict[str, list[Facts]] = defaultdict(list)
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        by_width[layer["bits"]].append(layer)
        if not layer["quantized"]:
            reasons[layer["reason"] or NO_REASON].append(layer["name"])
    widths = [
        (
            width,
            str(len(some)),
            str(len({each["site"] for each in some if each["site"]})) if width != "float32" else NOT_MEASURED,
        )
        for width, some in by_width.items()
    ]
    floats = [(reason, str(len(names)), ", ".join(names)) for reason, names in reasons.items()]
    notes = [
        f"Weights have {recipe['weight_bits']} bits, activations {recipe['activation_bits']}, "
        f"{recipe['relax_bits']} at {len(relaxed)} relaxed steps. "
        f"The UNet's file has {graph['onnx_bytes'] / 2**20:.1f} MiB; in float it had {graph['float_bytes'] / 2**20:.1f} MiB.",
        *([] if floats else ["No layer stayed float."]),
    ]
    tables = [Table(caption="Layers by bit width", head=("bits", "layers", "sites"), rows=widths)]
    if floats:
        head = ("reason", "layers", "names")
        tables.append(Table(caption="Layers that stay float", head=head, rows=floats, numeric=False))
    return Section(heading="Where the bits went", notes=notes, charts=[chart], tables=tables)


def _engine_sections(report: Facts) -> list[Section]:
    """Size and memory of each TensorRT engine; no section where there is none."""
    built = [engine for engine in report["engines"] if engine["backend"] != "onnxruntime" and engine["built"]]
    rows = [
        (
            f"{engine['backend']} {engine['version']}",
            engine["target"],
            f"{engine['engine_bytes'] / 2**20:.1f} MiB",
            engine_memory(engine),
            f"{engine['int8_layers']} INT8, {len(engine['float_layers'])} float",
            f"{engine['mean_ms']:.2f} ms" if "mean_ms" in engine else "not run",
        )
        for engine in built
    ]
    head = ("library", "GPU", "file", "device memory", "layers", "mean step")
    table = Table(caption="One engine per GPU, memory as its builder tells", head=head, rows=rows, numeric=False)
    return [Section(heading="Engines", tables=[table])] if rows else []
