"""The study as one page: every scheme in every domain, FID to FP32 against mean bits, calibration sets, pairs of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcr_export.qdiffbench.html_report import protocol_table, reading
from pcr_export.qdiffbench.image_pairs import PairGroup
from pcr_export.qdiffbench.metrics import METRICS, NOT_MEASURED, format_metric
from pcr_export.qdiffbench.page import Chart, Section, Table, write_page
from pcr_export.qdiffbench.study_figure import domain_title, domains_of, draw_fid_against_bits
from pcr_export.relaxed_steps import format_steps

SHOWN = ("fid_to_fp32", "kid_to_fp32", "clip_score", "psnr_db", "ssim", "lpips")  # in columns of wide tables
COLUMNS = (1, 6, 7, 8, 9, 10)  # of these in the table of schemes
Facts = Mapping[str, Any]


def write_study_report(study: Facts, path: Path, *, pairs: Sequence[PairGroup] = ()) -> Path:
    """Write the page of a study's JSON. The same study and pairs give the same bytes.

    Args:
        study: {model, command, hardware, rows, protocol, ...} as `run_study` returns it; sections that it lacks are left out.
        path: of the page.
        pairs: images of chosen schemes beside those of the float model, from `choose_pairs`.

    Raises:
        PcrExportError: the study has no row with an FID, or lacks a field.
    """
    with reading(path.with_suffix(".json")):
        rows = study["rows"]
        domains = domains_of(rows)
        counts = sorted({row["n_images"] for row in rows})
        summary = [
            ("command", study.get("command") or "not recorded"),
            ("hardware", study.get("hardware") or "not recorded"),
            ("images", f"{', '.join(map(str, counts))} for each scheme and domain"),
        ]
        sections = [
            _schemes_section(rows, domains, study.get("reference", {}), study.get("scale_bars", ())),
            _bits_section(rows, domains),
            *_further_sections(study),
        ]
        if pairs:
            note = "Both images of a pair are painted from the same prompt and noise: the worst, median and best prompts by LPIPS."
            sections.append(Section(heading="Worst, median and best images", notes=[note], groups=pairs))
        if study.get("protocol"):
            table = protocol_table(study["protocol"], "How the figures were measured")
            sections.append(Section(heading="Protocol", tables=[table]))
        title = f"{study['model']}: schemes of quantization compared"
    return write_page(path, title, summary, sections)


def _schemes_section(rows: Sequence[Facts], domains: Sequence[str], reference: Facts, bars: Sequence[Facts]) -> Section:
    notes = [
        "All figures but the CLIP score are to the FP32 model's images. ↓ lower is better, ↑ higher is better. "
        "The best figure of a column is bold, for each weight width apart."
    ]
    tables = []
    for domain in domains:
        name = domain_title(domain)
        tables.append(_schemes_table([row for row in rows if row["domain"] == domain], f"Schemes, {name}"))
        clip = reference.get(domain, {}).get("clip_score")
        if clip is not None:
            notes.append(f"CLIP score of the FP32 model {name}: {clip:.2f}.")
    if bars:
        cells = [(_cell(bar["scheme"]), domain_title(bar["domain"]), *_figures(bar)) for bar in bars]
        head = ("float model", "domain", *_heads())
        tables.append(Table(caption="To read the figures against: the float model itself", head=head, rows=cells))
    return Section(heading="Figures", notes=notes, tables=tables)


def _schemes_table(rows: Sequence[Facts], caption: str) -> Table:
    """One row per scheme; its FID beside that of the best static scheme of the same bits."""
    cells, best = [], set()
    for row in rows:
        steps = format_steps(row["relaxed_steps"])
        about = (row["bits"], f"{row['mean_activation_bits']:.2f}", steps)
        fid, *others = _figures(row)
        cells.append((row["scheme"], fid, _against_static(row, rows), *about, *others))
    for bits in dict.fromkeys(row["bits"] for row in rows):
        some = [index for index, row in enumerate(rows) if row["bits"] == bits]
        for field, column in zip(SHOWN, COLUMNS, strict=True):
            known = {index: rows[index][field] for index in some if rows[index][field] is not None}
            if known:
                choose = max if METRICS[field].better == "↑" else min
                best.add((choose(known, key=known.__getitem__), column))
    fid_head, *heads = _heads()
    head = ("scheme", fid_head, "to best static", "bits", "mean activation bits", "relaxed steps", *heads)
    return Table(caption=caption, head=head, rows=cells, best=frozenset(best))


def _against_static(row: Facts, rows: Sequence[Facts]) -> str:
    """By how many percent the FID is above or below that of the best static scheme with the same bits."""
    static = [
        each["fid_to_fp32"]
        for each in rows
        if each["scheme"].startswith("static-") and each["bits"] == row["bits"] and each["fid_to_fp32"]
    ]
    if not static or row["fid_to_fp32"] is None:
        return NOT_MEASURED
    change = 100 * (row["fid_to_fp32"] / min(static) - 1)
    return "0 %" if change == 0 else f"{change:+.0f} %".replace("-", "\N{MINUS SIGN}")


def _bits_section(rows: Sequence[Facts], domains: Sequence[str]) -> Section:
    charts = [
        Chart(
            svg=draw_fid_against_bits(rows, domain),
            alt=f"FID to FP32 against mean activation bits of all schemes, {domain_title(domain)}; figures in the table",
            caption=f"{domain_title(domain).capitalize()}. Filled: 8-bit weights; hollow: fewer. Lines join schemes that "
            "differ in how many steps are relaxed.",
            wide=True,
        )
        for domain in domains
    ]
    return Section(heading="FID to FP32 against mean bits", charts=charts)


def _further_sections(study: Facts) -> list[Section]:
    """Calibration sets, and the artifact beside its simulation; what was not measured is said in a line."""
    labels = _heads()
    sets, missing = study.get("calibration_sets", ()), []
    sections = []
    if sets:
        cells = [
            (
                f"{row['prompts']} prompts, {row['domain']}",
                domain_title(row["eval_domain"]),
                *_figures(row),
            )
            for row in sets
        ]
        table = Table(
            caption="Size and domain of the calibration set", head=("calibrated on", "evaluated", *labels), rows=cells
        )
        sections.append(Section(heading="Calibration sets", tables=[table]))
    else:
        missing.append("Calibration sets of other sizes and domains were not measured.")
    simulation = study.get("simulation", ())
    if simulation:
        cells = [
            (f"{row['scheme']}, {'simulation' if row['simulated'] else 'artifact'}", str(row["seed"]), *_figures(row))
            for row in simulation
        ]
        caption = "The same scheme, calibrated with several seeds, as exported artifact and as simulation"
        table = Table(caption=caption, head=("what painted", "seed", *labels), rows=cells)
        sections.append(Section(heading="Artifact and simulation", tables=[table]))
    else:
        missing.append("The artifact was not compared with its simulation over several seeds.")
    return [*sections, Section(heading="Not measured", notes=missing)] if missing else sections


def _figures(row: Facts) -> tuple[str, ...]:
    return tuple(format_metric(name, row) for name in SHOWN)


def _heads() -> tuple[str, ...]:
    return tuple(METRICS[name].short_head for name in SHOWN)


def _cell(scheme: str) -> str:
    """fp32-other-noise is "FP32, other noise"."""
    precision, _, rest = scheme.partition("-")
    return ", ".join(filter(None, (precision.upper(), rest.replace("-", " "))))
