"""README's figures are those that the benchmarks wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_study_table_is_the_studys():
    study = json.loads((RESULTS / "study-tiny-sdxl.json").read_text())
    schemes = {row["scheme"]: {} for row in study["rows"]}
    for row in study["rows"]:
        assert row["n_images"] == 2048
        schemes[row["scheme"]][row["domain"]] = row
    assert {"static", "pcr"} <= {name.split("-")[0] for name in schemes}
    for name, rows in schemes.items():
        inside, outside = rows["in"], rows["out"]
        pairs = (
            (inside[key], outside[key], digits)
            for key, digits in (("fid_to_fp32", 4), ("clip_score", 2), ("psnr_db", 2))
        )
        figures = " | ".join(f"{a:.{digits}f} | {b:.{digits}f}" for a, b, digits in pairs)
        rest = f"{inside['ssim']:.4f} | {inside['lpips']:.5f}"
        assert f"| {name} | {inside['mean_activation_bits']:g} | {figures} | {rest} |" in README
    for domain, facts in study["reference"].items():
        assert f"{facts['clip_score']:.2f} {domain}" in README


def test_weights_table_is_the_benchmarks():
    rows = json.loads((RESULTS / "weight_bits.json").read_text())["rows"]
    expected = {"w8", "w5", "w4", "w4-keep-5bit", "w4-two-rounds", "w4-adaround", "w4-rtn"}
    assert expected <= {row["weights"] for row in rows}
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        scores = f"{row['fid_to_fp32']:.4f} | {row['clip_score']:.2f} | {row['psnr_db']:.2f} | {row['other_pictures']}"
        costs = f"{row['onnx_bytes'] / 1e6:.1f} | {row['calibration_seconds']:.0f}"
        unet = " | ".join(f"{row[name]:.4f}" for name in ("unconditional", "difference", "guided"))
        line = f"| {row['weights']} | {row['mean_weight_bits']:.3g} | {scores} | {costs} | {error} | {unet} |"
        assert line in README


def test_latency_table_is_the_benchmarks():
    rows = json.loads((RESULTS / "cpu_latency.json").read_text())["rows"]
    assert len(rows) >= 5
    for row in rows:
        sqnr = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        assert f"| {row['name']} | {row['ratio']:.2f} | {sqnr} |" in README


def test_relaxed_forms_are_the_benchmarks():
    for name in ("relaxed_forms", "relaxed_forms_sdxl"):
        rows = [row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"] if "weight_bytes" in row]
        assert len(rows) >= 3
        for row in rows:
            kernels = " | ".join(" / ".join(map(str, row[key])) for key in ("pointwise_kernels", "int8_kernels"))
            sizes = f"{row['weight_bytes'] / 1e6:.1f} | {row['engine_bytes'] / 1e6:.0f}"
            seconds = f"{row['parse_seconds']:.1f} | {row['build_seconds']:.0f}"
            assert f"| {row['title']} | {kernels} | {sizes} | {seconds} | {row['peak_bytes'] / 2**30:.1f} |" in README


def test_full_size_tables_are_the_benchmarks():
    for name in ("sdxl", "sd15"):
        facts = json.loads((RESULTS / f"{name}_full_size.json").read_text())
        for phase in facts["phases"]:
            memory = " | ".join(f"{phase[f'peak_{kind}_bytes'] / 2**30:.2f}" for kind in ("anonymous", "file"))
            assert f"| {phase['name']} | {phase['seconds']:.0f} | {memory} |" in README
        static = facts["engines"]["static scales"]["pointwise_kernels"]
        assert len(facts["engines"]) == 4
        for graph, engine in facts["engines"].items():
            counts = " | ".join(str(engine[key]) for key in ("layers_in_int8", "int8_kernels", "pointwise_kernels"))
            sizes = f"{engine['weight_bytes'] / 1e9:.3f} | {engine['engine_bytes'] / 1e9:.2f}"
            seconds = f"{engine['parse_seconds']:.0f} + {engine['build_seconds']:.0f}"
            ratio = engine["pointwise_kernels"] / static
            assert f"| {graph} | {counts} | {ratio:.3f} | {sizes} | {seconds} |" in README
            assert engine["layers_in_int8"] == len(facts["quantized"])


def test_serving_table_is_the_benchmarks():
    facts = json.loads((RESULTS / "triton_serving.json").read_text())
    for clients, rate, key in ((1, 1, "latency_alone"), (facts["clients"], facts["rate_to_alone"], "latency_many")):
        latency = " | ".join(f"{facts[key][name]:.2f}" for name in ("p50", "p95", "p99"))
        assert f"| {clients} | {rate:.2f} | {latency} |" in README
    difference = f"was {facts['largest_pixel_difference']} over {facts['images_compared']} of the images"
    assert difference in README.replace("\n", " ")


def test_bad_days_are_the_benchmarks():
    result, page = (
        json.loads((RESULTS / "reliability.json").read_text()),
        (ROOT / "docs" / "reliability.md").read_text(),
    )
    for row in result["kills"]:
        counts = [sum(1 for kill in row["kills"] if kill[name]) for name in ("killed", "half_written", "differ")]
        figures = " | ".join(map(str, (row["seconds"], len(row["kills"]), *counts)))
        assert f"| {row['command']} | {figures} |" in page
        assert counts[-1] == 0
    for row in result["operations"]:
        said = [word for look in row["looks"] for word in look["readers"].values()]
        looks = [len(said), *(said.count(word) for word in ("refused", "of before", "of after", "of neither"))]
        differ = sum(1 for kill in row["kills"] if kill["differ"])
        figures = " | ".join(map(str, (row["operations"], *looks, len(row["kills"]), differ)))
        assert f"| {row['command']} | {figures} |" in page
        assert looks[-1] == differ == 0
    for name in set(result) - {"kills", "operations"}:
        passed = sum(row["outcome"] == "passed" for row in result[name])
        assert f"| {name} | {len(result[name])} | {passed} |" in page


def test_gptq_at_full_size_is_the_benchmarks():
    facts = json.loads((RESULTS / "gptq_full_size.json").read_text())
    rows, inputs = facts["rows"], facts["samples"]
    shown = [row for row in rows if f"\n| {row['block']} |" in README]
    assert len(shown) >= 6
    for row in shown:
        seconds = f"{row['hessian_seconds'] / inputs:.2f} | {row['rounding_seconds']:.1f}"
        memory = f"{row['peak_anonymous_bytes'] / 2**30:.2f}"
        assert f"| {row['block']} | {row['count']} | {row['fan_in']} | {seconds} | {memory} |" in README
    rounding = sum(row["count"] * row["rounding_seconds"] for row in rows)
    hessians = sum(row["count"] * row["hessian_seconds"] for row in rows) / inputs
    assert f"= {rounding:.0f} s, {rounding / 3600:.1f} h. Hessians:" in README
    assert f"= {hessians:.0f} s for each input, {50 * hessians / 3600:.1f} h for 50" in README
    assert f"Peak {max(row['peak_anonymous_bytes'] for row in rows) / 2**30:.1f} GiB" in README


def test_smaller_parts_are_the_benchmarks():
    facts = json.loads((RESULTS / "smaller_parts.json").read_text())
    rows = facts["rows"]
    assert [row["form"] for row in rows] == ["fp16", "int8"]
    for row in rows:
        decibels = [part["sqnr_db"][row["form"]] for part in row["parts"].values()]
        least = "exact" if None in decibels else f"{min(decibels):.1f}"
        images = f"{row['psnr_db']:.1f} | {row['worst_psnr_db']:.1f}"
        assert f"| {row['form']} | {row['bytes'] / row['float_bytes']:.2f} | {least} | {images} |" in README
    floats = {row["part"]: row["milliseconds"] for row in facts["full_size"] if row["form"] == "fp32"}
    assert len(facts["full_size"]) == 6
    for row in facts["full_size"]:
        sizes = f"{row['bytes'] / 1e6:.0f} | {row['memory_bytes'] / 1e6:.0f}"
        assert f" | {row['form']} | {sizes} | {row['milliseconds'] / floats[row['part']]:.2f} |" in README


def test_rounding_methods_are_the_benchmarks():
    rows = json.loads((RESULTS / "weight_rounding.json").read_text())["rows"]
    assert {"GPTQ", "AdaRound from GPTQ (500 iterations)", "ModelOpt, GPTQ"} <= {row["method"] for row in rows}
    for row in rows:
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {row['method']} | ")]
        assert f"{row['error']:.1e} ({row['seconds']:g} s)" in line


def test_order_and_ranges_are_the_benchmarks():
    rows = json.loads((RESULTS / "calibration_order.json").read_text())["rows"]
    found = {}
    for row in rows:
        if row["ranges"] != "auto":
            about = (row["model"], row["activation_bits"], row["ranges"])
            found.setdefault(about, {})[row["scheme"]] = f"{row['sqnr_db']:.1f}"
    assert {model for model, _, _ in found} == {"tiny-sdxl", "noise", "flow"}
    for (model, bits, ranges), figures in found.items():
        schemes = ("static", "float-trajectory", "one-pass", "observe-advance")
        cells = " | ".join(figures.get(scheme, "") for scheme in schemes)
        assert f"| {model} | {bits} | {ranges} | {cells} |" in README
    chosen = [row["chosen"] for row in rows if row["ranges"] == "auto"]
    assert f"it found {chosen[0]}, {chosen[1]} and {chosen[2]}," in README
