"""`NAME[:key=value,...]`: the scheduler of diffusers that was asked for, and its settings. Plain data, checked by name alone."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pcr_export.errors import PcrExportError

BY_NOISE_SCHEDULE = (  # step by a trained noise schedule, so that each can stand in for any other
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
BY_SIGMA = (
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
)  # whose timesteps are log(sigma) / 4 (arXiv 2206.00364)
INSTEAD = {  # of one that gives another image each time
    "DPMSolverSDEScheduler": (
        "draws its noise past the image's seed, so that the same seed gives another image each time",
        "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true",
    )
}


@dataclass(frozen=True)
class SchedulerSetting:
    """A scheduler class of diffusers and the arguments of its constructor that were asked for, as texts."""

    name: str
    values: tuple[tuple[str, str], ...] = ()  # by key

    def __str__(self) -> str:
        """The one spelling of it, which `parse_scheduler` reads."""
        return self.name + ":" * bool(self.values) + ",".join(f"{key}={value}" for key, value in self.values)


def parse_scheduler(text: str) -> SchedulerSetting:
    """'EulerDiscreteScheduler:use_karras_sigmas=true' -> its name and its values, keys in the order of letters.

    Raises PcrExportError where the text has another form, or the name is none that can be walked with.
    """
    name, colon, rest = text.strip().partition(":")
    _check_name(name.strip())
    values: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not key.isidentifier() or not equals or not value:
            raise PcrExportError(
                f"--scheduler {text} is not understood: write NAME or NAME:key=value,key=value, such as "
                "EulerDiscreteScheduler:timestep_spacing=trailing"
            )
        if key in values:
            raise PcrExportError(f"--scheduler {text} gives {key} twice: give it once")
        values[key] = value
    return SchedulerSetting(name.strip(), tuple(sorted(values.items())))


def _check_name(name: str) -> None:
    if name in INSTEAD:
        reason, instead = INSTEAD[name]
        raise PcrExportError(f"{name} {reason}: use --scheduler {instead}")
    known = (*BY_NOISE_SCHEDULE, *BY_SIGMA)
    if name not in known:
        stem = name.removesuffix("Scheduler")
        longer = sorted((each for each in known if stem and each.startswith(stem)), key=len)
        close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise PcrExportError(f"unknown scheduler {name!r}: {hint}choose one of {', '.join(known)}")
