"""NAME[:key=value,...] has one spelling."""

import pytest

from pcr_export.errors import PcrExportError
from pcr_export.recipe import Recipe
from pcr_export.scheduler_setting import SchedulerSetting, parse_scheduler

SETTINGS = {"model": "tiny-sdxl", "num_inference_steps": 20, "guidance_scale": 4.5, "height": 64, "width": 64}


def test_one_spelling():
    text = " EulerDiscreteScheduler: use_karras_sigmas=true ,timestep_spacing = trailing"
    setting = parse_scheduler(text)
    assert setting == SchedulerSetting(
        "EulerDiscreteScheduler", (("timestep_spacing", "trailing"), ("use_karras_sigmas", "true"))
    )
    assert str(setting) == "EulerDiscreteScheduler:timestep_spacing=trailing,use_karras_sigmas=true"
    assert parse_scheduler(str(setting)) == setting
    assert str(parse_scheduler("TCDScheduler")) == "TCDScheduler"
    assert Recipe(**SETTINGS, scheduler=text) == Recipe(**SETTINGS, scheduler=str(setting))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "unknown scheduler ''"),
        ("Euler", "did you mean EulerDiscreteScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "choose one of DDIMScheduler"),
        ("DPMSolverSDEScheduler", "use --scheduler DPMSolverMultistepScheduler:algorithm_type=sde"),
        ("DDIMScheduler:", "write NAME or NAME:key=value"),
        ("DDIMScheduler:eta", "is not understood"),
        ("DDIMScheduler:eta=", "is not understood"),
        ("DDIMScheduler:a=1,,b=2", "is not understood"),
        ("DDIMScheduler:a=1,a=2", "gives a twice"),
    ],
)
def test_what_is_not_understood(text, match):
    with pytest.raises(PcrExportError, match=match):
        parse_scheduler(text)
    with pytest.raises(PcrExportError, match=match):
        Recipe(**SETTINGS, scheduler=text)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"guidance_rescale": 1.5}, r"--guidance-rescale must lie in \[0, 1\], got 1.5"),
        ({"guidance_rescale": float("nan")}, r"must lie in \[0, 1\], got nan"),
        (
            {"guidance_rescale": 0.7, "guidance_scale": 1.0},
            "--guidance-rescale 0.7 needs guidance: give a --guidance-sc",
        ),
    ],
)
def test_rescaled_guidance(change, match):
    with pytest.raises(PcrExportError, match=match):
        Recipe(**{**SETTINGS, **change})
