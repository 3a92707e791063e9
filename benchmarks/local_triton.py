"""A real tritonserver on this machine's loopback, out of the PyPI package nvidia-pytriton, that serves an export's `pipeline`.

    python -m venv triton-venv && triton-venv/bin/pip install nvidia-pytriton 'tritonclient[grpc]'
    export PCR_EXPORT_TRITON_VENV=triton-venv

That server has the python backend alone: it loads no network by itself. The server's Python is the venv's, of the same version as this
one; numpy comes from the venv (this server's python backend needs numpy 1), everything else from this interpreter.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

VENV = "PCR_EXPORT_TRITON_VENV"
START_SECONDS = 120  # torch and diffusers are imported, and the networks loaded


class TritonError(Exception):
    """What the server answered in place of an image, or that it went away."""


def find_triton() -> Path | None:
    """The site-packages with nvidia-pytriton that PCR_EXPORT_TRITON_VENV leads to; None where there is none for this Python."""
    venv = os.environ.get(VENV)
    if not venv:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path(venv).resolve() / "lib" / f"python{version}" / "site-packages"
    stub = packages / "pytriton" / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    return packages if stub.is_file() else None


class LocalTriton:
    """tritonserver with a model repository; open inside `with`.

    Args:
        repository: such as engines/tiny-sdxl-w8a8/triton.
        packages: as `find_triton` gives it.
        models: those that are loaded.
        exit_seconds: how long the server, told to stop, waits for what it is doing.
    """

    def __init__(
        self, repository: Path, packages: Path, *, models: Sequence[str] = ("pipeline",), exit_seconds: int = 30
    ) -> None:
        self.repository, self.packages, self.models, self.exit_seconds = repository, packages, models, exit_seconds
        self.http_port, self.grpc_port = _free_ports(2)

    def __enter__(self) -> LocalTriton:
        self.scratch = Path(tempfile.mkdtemp(prefix="triton-"))
        server = self.packages / "pytriton" / "tritonserver"
        backend = self.scratch / "backends" / "python"
        shutil.copytree(server / "backends" / "python", backend)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
        os.chmod(stub, 0o755)
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self.scratch / 'backends'}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            "--http-address=127.0.0.1",
            f"--http-port={self.http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--allow-metrics=false",
            f"--exit-timeout-secs={self.exit_seconds}",
        ]
        self.log = self.scratch / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment(), start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def request(self, method: str, path: str, body: Any = None, *, timeout: float = 120) -> Any:
        """The JSON that the server answers to one HTTP request. Raises TritonError for anything but success."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise TritonError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise TritonError(json.loads(text)["error"] if text.startswith(b"{") else text.decode())
        return json.loads(text) if text else None

    def paint(self, *prompts: str, timeout: float = 120, **settings: Sequence[Any]) -> np.ndarray:
        """One request for an image of each prompt, uint8 [prompts, height, width, 3].

        Args:
            settings: seed, steps, guidance_scale, negative_prompt; a value for each prompt.
        """
        answer = self.request(
            "POST", "/v2/models/pipeline/infer", pipeline_request(prompts, **settings), timeout=timeout
        )
        (output,) = answer["outputs"]
        return np.array(output["data"], np.uint8).reshape(output["shape"])

    def _environment(self) -> dict[str, str]:
        libraries = (str(sysconfig.get_config_var("LIBDIR")), str(self.packages / "nvidia_pytriton.libs"))
        own = dict.fromkeys(str(Path(entry).resolve()) for entry in sys.path if Path(entry).is_dir())
        return {
            **os.environ,
            "PATH": os.pathsep.join((str(self.packages.parents[2] / "bin"), os.environ["PATH"])),  # whose python3 it is
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PCR_EXPORT_SITE_PACKAGES": os.pathsep.join(own),
        }

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return self.request("GET", "/v2/health/ready", timeout=5)
            except TritonError:
                time.sleep(0.1)
        raise TritonError(f"tritonserver does not start: {self.log.read_text('utf-8', 'replace')[-4000:]}")


TYPES = {"seed": "INT64", "steps": "INT32", "guidance_scale": "FP32", "negative_prompt": "BYTES"}


def pipeline_request(prompts: Sequence[str], **settings: Sequence[Any]) -> dict[str, Any]:
    """The body of a request to `pipeline`; `settings` as `LocalTriton.paint` takes them."""
    columns = [
        ("PROMPT", "BYTES", prompts),
        *((name.upper(), TYPES[name], values) for name, values in settings.items()),
    ]
    inputs = [
        {"name": name, "datatype": kind, "shape": [len(values), 1], "data": list(values)}
        for name, kind, values in columns
    ]
    return {"inputs": inputs}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
