"""Learned rounding of whole networks: what is recorded, what is gained, and that a stopped run ends with the same bytes."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from class_conditional import TIMESTEPS, class_conditional_denoiser
from models.tiny_pipelines import tiny_sdxl

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.learn_weights import WeightLearning, learns_weights, rounding_of, weights_folder
from pcr_export.calibrate.simulate import Simulation
from pcr_export.calibrate.weights.block_inputs import BlockCall, BlockRecorder, find_blocks, read_block_call
from pcr_export.calibrate.weights.rounding import NearestRounding
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import Denoiser
from pcr_export.models.load import load_model
from pcr_export.recipe import Recipe

LABELS, SEEDS = [0, 1, 2, 3, 4, 0], [10, 11, 12, 13, 14, 15]


def learning(folder: Path, denoiser: Denoiser | None = None, **changes) -> WeightLearning:
    settings = {"weight_bits": 4, "weight_samples": 30, "adaround_iterations": 60, **changes}
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **settings)
    denoiser = denoiser or class_conditional_denoiser()
    return WeightLearning(
        denoiser=denoiser,
        layers=find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), recipe.skip),
        conditions=LABELS,
        seeds=SEEDS,
        recipe=recipe,
        folder=weights_folder(folder),
        key={"recipe": recipe.hash()},
    )


def learned_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("block_*.safetensors"))}


@pytest.fixture(scope="module")
def pipeline_denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load_model(resolve(str(tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")))).denoiser()


def test_blocks_of_a_diffusers_unet(pipeline_denoiser: Denoiser) -> None:
    layers = find_layers(pipeline_denoiser, next(pipeline_denoiser.walk(["a", "b"], [0, 1])), ())
    blocks = find_blocks(pipeline_denoiser.network, layers)
    found = [name for names in blocks.values() for name in names]
    assert sorted(found) == sorted(layer.name for layer in layers if layer.site)
    resnet, transformer = "down_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0"
    assert {f"{resnet}.conv1", f"{resnet}.time_emb_proj"} <= set(blocks[resnet])
    assert {f"{transformer}.attn1.to_q", f"{transformer}.ff.net.2"} <= set(blocks[transformer])
    assert blocks["conv_in"] == ["conv_in"]


def test_what_a_block_was_called_with_gives_its_output_again(pipeline_denoiser: Denoiser, tmp_path: Path) -> None:
    inputs = next(pipeline_denoiser.walk(["a red cat", "a dog", "x"], [0, 1, 2]))
    layers = find_layers(pipeline_denoiser, inputs, ())
    names = list(find_blocks(pipeline_denoiser.network, layers))
    calls = len(pipeline_denoiser.timesteps)
    recorder = BlockRecorder(pipeline_denoiser, names, tmp_path, samples=4 * calls + 1, seed=0)
    recorder(0, [inputs])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    recorder(0, [inputs])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:4].sort().values
    outputs = {}
    for name in names:
        pipeline_denoiser.network.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
        )
    with torch.inference_mode():
        pipeline_denoiser(inputs)
        whole = dict(outputs)
        for name in names:
            call = read_block_call(tmp_path, name)
            assert isinstance(call, BlockCall)
            assert call.num_samples == 4
            call = call.rows(slice(0, 4))
            again = pipeline_denoiser.network.get_submodule(name)(*call.args, **call.kwargs)
            torch.testing.assert_close(again, whole[name][rows], rtol=1e-2, atol=5e-3)  # stored in float16


def test_recorded_inputs_keep_to_their_budget_and_large_values_their_range(tmp_path: Path) -> None:
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk(LABELS, SEEDS))
    inputs["x"] = inputs["x"] * 1e6
    one = 3 * 16 * 16 * 4  # bytes of a sample of conv_in
    for budget, samples in ((0, 1), (5 * 3 * one, 3), (2**30, 6)):
        folder = tmp_path / str(budget)
        BlockRecorder(denoiser, ["conv_in"], folder, 100, seed=0, budget=budget)(0, [inputs])
        assert read_block_call(folder, "conv_in").num_samples == samples
    recorded = read_block_call(tmp_path / str(2**30), "conv_in").rows(slice(0, 6)).args[0]
    torch.testing.assert_close(recorded, inputs["x"])


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_learned_weights_beat_nearest(method: str, tmp_path: Path) -> None:
    job = learning(tmp_path, weights=method)
    rounding, found = job.run()
    facts = found["layers"]
    assert set(facts) == {layer.name for layer in job.layers if layer.site}
    assert sum(each["error"] for each in facts.values()) < 0.8 * sum(each["rtn_error"] for each in facts.values())
    assert not list(tmp_path.rglob("call_*"))  # the recorded inputs are gone
    inputs = next(job.denoiser.walk(LABELS, SEEDS))
    exact = job.denoiser(inputs).detach()
    error = {}
    for name, each in (("learned", rounding), ("nearest", NearestRounding(4))):
        with Simulation(job.denoiser, job.layers, each) as simulation:
            error[name] = (simulation.run(inputs) - exact).square().mean().item()
    assert error["learned"] < 0.8 * error["nearest"]
    layer = next(layer.name for layer in job.layers if layer.site)
    weight = job.denoiser.network.get_submodule(layer).weight.detach().numpy()
    for found, expected in zip(rounding_of(job.recipe, tmp_path)(layer, weight), rounding(layer, weight), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = learning(tmp_path / "whole", weights="adaround")
    facts = whole.run()[1]["layers"]

    @contextlib.contextmanager
    def stop_at_the_third_block(description: str, _total: int):
        count = iter(range(2 * 60 + 10))

        def advance(by: int) -> None:
            for _ in range(by if description.startswith("learning") else 0):
                if next(count, None) is None:
                    raise KeyboardInterrupt

        yield advance

    stopped = learning(tmp_path / "stopped", weights="adaround")
    with pytest.raises(KeyboardInterrupt):
        replace(stopped, track=stop_at_the_third_block).run()
    done = learned_files(tmp_path / "stopped")
    assert len(done) == 2
    assert stopped.run()[1]["layers"] == facts
    assert learned_files(tmp_path / "stopped") == learned_files(tmp_path / "whole")


def test_a_recording_stopped_half_way_goes_on(tmp_path: Path) -> None:
    @contextlib.contextmanager
    def stop_at_the_third_step(description: str, _total: int):
        calls = iter(range(4))  # of two steps: observe, then advance

        def advance(_count: int) -> None:
            if description == "calibrating" and next(calls, None) is None:
                raise KeyboardInterrupt

        yield advance

    whole = learning(tmp_path / "whole", weights="gptq")
    whole.run()
    stopped = learning(tmp_path / "stopped", weights="gptq")
    with pytest.raises(KeyboardInterrupt):
        replace(stopped, track=stop_at_the_third_step).run()
    assert len(list(tmp_path.rglob("inputs-*/call_*"))) == 3
    stopped.run()
    assert learned_files(tmp_path / "stopped") == learned_files(tmp_path / "whole")


def test_kept_layers_have_8_bits_and_a_second_round_follows_the_first(tmp_path: Path) -> None:
    job = learning(tmp_path, weights="gptq", keep="2", weight_rounds=2)
    rounding, found = job.run()
    facts = found["layers"]
    kept = [layer for layer, each in facts.items() if each["bits"] == 8]
    assert len(kept) == 2
    weight = job.denoiser.network.get_submodule(kept[0]).weight.detach().numpy()
    assert np.abs(rounding(kept[0], weight)[0]).max() > 7
    first, second = (learned_files(weights_folder(tmp_path) / f"round_{index}") for index in (0, 1))
    assert set(first) == set(second)
    assert sum(first[name] != second[name] for name in first) > len(first) / 2
    sensitivities = {}
    for path in (weights_folder(tmp_path) / "round_0").glob("sensitivity_*.json"):
        sensitivities |= json.loads(path.read_text())["facts"]
    assert set(sensitivities) == set(facts)
    assert min(facts[layer]["sensitivity"] for layer in kept) >= max(
        each["sensitivity"] for layer, each in facts.items() if layer not in kept
    )


def test_kept_layers_alone_are_rounded_to_nearest(tmp_path: Path) -> None:
    job = learning(tmp_path, keep="1")
    assert learns_weights(job.recipe)
    rounding, found = job.run()
    facts = found["layers"]
    assert all(each["error"] == each["rtn_error"] for each in facts.values())
    layer = next(layer for layer, each in facts.items() if each["bits"] == 4)
    weight = job.denoiser.network.get_submodule(layer).weight.detach().numpy()
    np.testing.assert_array_equal(rounding(layer, weight)[0], NearestRounding(4)(layer, weight)[0])


def test_what_is_refused(tmp_path: Path) -> None:
    rounding, _ = learning(tmp_path, weights="gptq").run()
    with pytest.raises(PcrExportError, match="layer conv_in has no learned weight"):
        rounding("conv_in", np.zeros((16, 3, 3, 3), np.float32))
    with pytest.raises(PcrExportError, match=r"no int8 weight of shape \[16, 3\] with positive scales for merge"):
        rounding("merge", np.zeros((16, 3), np.float32))
    next(tmp_path.rglob("block_00000.safetensors")).write_bytes(b"none")
    with pytest.raises(PcrExportError, match=r"block_00000.safetensors are damaged .*: delete that file and run again"):
        rounding_of(Recipe(**SETTINGS, weights="gptq", weight_bits=4), tmp_path)


SETTINGS = {"model": "toy", "num_inference_steps": len(TIMESTEPS), "guidance_scale": 1.0, "height": 16, "width": 16}
