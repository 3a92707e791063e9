"""`execute` of the `pipeline` model: whatever stands in a batch, each request has its own answer, and nothing is raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy.conftest import ExportedFolder
from deploy.triton_stand_in import InferenceResponse, Request, pipeline_model
from hypothesis import given, settings
from hypothesis import strategies as st

from pcr_export.deploy.run import load_exported_model

BIG = 2**63


@pytest.fixture(scope="module")
def served(lcm: ExportedFolder) -> Any:
    model = pipeline_model().TritonPythonModel()
    model.model = load_exported_model(lcm.folder, threads=1)
    return model


def column(*values: object, kind: object = object) -> np.ndarray:
    return np.array(values, dtype=kind).reshape(-1, 1)


def request(*prompts: bytes, **inputs: Any) -> Request:
    return Request({"PROMPT": column(*prompts), "STEPS": column(*[1] * len(prompts), kind=np.int32), **inputs})


def check(response: InferenceResponse, images: int) -> None:
    """That many images, or for none one line of an error."""
    if images:
        assert response.error is None
        (tensor,) = response.output_tensors
        assert (tensor.name, tensor.array.dtype, tensor.array.shape) == ("IMAGES", np.uint8, (images, 16, 16, 3))
    else:
        assert response.error is not None
        assert response.error.code == "invalid"
        assert 0 < len(response.error.text) < 600
        assert "\n" not in response.error.text


BAD: dict[str, dict[str, Any]] = {
    "seed below 0": {"SEED": column(-1, kind=np.int64)},
    "seed above": {"SEED": column(BIG, kind=np.uint64)},
    "seed of another type": {"SEED": column(1.5, kind=np.float32)},
    "seed of no type": {"SEED": column(None)},
    "fewer seeds": {
        "PROMPT": column(b"a", b"b"),
        "STEPS": column(1, 1, kind=np.int32),
        "SEED": column(1, kind=np.int64),
    },
    "more seeds": {"SEED": column(1, 2, kind=np.int64)},
    "seeds in a row": {"SEED": np.array([1], np.int64)},
    "a seed alone": {"SEED": np.array(1, np.int64)},
    "seeds in a cube": {"SEED": np.zeros((1, 1, 1), np.int64)},
    "no image": {"PROMPT": column(), "STEPS": column(kind=np.int32)},
    "no row": {"PROMPT": np.array(b"a", object)},
    "numbers as prompts": {"PROMPT": column(3, kind=np.int64)},
    "prompts of Python": {"PROMPT": column("a")},
    "a surrogate": {"PROMPT": column(b"\xed\xa0\x80")},
    "a negative prompt that is none": {"NEGATIVE_PROMPT": column(b"\xff")},
    "long": {"PROMPT": column(b"x" * 5000)},
    "no steps": {"STEPS": column(0, kind=np.int32)},
    "more steps than the scheduler walks": {"STEPS": column(999, kind=np.int32)},
    "guidance without end": {"GUIDANCE_SCALE": column(np.inf, kind=np.float32)},
    "guidance that is true": {"GUIDANCE_SCALE": column(True, kind=bool)},
    "a tensor that can't be read": {"SEED": RuntimeError("on a GPU\nand broken")},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_error_and_its_neighbours_their_images(served: Any, name: str) -> None:
    batch = [request(b"a"), Request({**request(b"a").inputs, **BAD[name]}), request(b"b", b"c")]
    for response, images in zip(served.execute(batch), (1, 0, 2), strict=True):
        check(response, images)


def test_a_request_without_a_prompt(served: Any) -> None:
    (response,) = served.execute([Request({})])
    check(response, 0)


GOOD = st.integers(1, 3).flatmap(
    lambda rows: st.fixed_dictionaries(
        {
            "PROMPT": st.lists(st.text(max_size=20).map(str.encode), min_size=rows, max_size=rows).map(
                lambda values: column(*values)
            ),
            "STEPS": st.lists(st.integers(1, 2), min_size=rows, max_size=rows).map(
                lambda values: column(*values, kind=np.int32)
            ),
        },
        optional={
            "SEED": st.lists(st.integers(0, BIG - 1), min_size=rows, max_size=rows).map(
                lambda values: column(*values, kind=np.int64)
            ),
            "NEGATIVE_PROMPT": st.just(column(*[b"blue"] * rows)),
            "GUIDANCE_SCALE": st.floats(0, 100, width=32).map(
                lambda value, rows=rows: column(*[value] * rows, kind=np.float32)
            ),
        },
    )
)
MIXED = st.lists(st.tuples(GOOD, st.none() | st.sampled_from(sorted(BAD))), min_size=1, max_size=6)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(MIXED)
def test_any_mix_of_good_and_bad(served: Any, batch: list[tuple[dict[str, Any], str | None]]) -> None:
    one = {name: array[:1] for name, array in request(b"a").inputs.items()}
    requests = [Request(inputs if name is None else {**one, **BAD[name]}) for inputs, name in batch]
    for response, (inputs, name) in zip(served.execute(requests), batch, strict=True):
        check(response, len(inputs["PROMPT"]) if name is None else 0)


@pytest.mark.parametrize("given_parameters", [{}, {"parameters": {}}, {"parameters": {"threads": {}}}])
def test_a_config_without_parameters_is_served(
    lcm: ExportedFolder, given_parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline_model().TritonPythonModel()
    monkeypatch.setattr("threading.Thread.start", lambda _thread: None)  # it would end this process with the server
    home = Path(lcm.folder) / "triton" / "pipeline"
    model.initialize({"model_config": json.dumps(given_parameters), "model_repository": str(home)})
    check(model.execute([request(b"a")])[0], 1)
