import dataclasses
import hashlib
import json

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.recipe import LATER_SETTINGS, Lora, Recipe, parse_bits, parse_keep, read_recipe, recipe_from_json
from pcr_export.relaxed_steps import parse_relaxed_steps

LORA = Lora(name="style.safetensors", sha256="0" * 64, scale=0.5)
SETTINGS = {"model": "tiny-sdxl", "num_inference_steps": 20, "guidance_scale": 4.5, "height": 64, "width": 64}


def test_json_goes_both_ways():
    recipe = Recipe(**SETTINGS, relax="first:20%", skip=("conv_in",), lora=(LORA, LORA))
    assert recipe_from_json(recipe.to_json()) == recipe


def test_every_setting_changes_the_hash():
    recipe = Recipe(**SETTINGS)
    changes = {
        "ranges": "minmax",
        "scheme": "static",
        "relax": "0:2",
        "affine": False,
        "skip": (),
        "model": "x",
        "percentile": 99.0,
        "weight_bits": 4,
        "observed_steps": "uniform:2",
        "reduce": "min-mean",
        "smooth_quant": 0.5,
        "weights": "gptq",
        "keep": "4",
        "lora": (LORA,),
        "first_token": "together",
        "scheduler": "DDIMScheduler",
        "guidance_rescale": 0.7,
        "min_sqnr_db": 30.0,
    }
    companions = {
        "observed_steps": {"scheme": "static"},
        "reduce": {"scheme": "static", "ranges": "minmax", "affine": False},
        "keep": {"weight_bits": 4},
    }
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        change = changes[field.name] if field.name in changes else value + 1
        plain = dataclasses.replace(recipe, **companions.get(field.name, {}))
        changed = dataclasses.replace(plain, **{field.name: change})
        assert changed.hash() != plain.hash(), field.name


@pytest.mark.parametrize("change", [{"name": "other.safetensors"}, {"sha256": "1" * 64}, {"scale": 0.6}])
def test_everything_of_a_lora_changes_the_hash(change):
    recipe = Recipe(**SETTINGS, lora=(LORA,))
    changed = dataclasses.replace(recipe, lora=(dataclasses.replace(LORA, **change),))
    assert changed.hash() != recipe.hash()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ranges": "max"}, "--ranges max is unknown: choose one of mse"),
        ({"weight_bits": 3}, "use w8a8"),
        ({"activation_bits": 17}, "--bits w8a17 is not supported: use w8a8"),
        ({"activation_bits": 10, "relax": "last:2"}, "--relax last:2 needs 8-bit activations: with a10 write"),
        ({"calib_size": 0}, "--calib-size must be at least 1"),
        ({"relax_bits": 17}, "9..16"),
        ({"skip": ("auto:0",)}, "--skip auto:0 is not understood: write a number of layers, such as auto:4"),
        ({"skip": ("auto:some",)}, "--skip auto:some is not understood"),
        ({"percentile": 10.0}, "--percentile"),
        ({"relax": "middle"}, "write none, first:20%"),
        ({"weights": "adaquant"}, "--weights adaquant is unknown: choose one of rtn, gptq, adaround"),
        ({"weight_rounds": 0}, "--weight-rounds must be at least 1"),
        ({"keep": "4"}, "--keep 4 needs fewer than 8 bits of weights"),
        ({"keep": "some", "weight_bits": 4}, "--keep some is not understood: write a number of layers"),
    ],
)
def test_bad_settings_say_what_to_write(change, match):
    with pytest.raises(PcrExportError, match=match):
        Recipe(**SETTINGS, **change)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_recipe_is_refused(text):
    with pytest.raises(PcrExportError, match="export again"):
        recipe_from_json(text)


def test_damaged_lora_in_a_recipe_is_refused():
    values = json.loads(Recipe(**SETTINGS).to_json())
    for lora in ([{"name": "x"}], ["x"], 5):
        with pytest.raises(PcrExportError, match=r"the recipe is damaged .*lora.*: export again"):
            recipe_from_json(json.dumps({**values, "lora": lora}))


def test_bits():
    assert parse_bits("W8A8") == (8, 8)
    with pytest.raises(PcrExportError, match="as w8a8"):
        parse_bits("int8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ()),
        ("first:20%", (0, 1, 2, 3)),
        ("last:0.1", (18, 19)),
        ("0:2,19", (0, 1, 19)),
        ("first:0", ()),
        ("last:100%", tuple(range(20))),
    ],
)
def test_relaxed_steps_are_half_open_and_exact(text, expected):
    assert parse_relaxed_steps(text, 20) == expected


@pytest.mark.parametrize("text", ["20", "18:21", "first:120%", "first", "1-3", ""])
def test_relaxed_steps_that_do_not_exist_are_refused(text):
    with pytest.raises(PcrExportError, match="--relax"):
        parse_relaxed_steps(text, 20)


def test_the_recipe_of_a_folder(tmp_path):
    with pytest.raises(PcrExportError, match=r"has no recipe\.json, so it is no exported folder"):
        read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PcrExportError, match=r"recipe\.json can't be read .*: export again"):
        read_recipe(tmp_path)
    recipe = Recipe(model="m", num_inference_steps=2, guidance_scale=1.0, height=8, width=8)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read_recipe(tmp_path) == recipe


def test_recipes_of_before_learned_weights_keep_their_hash():
    """Their results are published under it."""
    recipe = Recipe(**SETTINGS, scheme="static")
    before = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in LATER_SETTINGS}
    before["min_sqnr_db"] = 20.0
    assert recipe.hash() == hashlib.sha256((json.dumps(before, indent=2, sort_keys=True) + "\n").encode()).hexdigest()
    assert recipe_from_json(json.dumps(before)) == dataclasses.replace(recipe, min_sqnr_db=20.0)


def test_results_of_the_one_pass_calibration_are_not_taken_for_those_of_today():
    recipe = Recipe(**SETTINGS)
    before = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in LATER_SETTINGS}
    before["min_sqnr_db"] = 20.0
    assert recipe.hash() != hashlib.sha256((json.dumps(before, indent=2, sort_keys=True) + "\n").encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "found"), [("none", (0, None)), ("4", (4, None)), ("4.5bit", (0, 4.5)), ("5bits", (0, 5.0))]
)
def test_keep(text, found):
    assert parse_keep(text) == found
