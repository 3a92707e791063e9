"""The commands that look into an exported folder, and how a terminal shows what they find. Heavy imports wait until one runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from pcr_export.relaxed_steps import format_steps
from pcr_export.report import part_rows, sampling_words
from pcr_export.stop_signals import importing
from pcr_export.terminal import can_show, console, print_rows, printable, say

Facts = Mapping[str, Any]
BARS = "▁▂▃▄▅▆▇█"  # a scale far below its mean to one far above: readable without colours, too
ASCII_BARS = "12345678"
COLORS = ("blue", "bright_blue", "cyan", "white", "white", "yellow", "bright_red", "red")
FEWEST_CELLS = 8
NOT_INSTALLED = "not installed"  # as report.json has it


def inspect(
    folder: Annotated[Path, typer.Argument(help="an exported folder, e.g. engines/tiny-sdxl-w8a8")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON, each layer and file too")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """Show what is in an exported folder: sites, bits, scales by step, why layers are float, versions, hashes, engines."""
    with importing():
        from pcr_export.deploy.inspect_folder import inspect_folder
    facts = inspect_folder(folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    print_rows(summary_rows(facts), str(folder))
    say(*scale_picture(facts, console.width, BARS if can_show(BARS) else ASCII_BARS))
    if floats := float_rows(facts):
        print_rows(floats, "layers that stay float, and why")
    print_rows(engine_rows(facts), "engines")
    print_rows(file_rows(facts), "files")


def verify(
    folder: Annotated[Path, typer.Argument(help="an exported folder, e.g. engines/tiny-sdxl-w8a8")],
    image: Annotated[bool, typer.Option(help="paint the stored image again and compare")] = True,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """Check an exported folder: hashes, signatures of its graphs, engines, and one image against the stored one."""
    with importing():
        from pcr_export.deploy.verify import verify_folder
    for what, found in verify_folder(folder, paint=image):
        say(f"ok  {what:9}  {found}")


def summary_rows(facts: Facts) -> list[tuple[str, str]]:
    """What the folder is, in a dozen lines."""
    recipe, weights, activations = facts["recipe"], facts["weights"], facts["activations"]
    layers = ", ".join(f"{count} {bits}" for bits, count in weights["layers_by_bits"].items())
    relaxed = activations["relaxed_steps"]
    versions = facts["versions"]
    return [
        ("model", f"{facts['model']} ({facts['pipeline'] or 'a denoiser of its own'})"),
        (
            "sampling",
            f"{sampling_words(recipe)}, {recipe['width']}x{recipe['height']} pixels",
        ),
        ("layers", f"{layers}; {weights['sites']} sites"),
        ("weights", f"{recipe['weight_bits']} bits, {recipe['weights']}"),
        ("activations", f"{recipe['activation_bits']} bits, {activations['mean_bits']:.2f} on average"),
        ("relaxed steps", f"{format_steps(relaxed)} ({recipe['relax_bits']} bits)" if relaxed else "none"),
        ("scales", f"{recipe['scheme']}, ranges by {recipe['ranges']}, {recipe['calib_size']} prompts"),
        ("UNet file", f"{_mib(weights['onnx_bytes'])} (float {_mib(weights['float_bytes'])})"),
        *part_rows(facts["other_parts"]),
        ("recipe", f"sha256 {recipe['hash'][:16]}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items() if version != NOT_INSTALLED)),
    ]


def scale_picture(facts: Facts, width: int, shades: str = BARS) -> list[Text]:
    """Scales by step as lines of at most `width` columns: a row for each part of the network, a bar for each step.

    Where the steps are more than the columns, a bar is the mean of neighbouring steps.
    """
    groups, relaxed = facts["scales"]["groups"], set(facts["activations"]["relaxed_steps"])
    steps = len(facts["scales"]["timesteps"])
    names = [printable(group["name"]) for group in groups]
    label = min(max(map(len, names)), max(width - 2 * FEWEST_CELLS, FEWEST_CELLS))
    room = max(width - label - 7, FEWEST_CELLS)
    per_bar = -(-steps // room)
    bars = [range(start, min(start + per_bar, steps)) for start in range(0, steps, per_bar)]
    cell = min(3, max(1, room // len(bars)))
    rows = [[sum(group["log2"][step] for step in bar) / len(bar) for bar in bars] for group in groups]
    sizes = sorted(abs(value) for row in rows for value in row)
    limit = max(0.1, sizes[int(0.95 * (len(sizes) - 1))])  # a few rows that change far more would hide the others
    lines = [Text(f"scales by step (0 = noisiest), {'a bar a step' if per_bar == 1 else f'{per_bar} steps a bar'}")]
    if relaxed:
        marks = "".join(("+" if relaxed & set(bar) else " ") * cell for bar in bars)
        lines.append(Text(f"{'relaxed':{label}}       ") + Text(marks, "bright_yellow"))
    for name, group, row in zip(names, groups, rows, strict=True):
        line = Text(f"{name[:label]:{label}} {group['sites']:>4}  ")
        for value in row:
            level = round((min(max(value / limit, -1), 1) + 1) / 2 * (len(shades) - 1))
            line.append(shades[level] * cell, COLORS[level])
        lines.append(line)
    lines.append(Text(f"{'step':{label}} sites " + _step_axis(bars, cell)))
    low, high = f"{shades[0]} {2**-limit:.2f} or less", f"{shades[-1]} {2**limit:.2f} or more"
    lines.append(Text(f"{low}, {high}, times the site's mean over the steps"))
    return lines


def float_rows(facts: Facts) -> list[tuple[str, ...]]:
    """Why layers stayed float at the export, and in the engines that were built nevertheless: reason, how many, which."""
    rows = [(reason, str(len(names)), _names(names)) for reason, names in facts["float"].items()]
    engines = ((engine["target"], engine.get("float_layers") or {}) for engine in facts["engines"])
    return rows + [(f"{target}: {reason}", "1", name) for target, some in engines for name, reason in some.items()]


def engine_rows(facts: Facts) -> list[tuple[str, ...]]:
    """Each engine: what it is, its size, its memory, and how fast it was where that was measured."""
    rows: list[tuple[str, ...]] = []
    for engine in facts["engines"]:
        if engine["backend"] == "onnxruntime":
            speed = f"{engine['speedup']:.2f}x FP32 onnxruntime" if "speedup" in engine else "not timed"
            memory = f"{_mib(engine['peak_memory_bytes'])} at most" if "peak_memory_bytes" in engine else ""
            rows.append(("onnxruntime", "cpu", _mib(facts["weights"]["onnx_bytes"]), memory, speed))
            continue
        memory = " + ".join(
            f"{_mib(engine[key])} {word}"
            for key, word in (("weight_bytes", "weights"), ("activation_bytes", "activations"))
            if engine[key] is not None
        )
        speed = f"{engine['mean_ms']:.2f} ms" if "mean_ms" in engine else "has run" if engine["ran"] else "not run yet"
        floats = f", {len(engine['float_layers'])} FLOAT" if engine["float_layers"] else ""
        layers = f"{engine['int8_layers']} layers INT8{floats}"
        library = f"{engine['backend']} {engine['version']}"
        rows.append((library, engine["target"], _mib(engine["engine_bytes"]), memory, f"{layers}; {speed}"))
    return rows


def file_rows(facts: Facts) -> list[tuple[str, ...]]:
    """The bytes of each part, and the hashes of the graphs."""
    graphs = {name: listed["sha256"] for name, listed in facts["files"].items() if name.startswith("unet/model.onnx")}
    rows = [(part, _mib(size), "") for part, size in facts["parts"].items()]
    return [*rows, *((name, _mib(facts["files"][name]["bytes"]), digest[:16]) for name, digest in graphs.items())]


def _step_axis(bars: Sequence[range], cell: int) -> str:
    """The first step of every so many bars, below them."""
    every = next(each for each in (1, 2, 5, 10, 20, 50, 100, 1000) if each * cell >= 5)
    marks = [f"{bars[index].start:<{every * cell}}" for index in range(0, len(bars), every)]
    return "".join(marks).rstrip()


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
