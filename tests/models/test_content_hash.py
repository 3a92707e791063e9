"""Values that are not equal have different hashes, however alike they print."""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcr_export.errors import PcrExportError
from pcr_export.models.content_hash import hash_content


@dataclass
class Condition:
    text: str
    control: torch.Tensor


def long_tensor(middle: float) -> torch.Tensor:
    x = torch.zeros(5000)
    x[2500] = middle
    return x


DIFFERENT: list[Any] = [
    None,
    "None",
    True,
    1,
    1.0,
    "1",
    b"1",
    (1,),
    [1],
    ("ab", "c"),
    ("a", "bc"),
    (("a",), "b"),
    ("a", ("b",)),
    {"a": 1},
    {"a": 2},
    {"a", "b"},
    Path("1"),
    0.1,
    0.1 + 1e-16,
    0.0,
    -0.0,
    long_tensor(0.0),
    long_tensor(1e-9),
    long_tensor(0.0).numpy(),
    long_tensor(1e-9).numpy(),
    long_tensor(0.0).reshape(50, 100),
    long_tensor(0.0).to(torch.float16),
    long_tensor(0.0).to(torch.bfloat16),
    np.float32(1),
    np.float64(1),
    torch.tensor(1.0),
    torch.empty(0),
    torch.empty(0, 3),
    Condition("a", long_tensor(0.0)),
    Condition("a", long_tensor(1e-9)),
    Condition("b", long_tensor(0.0)),
    {"prompt": "a", "image": long_tensor(0.0)},
    {"prompt": "a", "image": long_tensor(1e-9)},
]


def test_no_two_values_share_a_hash() -> None:
    hashes = [hash_content(value) for value in DIFFERENT]
    same = [(a, b) for a, b in itertools.combinations(range(len(hashes)), 2) if hashes[a] == hashes[b]]
    assert [(DIFFERENT[a], DIFFERENT[b]) for a, b in same] == []


def test_equal_content_has_an_equal_hash_in_whatever_memory_it_lies() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert hash_content(x) == hash_content(x.clone()) == hash_content(x.t().contiguous().t())
    assert hash_content(x.numpy()) == hash_content(np.asfortranarray(x.numpy()))
    assert hash_content({"a": 1, "b": x}) == hash_content({"b": x, "a": 1})
    assert hash_content({"a", "b"}) == hash_content({"b", "a"})
    assert hash_content(float("nan")) == hash_content(float("nan"))
    assert hash_content({"a": 1}) != hash_content(OrderedDict(a=1))  # a type of its own may mean something of its own


def test_what_has_no_content_is_refused() -> None:
    with pytest.raises(PcrExportError, match="give conditions of text, numbers, tensors"):
        hash_content(["a", object()])
