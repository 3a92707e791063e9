"""README's figures are those that the benchmarks wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_scheme_table_is_the_benchmarks():
    rows = json.loads((RESULTS / "scheme_table.json").read_text())
    assert len(rows) >= 6
    for row in rows:
        quality = row["quality"]
        figures = f"{quality['fid_to_fp32']:.4f} | {quality['clip_score']:.2f} | {quality['psnr_db']:.2f}"
        assert f"| {row['scheme']} | {figures} |" in README
    assert f"FP32 images score {rows[0]['quality']['clip_score_fp32']:.2f}" in README


def test_latency_table_is_the_benchmarks():
    rows = json.loads((RESULTS / "cpu_latency.json").read_text())["rows"]
    assert len(rows) >= 5
    for row in rows:
        sqnr = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        assert f"| {row['name']} | {row['ratio']:.2f} | {sqnr} |" in README
