"""docs/denoiser.md: its blocks run in their order, and each denoiser that they make passes its trial."""

import re
from pathlib import Path

import pytest
import torch

from pcr_export import DenoiserEvaluation, Job, PcrExportError, Recipe, evaluate_denoiser
from pcr_export.export_trial import try_denoiser
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.qdiffbench.evaluate import Evaluation

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """What the blocks define, run in a folder of their own."""
    folder, names = tmp_path_factory.mktemp("docs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "denoiser.md").read_text(), re.DOTALL):
            exec(block, names)
    return folder, names


@pytest.mark.parametrize("name", ["flow", "indexed"])
def test_each_denoiser_has_a_graph(documented, name):
    denoiser = documented[1][name]
    steps = len(denoiser.timesteps)
    recipe = Recipe(model=name, num_inference_steps=steps, guidance_scale=1.0, height=16, width=16)
    job, example, _ = try_denoiser(Job(denoiser=denoiser, recipe=recipe, conditions=[0, 0], folder=Path("unused")))
    assert [value.name for value in trace_float_onnx(job.denoiser, example).graph.inputs] == list(denoiser.dynamic_axes)


def test_the_export_calibrates_calib_size_conditions_and_keeps_both_ends_float(documented):
    names = documented[1]
    report = names["report"]
    assert report["calibration"]["prompts"] == 8
    rows = {row["name"]: row["reason"] for row in report["sites"]}
    assert (rows["patch"], rows["middle"]) == ("first layer of the network", None)
    assert rows["out"] == "last layer of the network"
    assert rows["table"] == "Embedding is not quantized"
    assert report["warnings"] == []


def test_the_evaluation_has_figures_and_a_page(documented):
    folder, names = documented
    (domain,) = names["result"]["domains"]
    assert domain["scores"]["psnr_db"] > 30
    assert domain["scores"]["fid_to_fp32"] is None
    assert "conditions given in Python" in (folder / names["folder"] / "report.html").read_text()


def test_what_evaluation_needs_is_said(documented):
    folder, names = documented
    exported = folder / names["folder"]
    with pytest.raises(PcrExportError, match="was exported from a Denoiser, which only Python has"):
        Evaluation(folder=exported).domains()
    with pytest.raises(PcrExportError, match="without decode makes no images"):
        evaluate_denoiser(DenoiserEvaluation(folder=exported, denoiser=names["flow"], conditions=[0, 1]))
    torch.nn.init.zeros_(names["guided"].network.out.bias)
    with pytest.raises(PcrExportError, match="exported from a network with other weights"):
        evaluate_denoiser(DenoiserEvaluation(folder=exported, denoiser=names["guided"], conditions=[0, 1]))
