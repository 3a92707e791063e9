"""What the timing of INT8 against FP16 says, from given figures."""

import json

import pytest

from pcr_export.engines.latency import Latency
from pcr_export.engines.timing import timing_facts

INT8, RELAXED, FP16 = Latency(p50=2.0, p95=2.5), Latency(p50=4.0, p95=5.0), Latency(p50=3.0, p95=3.1)


def test_every_figure_and_the_mean_over_the_steps() -> None:
    facts = timing_facts(INT8, RELAXED, FP16, relaxed_share=0.2)
    assert facts["int8_ms"] == {"p50": 2.0, "p95": 2.5}
    assert facts["relaxed_ms"]["p50"] == 4.0
    assert facts["fp16_ms"]["p95"] == 3.1
    assert facts["mean_ms"] == pytest.approx(2.4)
    assert facts["speedup"] == pytest.approx(1.25)
    assert "warning" not in facts
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(("int8", "relaxed", "share"), [(FP16, None, 0.0), (INT8, RELAXED, 0.9)])
def test_slower_int8_is_said_aloud(int8: Latency, relaxed: Latency | None, share: float) -> None:
    facts = timing_facts(int8, relaxed, Latency(p50=2.5, p95=2.6), relaxed_share=share)
    slow = facts["mean_ms"]
    assert slow > 2.5
    assert facts["warning"].startswith(
        f"INT8 is slower than FP16 on this GPU ({slow:.2f} ms against 2.50 ms): deploy FP16"
    )
    assert facts["speedup"] < 1


def test_without_an_fp16_engine_nothing_is_claimed() -> None:
    facts = timing_facts(INT8, None, None)
    assert facts == {"int8_ms": {"p50": 2.0, "p95": 2.5}, "mean_ms": 2.0}
