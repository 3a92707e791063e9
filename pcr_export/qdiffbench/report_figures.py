"""The drawings of report.html as SVG text: scales, error, sensitivity and bits by step. Same figures, same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pcr_export.sites import block_of
from pcr_export.step_scales import StepScales

INK = "#1b1f26"  # of text and axes; on a page it becomes the page's own text colour
BLUE, ORANGE, GREEN, GREY = "#2f80c9", "#d9772b", "#2a9d6f", "#8a8f98"  # seen on white and on black
PHONE_WIDTH = 4.0  # inches: at the width of a phone the 9 point text stays readable
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
STYLE: Any = {  # matplotlib types its settings by their names
    "svg.hashsalt": "pcr-export",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def to_svg(figure: Figure) -> str:
    """An <svg> element in the page's text colour, without ids that a second one would repeat."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_NO_METADATA)
    text = file.getvalue()
    text = re.sub(r"<g id=\"[\w.-]*\"", "<g", text[text.index("<svg") :])
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text)  # it would style the whole page
    return text.replace(INK, "currentColor").replace("<svg ", '<svg stroke-linejoin="round" ', 1)


def draw_scales(scales: StepScales) -> str:
    """log2(scale / geometric mean of the site over the steps): sites downwards in the order of the network, steps rightwards."""
    image = scales.deviation().T  # float64 [num_sites, num_steps]
    limit = max(0.5, float(np.ceil(2 * np.abs(image).max()) / 2))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PHONE_WIDTH, min(5.6, 2.2 + 0.1 * len(scales.sites))))
        axes = figure.add_subplot()
        shown = axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
        starts = _block_starts(scales.sites, fewest=max(1, len(scales.sites) // 28))
        axes.set_yticks([start - 0.5 for start, _ in starts], [name for _, name in starts], va="top", fontsize=7.5)
        axes.tick_params(axis="y", length=4, width=0.5)
        for start, _ in starts[1:]:
            axes.axhline(start - 0.5, color=INK, linewidth=0.4, alpha=0.5)
        _label_steps(axes, scales.num_steps)
        _mark_relaxed(axes, np.flatnonzero(scales.bits > 8).tolist(), image=True)
        bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=32, pad=0.02)
        bar.set_label("log2 of scale / its mean over steps")
        bar.outline.set_visible(False)
        return to_svg(figure)


def draw_error_by_step(
    to_fp32: Sequence[float | None],
    to_simulation: Sequence[float | None],
    relaxed: Sequence[int],
    asked: Sequence[float],
) -> str:
    """Signal to error in dB of each step's output, higher is better; None (no error) is a gap.

    Args:
        to_fp32: the simulation against the float model.
        to_simulation: the exported artifact against its simulation.
        asked: of the artifact at each step; below it, the validation fails.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PHONE_WIDTH, 2.9))
        axes = figure.add_subplot()
        lines = (("artifact to simulation", to_simulation, GREEN, "o"), ("simulation to FP32", to_fp32, BLUE, "s"))
        for label, values, color, marker in lines:
            heights = np.array([np.nan if value is None else value for value in values])
            axes.plot(heights, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axes.plot(asked, color=ORANGE, linewidth=1, linestyle="--", label="validation fails below")
        _label_steps(axes, len(to_fp32))
        _mark_relaxed(axes, relaxed)
        axes.set_ylabel("signal to error, dB")
        figure.legend(loc="outside upper left", fontsize=8.5, borderpad=0)
        return to_svg(figure)


def draw_sensitivity(gains: Sequence[float], relaxed: Sequence[int]) -> str:
    """By how much relaxing each step alone lowers the error of the final latents; below zero it raises it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PHONE_WIDTH, 2.5))
        axes = figure.add_subplot()
        colors = [BLUE if gain > 0 else ORANGE for gain in gains]
        axes.bar(range(len(gains)), gains, color=colors, width=0.75)
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _label_steps(axes, len(gains))
        _mark_relaxed(axes, relaxed)
        axes.set_ylabel("error removed")
        return to_svg(figure)


def draw_bits(bits: Sequence[int]) -> str:
    """Activation bits of each step."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PHONE_WIDTH, 1.9))
        axes = figure.add_subplot()
        axes.bar(range(len(bits)), bits, color=[BLUE if each == 8 else ORANGE for each in bits], width=0.75)
        for step, each in enumerate(bits if len(bits) <= 25 else ()):
            axes.text(step, each + 0.2, str(each), ha="center", va="bottom", fontsize=8)
        axes.set_ylim(0, max(bits) * 1.15)
        _label_steps(axes, len(bits))
        axes.set_ylabel("activation bits")
        return to_svg(figure)


def _block_starts(sites: Sequence[str], fewest: int) -> list[tuple[int, str]]:
    """(first site, name) of each block of the network; one of less than `fewest` sites after the last name goes unnamed."""
    blocks = [block_of(site) for site in sites]
    starts: list[tuple[int, str]] = []
    for index, block in enumerate(blocks):
        is_new = index == 0 or block != blocks[index - 1]
        if is_new and (not starts or index - starts[-1][0] >= fewest):
            starts.append((index, block))
    return starts


def _label_steps(axes: Axes, num_steps: int) -> None:
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, 500) if num_steps / stride <= 12 or stride == 500)
    axes.set_xticks(range(0, num_steps, stride))
    axes.set_xlim(-0.6, num_steps - 0.4)
    axes.set_xlabel("step (0 = noisiest)")


def _mark_relaxed(axes: Axes, relaxed: Sequence[int], *, image: bool = False) -> None:
    """A shaded band behind relaxed steps; on an image, a bar above them."""
    for step in relaxed:
        if image:
            axes.plot([step - 0.5, step + 0.5], [1.008, 1.008], color=ORANGE, linewidth=4, clip_on=False,
                      transform=axes.get_xaxis_transform(), solid_capstyle="butt")  # fmt: skip
        else:
            axes.axvspan(step - 0.5, step + 0.5, color=ORANGE, alpha=0.16, linewidth=0, zorder=0)
    if relaxed:
        middle = float(np.mean(relaxed)) if relaxed[-1] - relaxed[0] + 1 == len(relaxed) else relaxed[-1]
        axes.text(middle, 1.02, "relaxed", color=ORANGE, ha="center", va="bottom", fontsize=8.5,
                  transform=axes.get_xaxis_transform())  # fmt: skip
