"""Float exports, the slow part of these tests, are made once."""

import functools
from collections.abc import Callable

import pytest
from exported_cases import Case, write_float
from shared_folder import make_once


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """ "sd", "sdxl" or "class" -> the exported case; tests may add files to its folder."""

    @functools.cache
    def get(kind: str) -> Case:
        float_folder = make_once(tmp_path_factory, f"float-{kind}", functools.partial(write_float, kind))
        return Case(kind, float_folder, tmp_path_factory.mktemp(kind))

    return get
