"""The study on the reference model, with few steps and prompts: real exports, real images, real figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.study import METRICS
from pcr_export.study_table import CALIBRATION_SETS, StudyRequest, replace_rows, run_study

SCHEMES = ("static-minmax", "pcr-last-20")


@pytest.fixture(scope="module")
def request_() -> StudyRequest:
    return StudyRequest(model="tiny-sdxl", out=Path("unset"), schemes=SCHEMES, images=4, steps=3, calib_size=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, request_: StudyRequest) -> tuple[StudyRequest, dict]:
    request = replace(request_, out=tmp_path_factory.mktemp("study"), scale_bars=True, simulation_seeds=1)
    return request, run_study(request)


@pytest.mark.slow
def test_every_scheme_has_a_row_in_each_domain(finished: tuple[StudyRequest, dict]) -> None:
    request, content = finished
    assert content == json.loads((request.folder / "study.json").read_text())
    rows = content["rows"]
    assert [(row["scheme"], row["domain"]) for row in rows] == [(s, d) for s in SCHEMES for d in ("in", "out")]
    for row in rows:
        assert row["bits"] == "w8a8"
        assert row["relaxed_steps"] == ([2] if row["scheme"] == "pcr-last-20" else [])
        assert row["n_images"] == 4
        assert set(METRICS) <= set(row)
        assert row["psnr_db"] > 15  # the artifact draws what the float model draws
    assert {row["domain"] for row in content["scale_bars"]} == {"in", "out"}
    half, other = (
        [row["psnr_db"] for row in content["scale_bars"] if row["scheme"] == name]
        for name in ("fp16", "fp32-other-noise")
    )
    assert min(half) > max(row["psnr_db"] for row in rows) > max(other)
    assert "sha256" in json.dumps(content["protocol"])
    assert "pcr-last-20" in (request.folder / "report.html").read_text()


@pytest.mark.slow
def test_the_simulation_is_scored_beside_its_artifact(finished: tuple[StudyRequest, dict]) -> None:
    artifact, simulation = finished[1]["simulation"]
    assert (artifact["simulated"], simulation["simulated"]) == (False, True)
    assert artifact["domain"] == simulation["domain"] == "in"
    assert artifact["key"] != simulation["key"]
    assert simulation["psnr_db"] == pytest.approx(artifact["psnr_db"], abs=3)  # of 4 images, whose roundings differ


@pytest.mark.slow
def test_calibration_sets_of_every_size_and_kind(tmp_path: Path, request_: StudyRequest) -> None:
    request = replace(request_, out=tmp_path, schemes=("pcr-affine",), images=3, steps=2, calibration_sets=True)
    content = run_study(request)
    sets = {(row["prompts"], row["domain"], row["eval_domain"]): row["psnr_db"] for row in content["calibration_sets"]}
    assert set(sets) == {(*each, domain) for each in CALIBRATION_SETS for domain in ("in", "out")}
    assert len(set(sets.values())) == len(sets)  # each was calibrated by itself
    assert content["rows"][0]["seed"] == 0
    assert "calibrated on" in (request.folder / "report.html").read_text()


@pytest.mark.slow
def test_rows_that_are_known_are_not_made_again(finished: tuple[StudyRequest, dict]) -> None:
    request, content = finished
    again = replace(
        request,
        out=request.out / "again",
        json_file=request.folder / "study.json",
        scale_bars=False,
        simulation_seeds=0,
    )
    assert run_study(again)["rows"] == content["rows"]
    assert not (again.folder / "images").exists()


@pytest.mark.slow
def test_a_stopped_study_ends_with_the_same_rows(finished: tuple[StudyRequest, dict]) -> None:
    """The JSON file and half of a scheme's images are lost; the float model's are there."""
    request, content = finished
    (request.folder / "study.json").unlink()
    images = request.folder / "images" / "in" / "pcr-last-20-0"
    for index in (1, 3):
        (images / f"{index:05d}.png").unlink()
    shutil.rmtree(request.folder / "stages" / "in")
    assert run_study(replace(request, scale_bars=False, simulation_seeds=0))["rows"] == content["rows"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schemes": ("pcr-best",)}, "--schemes pcr-best is unknown: choose of static-minmax"),
        ({"images": 1}, "--images 1: a Frechet distance needs 2"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"in_domain_file": Path("nowhere.txt")}, "nowhere.txt is missing"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    tmp_path: Path, request_: StudyRequest, change: dict, match: str
) -> None:
    with pytest.raises(PcrExportError, match=match):
        run_study(replace(request_, out=tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_a_row_of_an_older_calibration_leaves_the_table() -> None:
    row = {"scheme": "pcr-affine", "simulated": False, "seed": 0, "domain": "in", "n_images": 2048}
    old = [{**row, "key": "one pass"}, {**row, "domain": "out", "key": "out"}, {**row, "seed": 1, "key": "seed"}]
    assert [each["key"] for each in replace_rows(old, [{**row, "key": "today"}])] == ["out", "seed", "today"]


def test_a_study_of_another_format_is_refused(tmp_path: Path, request_: StudyRequest) -> None:
    path = tmp_path / "study.json"
    path.write_text('{"format": 99}')
    with pytest.raises(PcrExportError, match="study format 99"):
        run_study(replace(request_, out=tmp_path, json_file=path))
