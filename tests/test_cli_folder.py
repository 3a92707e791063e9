"""What the terminal shows of a folder: the picture of the scales fits, says where they rise, and needs no colours."""

import pytest

from pcr_export.cli_folder import BARS, engine_rows, float_rows, scale_picture


def facts(steps: int, relaxed: tuple[int, ...] = ()) -> dict:
    """Two groups: one whose scales rise from half to twice their mean, one with the same at every step."""
    rising = [2 * step / (steps - 1) - 1 for step in range(steps)]
    groups = [
        {"name": "down.0.resnets", "sites": 3, "log2": rising},
        {"name": "mid", "sites": 12, "log2": [0.0] * steps},
    ]
    return {
        "scales": {"timesteps": list(range(steps, 0, -1)), "groups": groups},
        "activations": {"relaxed_steps": list(relaxed)},
    }


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("steps", [2, 4, 20, 50, 59, 60, 1000])
def test_the_picture_fits_the_terminal(steps, width):
    lines = scale_picture(facts(steps, relaxed=(0,)), width)
    assert max(len(line.plain) for line in lines[:-1]) <= max(width, 60)
    assert all(len(line.plain) <= width for line in lines[2:4])


def test_bars_rise_with_the_scale_and_stand_below_their_steps():
    title, marks, rising, flat, axis, legend = (line.plain for line in scale_picture(facts(20, relaxed=(18, 19)), 80))
    bars = rising.removeprefix("down.0.resnets    3  ")
    assert len(bars) == 40  # two cells a step
    assert bars[::2] == bars[1::2]
    assert [BARS.index(bar) for bar in bars] == sorted(BARS.index(bar) for bar in bars)
    assert (bars[0], bars[-1]) == (BARS[0], BARS[-1])
    assert len(set(flat.removeprefix("mid              12  "))) == 1
    assert "a bar a step" in title
    assert [index for index, mark in enumerate(marks) if mark == "+"] == list(range(21 + 36, 21 + 40))
    assert axis.split() == ["step", "sites", "0", "5", "10", "15"]
    assert axis.index("10") == 21 + 20
    assert "times the site's mean" in legend


def test_more_steps_than_columns_are_joined():
    title, rising, *_ = (line.plain for line in scale_picture(facts(1000), 80))
    assert "17 steps a bar" in title
    assert len(rising) <= 80


ENGINE = {
    "backend": "tensorrt-rtx",
    "version": "1.7.1",
    "target": "sm89",
    "engine_bytes": 3 * 2**20,
    "weight_bytes": 2**20,
    "activation_bytes": 512,
    "int8_layers": 3,
    "float_layers": {},
    "ran": False,
}


def test_engines_with_their_memory():
    cpu = {"backend": "onnxruntime", "target": "cpu", "speedup": 1.5}
    told = {"engines": [cpu, ENGINE, {**ENGINE, "weight_bytes": None, "activation_bytes": None, "mean_ms": 2.0}]}
    rows = engine_rows({**told, "weights": {"onnx_bytes": 2**19}})
    assert rows[0] == ("onnxruntime", "cpu", "512.0 KiB", "", "1.50x FP32 onnxruntime")
    assert rows[1][2:] == ("3.0 MiB", "1.0 MiB weights + 0.5 KiB activations", "3 layers INT8; not run yet")
    assert rows[2][3:] == ("", "3 layers INT8; 2.00 ms")


def test_reasons_of_the_export_and_of_an_engine():
    engine = {**ENGINE, "float_layers": {"conv_in": "runs in Half"}}
    rows = float_rows({"float": {"skipped by name (a*)": list("abcdef")}, "engines": [engine]})
    assert rows == [
        ("skipped by name (a*)", "6", "a, b, c, d and 2 more"),
        ("sm89: runs in Half", "1", "conv_in"),
    ]
