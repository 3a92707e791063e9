"""Ray of our own leaves a user's settings of Ray as they were, and a cluster of theirs is joined with them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench import own_ray
from pcr_export.qdiffbench.workers import Workers, ray_cluster

SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
THEIR_TOKEN = "a-token-of-at-least-32-characters-0123"
THEIR_CLUSTER = """
import ray, sys
print(ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False).address_info["address"], flush=True)
sys.stdin.read()
"""
JOIN = """
import sys
from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench.workers import Workers, ray_cluster
try:
    with ray_cluster(Workers(address=sys.argv[1])):
        print("JOINED")
except PcrExportError as error:
    print(error)
"""


@pytest.fixture
def their_cluster() -> Iterator[str]:
    """The address of a cluster with THEIR_TOKEN."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": THEIR_TOKEN}
    with subprocess.Popen(
        [sys.executable, "-c", THEIR_CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.mark.slow
def test_their_settings_come_back_and_join_their_cluster(their_cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", THEIR_TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    before = {name: os.environ[name] for name in SETTINGS}
    tokens = []
    for _ in range(2):
        with ray_cluster(Workers(count=2)):
            import ray

            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            home = Path(ray._private.worker._global_node.get_session_dir_path()).parents[1]
            assert home.is_dir()
        assert not home.exists()
        assert {name: os.environ[name] for name in SETTINGS} == before
    assert len({*tokens, THEIR_TOKEN}) == 3
    with ray_cluster(Workers(address=their_cluster)):
        assert ray.get_runtime_context().gcs_address == their_cluster
        assert {name: os.environ[name] for name in SETTINGS} == before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 32}])
def test_their_cluster_without_their_token(their_cluster, settings):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"RAY_NUM_REDIS_GET_RETRIES": "1", **settings}
    command = [sys.executable, "-c", JOIN, their_cluster]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("Ray can't be started or joined (")
    assert line.endswith("one that has a token asks for RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")


def test_a_long_name_of_the_temporary_folder_is_too_long_for_a_socket(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 30)))
    assert own_ray._short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/1")
    assert own_ray._short_folder() == "/scratch/1"


def test_a_ray_that_others_can_reach_is_refused():
    import ray

    class Elsewhere:  # what ray.init returns
        address_info = MappingProxyType({"node_ip_address": "192.0.2.7"})

    with pytest.raises(PcrExportError, match=r"can be reached from elsewhere \(192\.0\.2\.7\): use --workers 1"):
        own_ray.check_loopback(ray, Elsewhere())
