"""An export's triton/ on a real tritonserver: same images, many clients, and what goes wrong goes to whom it belongs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deploy.conftest import ExportedFolder

from benchmarks.local_triton import LocalTriton, TritonError, find_triton, pipeline_request
from pcr_export.deploy.run import generate, load_exported_model
from pcr_export.deploy.triton_config import read_config, write_config
from pcr_export.deploy.triton_repository import NETWORKS, write_triton_repository
from pcr_export.deploy.triton_requests import Picture, paint_requests

PACKAGES = find_triton()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGES is None, reason="no tritonserver: see benchmarks/local_triton.py for how to get one"),
]
CLIENTS = 200
# Alone the image is generate's to the byte. Requests that wait are painted together, and float sums of another batch differ in the last
# digit, which may move a pixel by one.
TOGETHER = 1
LONG = 1000  # steps: a request that is still running when the test goes on


@pytest.fixture(scope="module")
def folder(sdxl: ExportedFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path_factory.mktemp("served") / "exported"))
    write_triton_repository(folder)
    return folder


def start(folder: Path, **options: object) -> LocalTriton:
    assert PACKAGES is not None
    return LocalTriton(folder / "triton", PACKAGES, **options)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalTriton]:
    with start(folder) as server:
        yield server


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(group: int) -> bool:
    """Whether the server or a model's process, which is of its group, is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def paint_one(server: LocalTriton, prompt: str, seed: int, steps: int = 2) -> np.ndarray:
    return server.paint(prompt, seed=[seed], steps=[steps], guidance_scale=[5.0])[0]


def test_server_reads_the_config_as_we_do(server: LocalTriton, folder: Path) -> None:
    ours = read_config(folder / "triton" / "pipeline" / "config.pbtxt")
    answer = server.request("GET", "/v2/models/pipeline/config")
    assert {value["name"]: (value["data_type"], tuple(value["dims"])) for value in answer["input"]} == ours.inputs
    assert {value["name"]: (value["data_type"], tuple(value["dims"])) for value in answer["output"]} == ours.outputs
    assert {value["name"] for value in answer["input"] if value["optional"]} == ours.optional
    policy = answer["dynamic_batching"]["default_queue_policy"]
    assert policy["max_queue_size"] == ours.max_queue_size > CLIENTS
    assert (answer["backend"], answer["max_batch_size"]) == (ours.backend, ours.max_batch_size)


PARSE = """
import sys
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
for path in sys.argv[1:]:
    config = text_format.Parse(open(path).read(), ModelConfig())
    print(config.name, config.platform or config.backend, *(f"{value.name}={list(value.dims)}" for value in config.input))
"""


def test_tritons_own_proto_reads_every_config(folder: Path, tmp_path: Path) -> None:
    assert PACKAGES is not None
    paths = [folder / "triton" / name / "config.pbtxt" for name in NETWORKS]
    plan = replace(read_config(paths[0]), backend="tensorrt", plans={"8.9": "sm89.plan"})
    write_config(tmp_path / "config.pbtxt", plan)
    command = [PACKAGES.parents[2] / "bin" / "python", "-c", PARSE, *paths, tmp_path / "config.pbtxt"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("unet onnxruntime sample=[-1, 4, -1, -1] timestep=[1] ")
    assert lines[1:4] == [
        "text_encoder onnxruntime input_ids=[-1, 16]",
        "text_encoder_2 onnxruntime input_ids=[-1, 16]",
        "vae_decoder onnxruntime latent_sample=[-1, 4, -1, -1]",
    ]
    assert lines[4].startswith("unet tensorrt_plan sample=[-1, 4, -1, -1] timestep=[1] ")


def test_image_is_that_of_generate(server: LocalTriton, folder: Path) -> None:
    painted = server.paint("a red star", seed=[7], steps=[3], guidance_scale=[4.0], negative_prompt=["blue"])
    expected = generate(folder, "a red star", seed=7, steps=3, guidance_scale=4.0, negative_prompt="blue")
    np.testing.assert_array_equal(painted[0], expected)


def test_a_request_of_several_images(server: LocalTriton, folder: Path) -> None:
    painted = server.paint("a star", "a moon", "a star", seed=[1, 2, 1], steps=[2, 2, 4])
    assert painted.shape == (3, 16, 16, 3)
    for image, (prompt, seed, steps) in zip(
        painted, [("a star", 1, 2), ("a moon", 2, 2), ("a star", 1, 4)], strict=True
    ):
        expected = generate(folder, prompt, seed=seed, steps=steps)
        np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=TOGETHER, rtol=0)


def test_two_hundred_clients_at_once_and_a_malformed_one_among_them(server: LocalTriton, folder: Path) -> None:
    model = load_exported_model(folder, threads=1)

    def client(number: int) -> np.ndarray | str:
        if number == CLIENTS // 2:
            try:
                server.paint("bad", steps=[0])
            except TritonError as error:
                return str(error)
        return paint_one(server, f"star {number}", number)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, range(CLIENTS)))
    for number, answer in enumerate(answers):
        if number == CLIENTS // 2:
            assert answer == "STEPS is 0: give 1 to 1000"
            continue
        picture = Picture(prompt=f"star {number}", negative_prompt="", seed=number, steps=2, guidance_scale=5.0)
        (expected,) = paint_requests(model, [[picture]], lambda _request: False)
        np.testing.assert_allclose(answer.astype(int), expected[0].astype(int), atol=TOGETHER, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"inputs": []}, "expected"),
        ({"inputs": [{"name": "PROMPT", "datatype": "INT64", "shape": [1, 1], "data": [1]}]}, "data-type"),
        ({"inputs": [{"name": "PROMPT", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]}, "shape"),
        (pipeline_request(["x" * 10_000_000]), "PROMPT has 10000000 bytes"),
        (pipeline_request(["a"], guidance_scale=[1e9]), "GUIDANCE_SCALE is"),
        (pipeline_request(["a"], seed=[-1]), "SEED is -1: give 0 to 9223372036854775807"),
        (pipeline_request(["a", "b"], seed=[1]), "batch size does not match"),
        (pipeline_request([]), "expected"),
        (pipeline_request(["a"] * 9), "batch-size must be <= 8"),
    ],
)
def test_malformed_requests_leave_the_server_well(server: LocalTriton, change: dict[str, object], match: str) -> None:
    with pytest.raises(TritonError, match=match):
        server.request("POST", "/v2/models/pipeline/infer", change)
    assert paint_one(server, "a star", 0).shape == (16, 16, 3)


def test_a_bad_seed_fails_nobody_who_is_painted_with_it(server: LocalTriton) -> None:
    """The first request keeps the model busy, so that the others are handed over together."""

    def client(seed: int) -> object:
        try:
            return server.paint("a star", seed=[seed], steps=[50 if seed == 0 else 1]).shape
        except TritonError as error:
            return str(error)

    seeds = [0, 1, -1, 2, 3, -1, 4, 5]
    with ThreadPoolExecutor(len(seeds)) as pool:
        answers = list(pool.map(client, seeds))
    bad = "SEED is -1: give 0 to 9223372036854775807"
    assert answers == [bad if seed < 0 else (1, 16, 16, 3) for seed in seeds]


def test_who_comes_to_a_full_queue_is_told_so_at_once(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "exported", symlinks=True))
    path = copied / "triton" / "pipeline" / "config.pbtxt"
    write_config(path, replace(read_config(path), max_batch_size=1, max_queue_size=2))

    def client(seed: int) -> object:
        try:
            return server.paint("a star", seed=[seed], steps=[100]).shape
        except TritonError as error:
            return str(error)

    with start(copied) as server, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(client, range(12)))
    refused = [answer for answer in answers if isinstance(answer, str)]
    assert 0 < len(refused) <= 9  # one is painted and two wait when the last comes
    assert all("xceeds maximum queue size" in answer for answer in refused)


CANCEL = """
import sys, threading, time
import numpy as np
import tritonclient.grpc as triton
client, done = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}"), threading.Event()
prompt, steps = triton.InferInput("PROMPT", [1, 1], "BYTES"), triton.InferInput("STEPS", [1, 1], "INT32")
prompt.set_data_from_numpy(np.array([["a star"]], dtype=object))
steps.set_data_from_numpy(np.array([[int(sys.argv[2])]], dtype=np.int32))
def show(result, error):
    print(error.status())
    done.set()
call = client.async_infer("pipeline", [prompt, steps], callback=show)
time.sleep(0.5)
call.cancel()
assert done.wait(60)
"""


def test_a_cancelled_request_stops_between_two_steps(server: LocalTriton) -> None:
    """The server is done with it after less time than the same request takes that is not cancelled."""

    def answered() -> tuple[int, int]:
        counts = server.request("GET", "/v2/models/pipeline/stats")["model_stats"][0]["inference_stats"]["success"]
        return counts["count"], counts["ns"]  # an answer is a success to the server, an error of the model's too

    assert PACKAGES is not None
    start_count, start_ns = answered()
    paint_one(server, "a star", 0, steps=LONG)
    whole = answered()[1] - start_ns
    command = [PACKAGES.parents[2] / "bin" / "python", "-c", CANCEL, str(server.grpc_port), str(LONG)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "CANCELLED" in done.stdout
    wait_until(lambda: answered()[0] == start_count + 2)
    assert answered()[1] - start_ns - whole < whole / 2
    assert paint_one(server, "a star", 0).shape == (16, 16, 3)


def test_networks_of_other_models_give_the_same_image(folder: Path, tmp_path: Path) -> None:
    """The pipeline asks its server for every network (BLS); the server holds the calls to the networks' own configs."""
    copied = Path(shutil.copytree(folder, tmp_path / "exported", symlinks=True))
    for name in (*NETWORKS, "pipeline"):
        home = copied / "triton" / name
        config = read_config(home / "config.pbtxt")
        if name == "pipeline":
            config = replace(config, parameters={"networks": "triton"})
        else:
            config = replace(config, backend="python", cpu=True)
            (home / "1" / "model.onnx").unlink()
            shutil.copy(Path(__file__).with_name("served_onnx_model.py"), home / "1" / "model.py")
        write_config(home / "config.pbtxt", config)
    with start(copied, models=[*NETWORKS, "pipeline"]) as server:
        painted = paint_one(server, "a red star", 3)
        calls = server.request("GET", "/v2/models/unet/stats")["model_stats"][0]["inference_count"]
    np.testing.assert_array_equal(painted, generate(folder, "a red star", seed=3, steps=2, guidance_scale=5.0))
    assert calls == 2


def test_stopped_in_mid_request(folder: Path) -> None:
    """The client gets an error, the server goes, and so does the process of the model."""
    answers: list[object] = []
    with start(folder, exit_seconds=1) as server:

        def wait_for_an_image() -> None:
            try:
                answers.append(server.paint("a star", steps=[LONG]))
            except TritonError as error:
                answers.append(error)

        client = threading.Thread(target=wait_for_an_image)
        client.start()
        time.sleep(1)  # it paints: the thousand steps take several seconds
        server.process.send_signal(signal.SIGTERM)
        client.join(timeout=60)
        assert not client.is_alive()
        server.process.wait(timeout=60)
        wait_until(lambda: not is_alive(server.process.pid))
    assert isinstance(answers[0], TritonError)
