from pathlib import Path

import pytest
from exported_tiny_sdxl import export_tiny_sdxl


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """An exported random pipeline with images and an engine, to read only."""
    return export_tiny_sdxl(tmp_path_factory.mktemp("exported"))
