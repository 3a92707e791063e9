"""A text's first token apart: found where it stands out, the same function, one site, and what it does to the quantized network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models.tiny_pipelines import tiny_sdxl

from pcr_export.calibrate.first_token import ApartLinear, find_first_tokens
from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.rewrite_network import rewrite_network
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.engine_settings import EngineSettings
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.errors import PcrExportError
from pcr_export.export import export_denoiser
from pcr_export.export_job import Job
from pcr_export.models.catalog import read_json, resolve
from pcr_export.models.denoiser import Denoiser
from pcr_export.models.load import load_model
from pcr_export.recipe import Recipe
from pcr_export.step_scales import read_step_scales

PROMPTS, SEEDS = ["a red cat", "a dog", "a blue tree", "the sea"], [1, 2, 3, 4]
TIMES = 2000  # the embedding; what the UNet reads is then some 50 times as large as the other tokens, as in SDXL
SAMPLING: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("first_token") / "random")


def load(source: Path, times: float) -> Denoiser:
    """Random SDXL whose text encoders embed the first token `times` as large."""
    model = load_model(replace(resolve(str(source)), **SAMPLING))
    for encoder in (model.pipeline.text_encoder, model.pipeline.text_encoder_2):
        encoder.get_input_embeddings().weight.data[model.pipeline.tokenizer.bos_token_id] *= times
    return model.denoiser()


@pytest.fixture(scope="module")
def large(source: Path) -> Denoiser:
    return load(source, TIMES)


def recipe(**changes: Any) -> Recipe:
    return Recipe(model="random", **SAMPLING, **changes)


def example_of(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return next(denoiser.walk(PROMPTS, SEEDS))


def apart(denoiser: Denoiser, **changes: Any) -> Denoiser:
    return rewrite_network(denoiser, example_of(denoiser), PROMPTS, SEEDS, recipe(first_token="apart", **changes))


def test_only_a_first_token_that_stands_out_is_found(source: Path, large: Denoiser) -> None:
    small = load(source, 1.0)
    assert find_first_tokens(small, example_of(small), ()) == {}
    example = example_of(large)
    found = find_first_tokens(large, example, ())
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in found)
    (site,) = {site for site, _ in found.values()}
    u = found[site][1]
    assert site.endswith("attn2.to_k")
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    text = example["encoder_hidden_states"][len(PROMPTS) :, 0]
    rounding = 3 * u.numel() * 2**-24  # three sums of as many float32 products
    # it is the token's own direction, the same for every prompt
    torch.testing.assert_close(text @ u, text.norm(dim=-1), rtol=rounding, atol=0)


def test_it_is_the_same_function_and_still_one_site(large: Denoiser) -> None:
    rewritten, example = apart(large), example_of(large)
    # the first token is 50 times as large as the others; its keys and values are float32 sums of 32 products, in another order
    rounding = 50 * 32 * 2**-24
    with torch.inference_mode():
        torch.testing.assert_close(rewritten(example), large(example), rtol=0, atol=rounding)
    split = [name for name, module in rewritten.network.named_modules() if isinstance(module, ApartLinear)]
    layers = {layer.name: layer for layer in find_layers(rewritten, example, ())}
    assert len(split) >= 4
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in split)
    assert {layers[f"{name}.rest"].site for name in split} == {f"{split[0]}.rest"}


def test_a_layer_that_is_skipped_stays_as_it_is(large: Denoiser) -> None:
    rewritten = apart(large, skip=("*attn2.to_v",))
    split = [name for name, module in rewritten.network.named_modules() if isinstance(module, ApartLinear)]
    assert split
    assert all(name.endswith("attn2.to_k") for name in split)


def error_of_keys(denoiser: Denoiser) -> float:
    """Relative squared error of the keys that the quantized network makes of all tokens but the first."""
    example = example_of(denoiser)
    layers = find_layers(denoiser, example, ())
    name = next(layer.name for layer in layers if "attn2.to_k" in layer.name).removesuffix(".rest")
    keys: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        keys.append(output[len(PROMPTS) :, 1:].clone())

    scales = calibrate(denoiser, layers, PROMPTS, SEEDS, recipe(), round_weight=NEAREST_8)
    to_k = denoiser.network.get_submodule(name)
    hook = to_k.register_forward_hook(keep)
    with torch.inference_mode():
        denoiser(example)
    hook.remove()
    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        hook = to_k.register_forward_hook(keep)  # behind the simulation's own
        simulated_call(simulation, scales, denoiser.timestep)(example)
        hook.remove()
    exact, quantized = keys
    return ((quantized - exact).square().sum() / exact.square().sum()).item()


def test_the_other_tokens_gain(large: Denoiser) -> None:
    together, split = error_of_keys(large), error_of_keys(apart(large))
    print(f"relative squared error of the keys: together {together:.1e}, apart {split:.1e}")
    assert split < together / 100


def test_a_network_without_such_a_token(source: Path) -> None:
    with pytest.raises(PcrExportError, match="no layer reads tokens of which the first stands out"):
        apart(load(source, 1.0))


@pytest.mark.slow
def test_an_export_finds_it_by_itself(large: Denoiser, tmp_path: Path) -> None:
    lines: list[str] = []
    job = Job(denoiser=large, recipe=recipe(), conditions=PROMPTS, folder=tmp_path / "out", log=lines.append)
    export_denoiser(replace(job, engines=EngineSettings(backend="tensorrt-rtx", targets=("sm89",), build=False)))
    scales = read_step_scales(tmp_path / "out" / "step_scales.safetensors")
    assert [site for site in scales.sites if "attn2.to_k" in site or "attn2.to_v" in site] == [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.rest"
    ]
    assert any("first token stands out for" in line and "attn2.to_k: quantized apart" in line for line in lines)
    fidelity = read_json(tmp_path / "out" / "report.json")["fidelity"]
    assert min(fidelity["per_step"]) > 35  # the graph computes what was calibrated
    model = onnx.shape_inference.infer_shapes(onnx.load(tensorrt_onnx(tmp_path / "out"), load_external_data=False))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    (difference,) = [node.output[0] for node in model.graph.node if node.name.startswith("node_sub")]
    assert types[difference] == onnx.TensorProto.FLOAT  # float16 would lose what the large token leaves
