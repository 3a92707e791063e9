"""Float exports, the slow part of these tests, are made once."""

from collections.abc import Callable

import pytest
from exported_cases import Case


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """ "sd", "sdxl" or "class" -> the exported case; tests may add files to its folder."""
    made: dict[str, Case] = {}

    def get(kind: str) -> Case:
        if kind not in made:
            made[kind] = Case(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
