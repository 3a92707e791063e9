import pytest

from pcr_export.errors import PcrExportError
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import format_steps, parse_relaxed_steps, searched_mean_bits

SETTINGS = {"model": "toy", "num_inference_steps": 20, "guidance_scale": 1.0, "height": 16, "width": 16}


@pytest.mark.parametrize(("text", "expected"), [("auto:8.4", 8.4), ("auto:8", 8.0), ("auto:10", 10.0)])
def test_the_searched_mean_is_read(text, expected):
    assert searched_mean_bits(text, relax_bits=10) == expected
    assert Recipe(**SETTINGS, relax=text).relax == text


@pytest.mark.parametrize("text", ["none", "first:20%", "0:4,17"])
def test_named_steps_are_not_searched(text):
    assert searched_mean_bits(text, relax_bits=10) is None


@pytest.mark.parametrize(
    "text", ["auto", "auto:", "auto:7.9", "auto:10.1", "auto:nan", "auto:inf", "auto:8.4%", "auto:-9"]
)
def test_a_mean_that_cannot_be_is_refused(text):
    with pytest.raises(PcrExportError, match=r"from 8 to 10 \(--relax-bits\), e.g. auto:8.4"):
        Recipe(**SETTINGS, relax=text)


def test_the_most_is_that_of_relax_bits():
    assert Recipe(**SETTINGS, relax="auto:11.5", relax_bits=12).relax_bits == 12
    with pytest.raises(PcrExportError, match="from 8 to 9"):
        Recipe(**SETTINGS, relax="auto:9.5", relax_bits=9)


@pytest.mark.parametrize(
    ("steps", "text"),
    [((), "none"), ((3,), "3"), ((12, 17, 18, 19), "12,17:20"), ((0, 1, 3, 5, 6), "0:2,3,5:7"), (range(20), "0:20")],
)
def test_steps_are_written_as_they_are_read(steps, text):
    assert format_steps(steps) == text
    assert parse_relaxed_steps(text, 20) == tuple(steps)
