"""Shapes outside an engine's profile are refused by name, without a GPU and without the engine."""

from dataclasses import replace

import pytest
from engines.small_record import small_record

from pcr_export.engines.input_ranges import check_input_ranges, is_within
from pcr_export.errors import PcrExportError

BEST = {"sample": (2, 32, 16, 16), "timestep": ()}


@pytest.mark.parametrize("shape", [(1, 32, 8, 8), (2, 32, 16, 16), (2, 32, 32, 16)])
def test_the_range_and_its_ends_pass(shape: tuple[int, ...]) -> None:
    check_input_ranges("sm89.engine", small_record(), BEST | {"sample": shape})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 32, 16, 16),
            r"sample has 3 on axis 0 \(batch\), sm89.engine takes 1..2: rebuild it with a --batch MIN:OPT:MAX",
        ),
        ((2, 32, 40, 16), r"sample has 40 on axis 2 \(height\), sm89.engine takes 8..32: rebuild it with a --height"),
        ((2, 32, 16, 4), r"sample has 4 on axis 3 \(width\), sm89.engine takes 8..16: .* MIN:OPT:MAX .*: again$"),
        ((2, 4, 16, 16), r"sample has 4 on axis 1, sm89.engine takes 32: give inputs of the model that was exported"),
        ((2, 32, 16), r"sm89.engine takes sample with 4 axes, not of shape \[2, 32, 16\]"),
    ],
)
def test_an_axis_outside_is_named_with_the_flag_that_helps(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PcrExportError, match=message) as caught:
        check_input_ranges("sm89.engine", small_record(), BEST | {"sample": shape})
    assert "\n" not in str(caught.value)


def test_an_axis_that_was_built_fixed_tells_its_one_size() -> None:
    fixed = ((2, 32, 16, 16),) * 3
    record = replace(small_record(), inputs={"sample": fixed, "timestep": ((), (), ())})
    with pytest.raises(PcrExportError, match=r"sample has 1 on axis 0 \(batch\), sm89.engine takes 2: rebuild"):
        check_input_ranges("sm89.engine", record, BEST | {"sample": (1, 32, 16, 16)})


def test_a_longer_text_than_the_engine_reads() -> None:
    text = ((2, 77, 768),) * 3
    record = replace(small_record(), inputs={"text": text}, axes={**small_record().axes, "tokens": (77, 77, 77)})
    with pytest.raises(PcrExportError, match=r"text has 154 on axis 1 \(tokens\), sm89.engine takes 77: .*onnxruntime"):
        check_input_ranges("sm89.engine", record, {"text": (2, 154, 768)})


@pytest.mark.parametrize("shapes", [{"sample": (2, 32, 16, 16)}, BEST | {"prompt": (2,)}])
def test_missing_and_unknown_inputs_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(PcrExportError, match=r"takes the inputs \['sample', 'timestep'\], not"):
        check_input_ranges("sm89.engine", small_record(), shapes)


def test_another_rank_is_not_within() -> None:
    assert is_within((), (), ())
    assert is_within((1, 2), (1, 1), (1, 2))
    assert not is_within((1,), (1, 1), (1, 2))
    assert not is_within((1, 3), (1, 1), (1, 2))
