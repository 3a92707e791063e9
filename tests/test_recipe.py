import dataclasses

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.recipe import Recipe, parse_bits, read_recipe, recipe_from_json
from pcr_export.relaxed_steps import parse_relaxed_steps

SETTINGS = {"model": "tiny-sdxl", "num_inference_steps": 20, "guidance_scale": 4.5, "height": 64, "width": 64}


def test_json_goes_both_ways():
    recipe = Recipe(**SETTINGS, relax="first:20%", skip=("conv_in",))
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
    }
    companions = {
        "observed_steps": {"scheme": "static"},
        "reduce": {"scheme": "static", "ranges": "minmax", "affine": False},
    }
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if field.name == "activation_bits":
            continue  # one value so far
        change = changes[field.name] if field.name in changes else value + 1
        plain = dataclasses.replace(recipe, **companions.get(field.name, {}))
        changed = dataclasses.replace(plain, **{field.name: change})
        assert changed.hash() != plain.hash(), field.name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ranges": "max"}, "--ranges max is unknown: choose one of mse"),
        ({"weight_bits": 3}, "use w8a8"),
        ({"calib_size": 0}, "--calib-size must be at least 1"),
        ({"relax_bits": 16}, "9..15"),
        ({"percentile": 10.0}, "--percentile"),
        ({"relax": "middle"}, "write none, first:20%"),
    ],
)
def test_bad_settings_say_what_to_write(change, match):
    with pytest.raises(PcrExportError, match=match):
        Recipe(**SETTINGS, **change)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_recipe_is_refused(text):
    with pytest.raises(PcrExportError, match="export again"):
        recipe_from_json(text)


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
    with pytest.raises(PcrExportError, match=r"recipe\.json is no text .*: export again"):
        read_recipe(tmp_path)
    recipe = Recipe(model="m", num_inference_steps=2, guidance_scale=1.0, height=8, width=8)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read_recipe(tmp_path) == recipe
