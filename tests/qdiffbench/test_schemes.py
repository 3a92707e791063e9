"""Every scheme of the table is a recipe, and those that change the network still give an artifact equal to its simulation."""

import dataclasses

import pytest
from diffusers import DiffusionPipeline
from models.tiny_pipelines import tiny_sdxl

from pcr_export.export import export_denoiser
from pcr_export.export_job import Job
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.qdiffbench.schemes import SCHEMES
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import parse_relaxed_steps

BASE = Recipe(model="tiny-sdxl", num_inference_steps=20, guidance_scale=4.5, height=64, width=64)


def test_every_scheme_is_a_recipe_of_its_own():
    recipes = {name: dataclasses.replace(BASE, **changes) for name, changes in SCHEMES.items()}
    assert len({recipe.hash() for recipe in recipes.values()}) == len(SCHEMES)
    assert recipes["pcr-affine"] == BASE


def test_names_say_the_scheme_and_the_bits():
    kinds = {"static": "static", "float-trajectory": "per-step", "progressive": "pcr"}
    for name, changes in SCHEMES.items():
        recipe = dataclasses.replace(BASE, **changes)
        assert name.startswith(f"{kinds[recipe.scheme]}-"), name
        assert name.endswith("-w4a8") == (recipe.weight_bits == 4), name
        assert recipe.activation_bits == 8


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("pcr-affine", ()),
        ("pcr-first-5", (0,)),
        ("pcr-first-10", (0, 1)),
        ("pcr-first-20", (0, 1, 2, 3)),
        ("pcr-last-5", (19,)),
        ("pcr-last-10", (18, 19)),
        ("pcr-last-20", (16, 17, 18, 19)),
        ("pcr-last-20-w4a8", (16, 17, 18, 19)),
        ("pcr-all-10bit", tuple(range(20))),
    ],
)
def test_relaxed_steps_are_those_of_the_name(name, steps):
    recipe = dataclasses.replace(BASE, **SCHEMES[name])
    assert parse_relaxed_steps(recipe.relax, 20) == steps
    assert recipe.relax_bits == 10


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl(tmp_path_factory.mktemp("schemes") / "tiny"))
    return denoiser_from_pipeline(pipeline, num_inference_steps=3, guidance_scale=4.5, height=16, width=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static-modelopt", "static-q-diffusion"])
def test_artifact_of_a_rewritten_network_is_its_simulation(denoiser, name, tmp_path):
    changes = {**SCHEMES[name], "observed_steps": "uniform:2"}
    recipe = Recipe(
        model="tiny", num_inference_steps=3, guidance_scale=4.5, height=16, width=16, min_sqnr_db=0, **changes
    )
    prompts = ["red square", "a dog", "two cats", "red"]
    before = set(denoiser.network.state_dict())
    report = export_denoiser(Job(denoiser=denoiser, recipe=recipe, conditions=prompts, folder=tmp_path))
    assert set(denoiser.network.state_dict()) == before
    fidelity, sites = report["fidelity"], {row["name"]: row for row in report["sites"]}
    # As near as two float32 computations of the simulation are to each other, in a random network whose steps amplify rounding.
    assert fidelity["artifact_vs_simulation_sqnr_db"] > fidelity["rounding_floor_sqnr_db"] - 6
    if name == "static-modelopt":
        smoothed = sites["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.linear"]
        assert smoothed["bits"] == "w8a8"
        for module in ("down_blocks.1.resnets.0.conv_shortcut", "time_embedding.linear_1"):
            assert sites[module]["reason"].startswith("skipped by name")
    else:
        for half in ("deep", "shortcut"):
            assert sites[f"up_blocks.0.resnets.0.conv_shortcut.{half}"]["bits"] == "w8a8"
        assert sites["down_blocks.1.resnets.0.conv_shortcut"]["bits"] == "w8a8"  # of the encoder: nothing concatenated
