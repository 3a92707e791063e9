from pathlib import Path

import pytest
from qdiffbench.exported_tiny_sdxl import export_tiny_sdxl


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """An exported random pipeline, to read only."""
    return export_tiny_sdxl(tmp_path_factory.mktemp("exported"))
