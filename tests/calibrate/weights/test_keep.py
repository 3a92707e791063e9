"""Which layers keep 8 bits, by number and by mean bits."""

import pytest

from pcr_export.calibrate.weights.keep import choose_kept

SENSITIVITIES = {
    "large": {"error": 0.5, "weights": 800},
    "small": {"error": 0.4, "weights": 100},
    "middle": {"error": 0.1, "weights": 50},
    "calm": {"error": 0.001, "weights": 50},
}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", set()),
        ("1", {"large"}),
        ("2", {"large", "small"}),
        ("9", set(SENSITIVITIES)),
        ("4bit", set()),
        ("4.4bit", {"small"}),  # 100 of 1000 weights: the largest error per weight first
        ("4.6bit", {"small", "middle"}),  # large does not fit
        ("8bit", set(SENSITIVITIES)),
    ],
)
def test_choice(keep: str, kept: set[str]) -> None:
    assert choose_kept(SENSITIVITIES, keep, 4) == dict.fromkeys(kept, 8)
