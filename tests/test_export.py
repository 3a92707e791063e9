"""The job on a denoiser that is no diffusers model, through the public Python names."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import pytest
from class_conditional import TIMESTEPS, class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.deploy.inspect_folder import inspect_folder
from pcr_export.deploy.verify import verify_folder
from pcr_export.errors import PcrExportError
from pcr_export.export import relax_search
from pcr_export.export_trial import try_denoiser
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.progress import silent
from pcr_export.qdiffbench.sensitivity import choose_steps
from pcr_export.relaxed_steps import format_steps
from pcr_export.report import summary_rows
from pcr_export.step_scales import read_step_scales

# The artifact against its simulation: 130 dB where no activation falls on the other side of a rounding edge. One of a thousand that
# does costs its unit: 49 dB. On another CPU's sums some do.
FLIPS_DB = 35
LABELS = [0, 1, 2, 3, 4, 0]
FILES = ("step_scales.safetensors", "recipe.json", "unet/model.onnx", "unet/model.onnx_data")


def job(folder: Path, denoiser=None, resume=True, **changes) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **changes)
    return Job(
        denoiser=denoiser or class_conditional_denoiser(),
        recipe=recipe,
        conditions=LABELS,
        folder=folder,
        resume=resume,
    )


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "toy-w8a8"
    return folder, export_denoiser(job(folder))


def test_report_says_what_was_done(exported):
    folder, report = exported
    assert report == json.loads((folder / "report.json").read_text())
    assert report["format"] == 1
    assert report["calibration"]["prompts"] == 6
    assert report["calibration"]["unet_batches"] == 2 * len(TIMESTEPS) - 1
    assert report["environment"]["onnxruntime"]
    rows = {row["name"]: row for row in report["sites"]}
    assert rows["conv_in"]["reason"] == "skipped by name (conv_in)"
    assert rows["merge"]["bits"] == "w8a8"
    assert rows["merge"]["sqnr_db"] > 20
    assert report["graph"]["onnx_bytes"] > 0
    (engine,) = report["engines"]
    assert engine["ran"]
    assert engine["latency_ms"]["p50"] > 0


def test_folder_passes_its_verification_and_shows_its_scales(exported):
    folder, report = exported
    checks = list(verify_folder(folder))
    assert [what for what, _ in checks] == ["files", "signature", "image"]
    assert checks[1][1].startswith("unet: ")
    assert checks[2][1].startswith("none is stored")
    facts = inspect_folder(folder)
    assert facts["pipeline"] is None
    assert facts["float"] == {
        "skipped by name (conv_in)": ["conv_in"],
        "skipped by name (conv_out)": ["conv_out"],
        "Embedding is not quantized": ["embed"],
    }
    assert sum(group["sites"] for group in facts["scales"]["groups"]) == facts["weights"]["sites"]
    assert facts["layers"] == report["sites"]


def test_artifact_is_the_simulation(exported):
    fidelity = exported[1]["fidelity"]
    assert len(fidelity["per_step"]) == len(fidelity["simulation_vs_fp32_per_step"]) == len(TIMESTEPS)
    assert all(value is None or value > FLIPS_DB for value in fidelity["per_step"])


def test_same_seed_same_bytes(exported, tmp_path):
    export_denoiser(job(tmp_path / "again"))
    assert read(tmp_path / "again") == read(exported[0])


def test_second_run_calls_the_network_only_to_find_its_layers(exported):
    denoiser = class_conditional_denoiser()
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    before = read(exported[0])
    export_denoiser(job(exported[0], denoiser))
    assert len(calls) == 1
    assert read(exported[0]) == before


def test_other_weights_export_again(exported, tmp_path):
    folder = tmp_path / "toy"
    export_denoiser(job(folder))
    export_denoiser(job(folder, class_conditional_denoiser(seed=1)))
    assert read(folder)["unet/model.onnx_data"] != read(exported[0])["unet/model.onnx_data"]


def test_relaxed_steps_run_in_the_artifact(tmp_path):
    plain, relaxed = (
        export_denoiser(dataclasses.replace(job(tmp_path / relax, relax=relax), float_graph=float_graph))
        for relax in ("none", "first:40%")
    )
    assert all(value is None or value > FLIPS_DB for value in relaxed["fidelity"]["per_step"])
    assert plain["recipe"]["relax"] == "none"


def test_artifact_below_the_floor_is_refused_and_kept(tmp_path):
    with pytest.raises(PcrExportError, match="worst sites") as refused:
        export_denoiser(dataclasses.replace(job(tmp_path, min_sqnr_db=1000.0), float_graph=float_graph))
    assert refused.value.exit_code == 3
    assert (tmp_path / "report.json").exists()
    assert not (tmp_path / "manifest.json").exists()  # an export that is refused did not end


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PcrExportError, match="choose another folder"):
        export_denoiser(job(tmp_path / "file" / "out"))


@functools.cache
def float_graph():
    denoiser = class_conditional_denoiser()
    return trace_float_onnx(denoiser, next(denoiser.walk(LABELS[:2], [0, 1])))


def export_unchecked(folder: Path, relax: str, denoiser=None, track=silent):
    """Tracing takes longer than all else: once for all."""
    quick = {"validate": False, "float_graph": float_graph, "track": track}
    return export_denoiser(dataclasses.replace(job(folder, denoiser, relax=relax), **quick))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "toy-w8a8"
    return folder, export_unchecked(folder, "auto:8.8")


def test_the_layers_that_8_bits_hurt_most_stay_float(tmp_path, exported):
    report = export_denoiser(dataclasses.replace(job(tmp_path, skip=("conv_in", "auto:2")), float_graph=float_graph))
    rows = {row["name"]: row for row in report["sites"]}
    errors = {name: row["sensitivity"] for name, row in rows.items() if row["sensitivity"] is not None}
    worst = sorted(errors, key=errors.get)[-2:]
    floats = [name for name, row in rows.items() if not row["quantized"]]
    assert set(floats) == {"conv_in", "embed", *worst}
    assert rows[worst[0]]["reason"] == f"skipped by name ({worst[0]})"
    assert set(read_step_scales(tmp_path / "step_scales.safetensors").layers) == set(rows) - set(floats)
    assert report["recipe"]["skip"] == ["conv_in", "auto:2"]
    assert (report["fidelity"]["artifact_vs_simulation_sqnr_db"] or 100) > 20  # None where the two are equal


def test_the_search_relaxes_the_choice_of_steps_with_the_least_error(searched):
    folder, report = searched
    table = json.loads((folder / "sensitivity.json").read_text())
    assert (table["format"], table["relax_bits"], table["prompts"]) == (1, 10, len(LABELS))
    assert [(row["step"], row["timestep"]) for row in table["steps"]] == list(enumerate(TIMESTEPS))
    assert all(row["gain"] == table["base_error"] - row["error"] for row in table["steps"])
    ranking = sorted(table["steps"], key=lambda row: -row["gain"])
    assert ranking[0]["gain"] > 0
    chosen = table["chosen"]
    assert chosen["relax"] == "auto:8.8"
    choices = {"ranked": sorted(row["step"] for row in ranking[:2]), "first": [0, 1], "last": [3, 4]}
    errors = chosen["errors"]
    assert chosen["choice"] == min(choices, key=errors.get)
    assert chosen["steps"] == choices[chosen["choice"]]
    assert errors[chosen["choice"]] < errors["none"] == table["base_error"]
    assert report["relaxed"] == {
        "steps": chosen["steps"],
        "mean_activation_bits": pytest.approx(8.8),
        "choice": chosen["choice"],
        "errors": errors,
    }
    assert report["recipe"]["relax"] == json.loads((folder / "recipe.json").read_text())["relax"] == "auto:8.8"
    rows = dict(summary_rows(report))
    assert rows["relaxed steps"] == f"{format_steps(chosen['steps'])} (8.80 activation bits on average)"
    assert f"none {table['base_error']:.3g}" in rows["searched"]


def test_searched_steps_export_as_the_same_steps_by_name(searched, tmp_path):
    export_unchecked(tmp_path, format_steps(searched[1]["relaxed"]["steps"]))
    named, found = read(tmp_path), read(searched[0])
    assert [name for name in FILES if named[name] != found[name]] == ["recipe.json"]


def test_a_search_is_done_once_for_every_mean(searched):
    folder, report = searched
    before = (folder / "sensitivity.json").read_bytes()
    steps = folder / ".stages" / "sensitivity"
    stamps = {path: path.stat().st_mtime_ns for path in [*steps.glob("step_*"), *steps.glob("*/unet/model.onnx")]}
    assert len(stamps) == len(TIMESTEPS) + 2
    denoiser = class_conditional_denoiser()
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    assert export_unchecked(folder, "auto:8.8", denoiser)["relaxed"] == report["relaxed"]
    assert len(calls) == 1  # finds the layers
    tried, *_ = try_denoiser(
        job(folder, relax="last:20%", first_token="together")
    )  # as an export finds it for this network
    kept = relax_search(tried)
    (most,) = choose_steps(kept.sensitivity(), 8.4)
    assert export_unchecked(folder, "auto:8.4")["relaxed"]["steps"] == [most]
    assert export_unchecked(folder, "auto:8")["relaxed"]["steps"] == []
    export_unchecked(folder, "none")
    assert not (folder / "sensitivity.json").exists()  # nothing was searched for these steps
    export_unchecked(folder, "auto:8.8")
    assert (folder / "sensitivity.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_search_stopped_half_way_goes_on_with_the_same_bytes(searched, tmp_path):
    @contextlib.contextmanager
    def stop_at_the_third_step(description, _total):
        steps = iter(range(2))

        def advance(_count):
            if description == "sensitivity of each step" and next(steps, None) is None:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        export_unchecked(tmp_path, "auto:8.8", track=stop_at_the_third_step)
    records = sorted((tmp_path / ".stages" / "sensitivity").glob("step_*"))
    assert [path.name for path in records] == ["step_00000.json", "step_00001.json", "step_00002.json"]
    before = [path.stat().st_mtime_ns for path in records]
    export_unchecked(tmp_path, "auto:8.8")
    assert [path.stat().st_mtime_ns for path in records] == before
    assert read(tmp_path) == read(searched[0])
    assert (tmp_path / "sensitivity.json").read_bytes() == (searched[0] / "sensitivity.json").read_bytes()
