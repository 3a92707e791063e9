"""Each thing that can be wrong with a Denoiser is said in one line, before its network is calibrated."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from class_conditional import TIMESTEPS, class_conditional_denoiser, walk
from torch import nn

from pcr_export import Denoiser, Job, PcrExportError, Recipe
from pcr_export.export import export_denoiser
from pcr_export.export_trial import try_denoiser
from pcr_export.models.check_denoiser import check_timesteps, hold_to_timesteps
from pcr_export.models.denoiser import sample

LABELS = [0, 1, 2]
AXES = {"x": {0: "batch", 2: "height", 3: "width"}, "t": {}, "label": {0: "batch"}}


def job(denoiser: Denoiser, **changes) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16)
    settings = {"denoiser": denoiser, "recipe": recipe, "conditions": LABELS, "folder": Path("unused"), **changes}
    return Job(**settings)


def with_inputs(change: Callable) -> Callable:
    """The walk, with every dict of inputs passed through `change`."""

    def changed(labels, seeds):
        inner = walk(labels, seeds)
        inputs = next(inner)
        while True:
            output = yield change(dict(inputs))
            try:
                inputs = inner.send(output)
            except StopIteration as stop:
                return stop.value

    return changed


def twice(labels, seeds):
    inner = walk(labels, seeds)
    inputs = next(inner)
    while True:
        one = yield inputs
        two = yield inputs
        try:
            inputs = inner.send(one + two)
        except StopIteration as stop:
            return stop.value


def random_noise(labels, seeds):
    state = torch.random.get_rng_state()
    torch.manual_seed(next(NUMBERS))
    noise = torch.randn(len(labels), 3, 16, 16)
    torch.random.set_rng_state(state)
    return with_inputs(lambda inputs: {**inputs, "x": inputs["x"] + noise})(labels, seeds)


NUMBERS = count()


def in_place(labels, seeds):
    inner = walk(labels, seeds)
    inputs = next(inner)
    while True:
        output = yield inputs
        try:
            inputs = inner.send(output.mul_(2))
        except StopIteration as stop:
            return stop.value


def short(labels, seeds):
    inner = walk(labels, seeds)
    inputs = next(inner)
    for _ in range(3):
        inputs = inner.send((yield inputs))
    return inputs["x"]


def endless(labels, seeds):
    inputs = next(walk(labels, seeds))
    while True:
        yield inputs


def no_result(labels, seeds):
    yield from walk(labels, seeds)


def changed_input(name: str, change: Callable) -> dict:
    return {"walk": with_inputs(lambda inputs: {**inputs, name: change(inputs[name])})}


def without_label_axis() -> dict:
    return {"dynamic_axes": {**AXES, "label": {}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (901.0, 700.0, 500.0, 300.0, 100.0)}, "call 0 of the walk is at timestep 900, where the denoiser has 901"),
        ({"timesteps": TIMESTEPS[:3]}, "the walk goes on after 3 calls"),
        ({"timesteps": (*TIMESTEPS, 50.0)}, "the walk ends after 5 calls, the denoiser has 6 timesteps"),
        ({"walk": short}, "the walk ends after 3 calls, the denoiser has 5 timesteps"),
        ({"walk": endless}, "call 1 of the walk is at timestep 900, where the denoiser has 700"),
        ({"walk": twice}, "the walk calls the network twice at each timestep: join both calls in one batch"),
        ({"timesteps": ()}, "timesteps are finite numbers"),
        ({"timesteps": (0.1, 0.3, 0.5, 0.7, 0.9)}, "the timesteps ascend, from 0.1 to 0.9, and step 0 is the noisiest: yield 0.9 - t"),
        ({"timesteps": (9e8, 9e8 - 1, 500.0, 300.0, 100.0)}, "are one number in float32"),
        ({"dynamic_axes": {"y": AXES["x"], "t": {}, "label": {}}}, r"yields inputs \['x', 't', 'label'\], dynamic_axes has \['y', 't'"),
        ({"timestep": "time"}, "timestep='time' is none of the inputs"),
        (changed_input("t", lambda t: t.double()), "timestep t is float64 of shape"),
        (changed_input("t", lambda t: t.long()), "timestep t is int64 of shape"),
        (changed_input("t", lambda t: t.reshape(1)), r"timestep t is float32 of shape \[1\]: yield a float32 of rank 0"),
        (changed_input("t", float), "input t is of type float: yield a tensor"),
        (changed_input("x", lambda x: x.double()), "input x is float64"),
        (changed_input("x", lambda x: x.half()), "input x is float16"),
        (without_label_axis(), r"axis 0 of input label changes with the batch \(1 for one condition, 2 for two\).*'label': \{0: 'batch'\}"),
        ({"dynamic_axes": {**AXES, "label": {1: "batch"}}}, r"dynamic_axes has axis 1 of label, whose shape is \[2\]"),
        ({"dynamic_axes": {**AXES, "x": {0: "batch", 2: "batch"}}}, "calls axis 2 of x batch, which is 16 there and 2 elsewhere"),
        ({"walk": random_noise}, "not deterministic: input x of call 0 differs between two walks with the same seeds"),
        ({"walk": in_place}, "changes the network's output in place"),
        ({"walk": no_result}, "the walk returns NoneType for 2 conditions"),
        ({"walk": lambda labels, seeds: []}, "it is a generator function"),
        ({"walk": with_inputs(lambda inputs: [*inputs.values()])}, "the walk yields list: yield the network's inputs by name"),
        ({"walk": lambda labels, seeds: walk(labels, seeds[:0])}, "the walk fails with RuntimeError"),
        ({"call": lambda network, inputs: network(inputs["y"])}, "the denoiser's call fails with KeyError: 'y'"),
        ({"call": lambda network, inputs: (network(*inputs.values()),)}, "call returns tuple"),
        ({"call": lambda network, inputs: network(*inputs.values()).double()}, "output is float64"),
        ({"call": lambda network, inputs: network(*inputs.values())[:1]}, "axis 0 of the first input is batch, 2 here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_network_is_calibrated(changes, message):
    denoiser = replace(class_conditional_denoiser(), **changes)
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(PcrExportError, match=message) as refused:
        try_denoiser(job(denoiser))
    assert "\n" not in str(refused.value)
    assert len(calls) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: network.train(), "the network is in train mode"),
        (lambda network: network.middle.norm.train(), r"train mode \(middle.norm and 0 more"),
        (lambda network: network.half(), "network's embed.weight is float16: call network.float"),
        (lambda network: network.merge.double(), "network's merge.weight is float64"),
        (lambda network: network.merge.to("meta"), "merge.weight is on the meta device"),
    ],
)
def test_a_network_in_another_state_is_refused(change, message):
    denoiser = class_conditional_denoiser()
    change(denoiser.network)
    with pytest.raises(PcrExportError, match=message):
        try_denoiser(job(denoiser))


def test_conditions_without_seeds_are_refused():
    for changes in ({"seeds": [1]}, {"conditions": []}):
        with pytest.raises(PcrExportError, match="for each"):
            try_denoiser(job(class_conditional_denoiser(), **changes))


def test_steps_of_recipe_and_denoiser_must_match(tmp_path):
    recipe = Recipe(model="toy", num_inference_steps=20, guidance_scale=1.0, height=16, width=16)
    with pytest.raises(PcrExportError, match="num_inference_steps=20, the denoiser 5 timesteps"):
        export_denoiser(job(class_conditional_denoiser(), recipe=recipe, folder=tmp_path))
    repeated = replace(class_conditional_denoiser(), timesteps=(900.0, 900.0, 500.0))
    check_timesteps(repeated, 3)
    check_timesteps(repeated, 2)


def test_a_walk_whose_timesteps_depend_on_the_outputs_is_stopped_at_that_call():
    def adaptive(labels, seeds):
        inner = walk(labels, seeds)
        inputs, calls = next(inner), 0
        while True:
            output = yield inputs
            calls += 1
            inputs = inner.send(output)
            if calls == 2 and float(output.max()) == 0:
                inputs = {**inputs, "t": torch.tensor(450.0)}

    denoiser = replace(class_conditional_denoiser(), walk=adaptive)
    outputs = []

    def call(inputs):
        outputs.append(torch.zeros_like(inputs["x"]))
        return outputs[-1]

    with pytest.raises(PcrExportError, match="call 2 of the walk is at timestep 450, where the denoiser has 500"):
        sample(hold_to_timesteps(denoiser), call, LABELS, [1, 2, 3])
    assert len(outputs) == 2


def test_a_trial_keeps_what_the_walk_gives():
    denoiser = class_conditional_denoiser()
    tried, example, trace = try_denoiser(job(denoiser))
    seeds = tried.noise_seeds()
    assert torch.equal(sample(tried.denoiser, tried.denoiser, LABELS, seeds), sample(denoiser, denoiser, LABELS, seeds))
    # watched products may be summed in another order: some roundings of float32 on outputs of about 1
    torch.testing.assert_close(trace.output, denoiser(example).detach(), rtol=1e-5, atol=1e-5)
    other, *_ = try_denoiser(job(replace(denoiser, walk=with_inputs(lambda inputs: {**inputs, "x": inputs["x"] * 2}))))
    assert other.walk_key != tried.walk_key  # another walk is calibrated anew


def test_calib_size_counts():
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, calib_size=2)
    whole = job(class_conditional_denoiser(), conditions=[3, 1, 2, 0], recipe=recipe)
    few = whole.within_calib_size()
    pairs = dict(zip(whole.conditions, whole.noise_seeds(), strict=True))
    assert len(few.conditions) == 2
    assert all(pairs[label] == seed for label, seed in zip(few.conditions, few.noise_seeds(), strict=True))
    assert few.within_calib_size() is few
    assert job(class_conditional_denoiser()).within_calib_size().conditions == LABELS


class Untraceable(nn.Module):
    """Works, and can't become a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))

    def forward(self, x, t, label):
        return self.layers(x) if float(x.sum()) > 1e9 else self.layers(x) * 2


def test_a_network_that_has_no_graph_is_refused_before_calibration(tmp_path):
    denoiser = replace(class_conditional_denoiser(), network=Untraceable().eval())
    calls = []
    denoiser.network.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(PcrExportError, match="cannot be exported to ONNX with"):
        export_denoiser(job(denoiser, folder=tmp_path))
    assert not (tmp_path / "step_scales.safetensors").exists()
    assert not list(tmp_path.rglob("call_*"))
