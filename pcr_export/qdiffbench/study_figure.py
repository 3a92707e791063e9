"""The study's drawing: FID to FP32 against mean activation bits, one panel per domain, every point named beside it."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench.report_figures import BLUE, GREEN, GREY, INK, ORANGE, STYLE, to_svg
from pcr_export.write_files import new_file, write_text

DOMAINS = {"in": "in domain", "out": "out of domain"}
ON_WHITE: Any = {**STYLE, "figure.facecolor": "white"}
BITS_AT_LEFT = 8.0  # schemes without relaxed steps; their names stand left of them
LEFT_MARGIN, RIGHT_MARGIN = 1.55, 0.55  # of the horizontal axis, in its own unit sqrt(bits)
LINE_GAP = 0.048  # between two names, as a share of the panel's height
PANEL_SIZE = (6.2, 4.5)  # inches, of one panel
Row = Mapping[str, Any]


def plot_fid_against_bits(study: Mapping[str, Any], path: Path) -> Path:
    """Write the drawing for a page of documentation, as SVG or PNG by the name's ending: on white, panels side by side."""
    domains = domains_of(study["rows"])
    with matplotlib.rc_context(ON_WHITE):
        figure = Figure(figsize=(PANEL_SIZE[0] * len(domains), PANEL_SIZE[1]))
        panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
        _draw_panels(figure, panels, study["rows"], domains)
        if path.suffix == ".png":
            with new_file(path) as png:
                figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        else:
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            write_text(path, re.sub(r"[ \t]+\n", "\n", file.getvalue()))
    return path


def draw_fid_against_bits(rows: Sequence[Row], domain: str) -> str:
    """One domain's panel for a page, as an <svg> element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=PANEL_SIZE)
        _draw_panels(figure, [figure.add_subplot()], rows, [domain])
        return to_svg(figure)


def domain_title(domain: str) -> str:
    """A domain's name in words."""
    return DOMAINS.get(domain, domain)


def domains_of(rows: Sequence[Row]) -> list[str]:
    """The domains of the rows, in their order. Raises PcrExportError where there is no row with an FID."""
    domains = list(dict.fromkeys(row["domain"] for row in rows if row["fid_to_fp32"]))
    if not domains:
        raise PcrExportError("the study has no row with an FID to FP32: nothing can be drawn, run pcr-export study")
    return domains


def _draw_panels(figure: Figure, panels: Sequence[Axes], rows: Sequence[Row], domains: Sequence[str]) -> None:
    rows = [row for row in rows if row["fid_to_fp32"] and row["fid_to_fp32"] > 0]  # the axis is logarithmic
    values = [row["fid_to_fp32"] for row in rows if row["domain"] in domains]
    for axes, domain in zip(panels, domains, strict=True):
        _scale_axes(axes, sorted({row["mean_activation_bits"] for row in rows}), (min(values), max(values)))
        axes.set_title(domain_title(domain), loc="left", fontsize=10)
        _draw_schemes(axes, [row for row in rows if row["domain"] == domain])
    panels[0].set_ylabel("FID to FP32 (lower is better)")
    figure.supxlabel("mean activation bits", fontsize=9)


def _scale_axes(axes: Axes, bits: Sequence[float], fids: tuple[float, float]) -> None:
    """Logarithmic upwards; rightwards the square root of the bits above 8, which keeps 8.1 and 10 on one axis."""
    axes.set_xscale("function", functions=(_stretch, _shrink))
    axes.set_yscale("log")
    axes.set_ylim(fids[0] / 1.25, fids[1] * 1.25)
    axes.set_xlim(_shrink(-LEFT_MARGIN), _shrink(_stretch(max(bits)) + RIGHT_MARGIN))
    apart: list[float] = []
    for each in bits:
        if not apart or _stretch(each) - _stretch(apart[-1]) > 0.11:
            apart.append(each)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(apart, [f"{each:.3g}" for each in apart])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)


def _draw_schemes(axes: Axes, rows: Sequence[Row]) -> None:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["mean_activation_bits"], row["scheme"])):
        families[_family(row["scheme"])].append(row)
    for name, members in families.items():
        points = [(row["mean_activation_bits"], row["fid_to_fp32"]) for row in members]
        color = _color(name)
        hollow = not str(members[0]["bits"]).startswith("w8")
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.1, marker="s" if hollow else "o", markersize=5.5,
                  markerfacecolor="none" if hollow else color, linestyle="-" if len(points) > 1 else "none")  # fmt: skip
    left = [row for row in rows if row["mean_activation_bits"] <= BITS_AT_LEFT]
    ends = [members[-1] for members in families.values() if members[-1]["mean_activation_bits"] > BITS_AT_LEFT]
    _name_points(axes, left, {row["scheme"]: row["scheme"] for row in left}, to_left=True)
    names = {
        row["scheme"]: _family(row["scheme"]) if len(families[_family(row["scheme"])]) > 1 else row["scheme"]
        for row in ends
    }
    _name_points(axes, ends, names, to_left=False)


def _name_points(axes: Axes, rows: Sequence[Row], names: Mapping[str, str], *, to_left: bool) -> None:
    """Each name beside its point, moved up or down as far as the names of its neighbours need, with a line to the point."""
    rows = sorted(rows, key=lambda row: float(row["fid_to_fp32"]))
    low, high = np.log(axes.get_ylim())
    heights = [float((np.log(row["fid_to_fp32"]) - low) / (high - low)) for row in rows]
    for row, height in zip(rows, spread(heights, LINE_GAP), strict=True):
        name = names[row["scheme"]]
        axes.annotate(
            name,
            xy=(row["mean_activation_bits"], row["fid_to_fp32"]),
            xytext=(
                -22 if to_left else 8,
                (height - heights[rows.index(row)]) * axes.bbox.height * 72 / axes.figure.dpi,
            ),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            color=_color(_family(row["scheme"])),
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (1, 0.5),
            }
            if to_left
            else None,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights in 0..1, moved apart to at least `gap` with the least shift of each cluster's middle."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) - _top(clusters[-2], gap) < gap:
            last = clusters.pop()
            clusters[-1] += last
    return [_bottom(cluster, gap) + gap * index for cluster in clusters for index in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    bottom = sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2
    return min(max(bottom, 0.0), 1.0 - gap * (len(cluster) - 1))


def _top(cluster: Sequence[float], gap: float) -> float:
    return _bottom(cluster, gap) + gap * (len(cluster) - 1)


def _family(scheme: str) -> str:
    """Schemes that differ only in how many steps are relaxed: pcr-last-5 and pcr-last-20 are pcr-last."""
    return re.sub(r"-\d+(?=-w\d|$)", "", scheme)


def _color(scheme: str) -> str:
    colors = {"static": GREY, "per": BLUE, "pcr": GREEN}
    return ORANGE if scheme.startswith("pcr-first") else colors.get(scheme.split("-")[0], INK)


def _stretch(bits: Any) -> Any:
    return np.sign(np.asarray(bits) - 8) * np.sqrt(np.abs(np.asarray(bits) - 8))


def _shrink(place: Any) -> Any:
    return 8 + np.sign(place) * np.square(place)
