import pytest
import torch
from calibrate.unusual_networks import denoiser_of, unusual_denoiser
from class_conditional import class_conditional_denoiser
from diffusion_transformer import dit_denoiser
from graph.small_denoisers import unet_denoiser, unet_inputs
from models.tiny_pipelines import tiny_sd, tiny_sdxl
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_export.calibrate.layers import STANDS_LAST, check_skip, find_layers, skip_warnings
from pcr_export.calibrate.trace_network import trace_network
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.sites import Layer


def layers_of(skip=("conv_in", "conv_out")):
    denoiser = class_conditional_denoiser()
    return {layer.name: layer for layer in find_layers(denoiser, next(denoiser.walk([1, 2], [0, 1])), skip)}


def test_layers_that_read_one_tensor_share_one_site():
    layers = layers_of()
    assert {layers[f"attention.to_{x}"].site for x in "qkv"} == {"attention.to_q"}
    assert layers["attention.to_out"].site == "attention.to_out"


def test_only_ops_without_zero_padding_are_affine():
    layers = layers_of()
    assert layers["merge"].affine
    assert layers["attention.to_q"].affine
    assert not layers["stride"].affine


def test_skipped_layers_carry_the_reason():
    layers = layers_of()
    assert layers["conv_in"].site is None
    assert layers["conv_in"].reason == "skipped by name (conv_in)"


def test_nothing_left_to_quantize_is_refused():
    with pytest.raises(PcrExportError, match="check --skip"):
        layers_of(skip=("*",))


def test_the_network_keeps_no_hooks():
    denoiser = class_conditional_denoiser()
    find_layers(denoiser, next(denoiser.walk([1], [0])), ())
    assert not any(module._forward_pre_hooks for module in denoiser.network.modules())


def test_sdxl_reads_its_text_context_through_one_site(tmp_path):
    model = load_model(resolve(str(tiny_sdxl(tmp_path / "sdxl"))))
    denoiser = model.denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(["a cat"], [0])), ("conv_in", "conv_out"))
    context = {layer.site for layer in layers if layer.name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(context) == 1
    assert all(layer.site for layer in layers if layer.name not in ("conv_in", "conv_out"))
    names = [layer.name for layer in layers]
    assert names.index("conv_in") < names.index("down_blocks.0.resnets.0.conv1") < names.index("conv_out")


def unusual_layers(skip=("conv_in", "conv_out")):
    denoiser = unusual_denoiser()
    return {layer.name: layer for layer in find_layers(denoiser, next(denoiser.walk([0, 0], [0, 1])), skip)}


def test_every_layer_that_stays_float_has_the_reason_that_is_true():
    layers = unusual_layers()
    assert {name: layer.reason for name, layer in layers.items() if layer.reason} == {
        "patch": "first layer of the network",
        "to_pixels": "last layer of the network",
        "standardized": "StandardizedConv computes in a way of its own",
        "normed": "its weight is computed in every call (weight norm or the like): fold it into a plain weight first",
        "dead": "its output does not reach the network's output",
        "reused": "its weight is also read outside of its own call",
        "attention": "MultiheadAttention is not quantized",
        "attention.out_proj": "its weight is also read outside of its own call",
        "up": "ConvTranspose2d is not quantized",
        "table": "Parameter is not quantized",
    }
    assert {name for name, layer in layers.items() if layer.site} == {"time", "down", "named", "scaled", "one", "other"}


def test_first_and_last_layers_are_quantized_where_nobody_skips_them():
    layers = unusual_layers(skip=())
    assert layers["patch"].site == "patch"
    assert layers["to_pixels"].site == "to_pixels"


class Residuals(nn.Module):
    """Two ways in, a chain of residuals, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.mean, self.variance = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain = nn.Linear(4, 6)

    def forward(self, t, x, heads=True):
        gain = self.gain((t * torch.arange(4.0)).reshape(1, 4))
        h = self.near(x) + self.far(x.flip(-1))
        for block in self.blocks:
            h = h + block(torch.cat([h[:, :3], x[:, 3:]], dim=1))
        return (torch.cat([self.mean(h), self.variance(h)], dim=1) if heads else h) * gain.repeat(1, 1 + heads)


@pytest.mark.parametrize(
    ("heads", "last"), [(True, {"mean", "variance"}), (False, {"blocks.2"})], ids=["two heads", "residuals alone"]
)
def test_first_and_last_layers_follow_the_data_and_not_the_order_of_calls(heads, last):
    denoiser = denoiser_of(Residuals(), (6,), lambda network, inputs: network(inputs["t"], inputs["x"], heads))
    layers = find_layers(denoiser, next(denoiser.walk([0], [0])), ("conv_in", "conv_out"))
    assert {layer.name for layer in layers if layer.reason == "first layer of the network"} == {"near", "far"}
    assert {layer.name for layer in layers if layer.reason == "last layer of the network"} == last


def test_a_tensor_changed_in_place_between_two_layers_is_two_sites():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, t, x):
            y = x + t
            one = self.a(y)
            two = self.b(y)
            y[:, :2] += 100
            return one + two + self.c(y)

    denoiser = denoiser_of(InPlace(), (6,))
    layers = {layer.name: layer.site for layer in find_layers(denoiser, next(denoiser.walk([0], [0])), ())}
    assert layers == {"a": "a", "b": "a", "c": "c"}


@pytest.mark.parametrize("model", [tiny_sd, tiny_sdxl])
def test_a_unets_first_and_last_layers_are_those_named_so(tmp_path, model):
    denoiser = load_model(resolve(str(model(tmp_path / "model")))).denoiser()
    trace = trace_network(denoiser, next(denoiser.walk(["a cat"], [0])))
    assert (trace.first, trace.last) == ({"conv_in"}, {"conv_out"})
    assert not trace.unread | trace.shared | trace.own_way
    plain = find_layers(denoiser, next(denoiser.walk(["a cat"], [0])), ("conv_in", "conv_out"))
    assert {layer.reason for layer in plain} == {None, "skipped by name (conv_in)", "skipped by name (conv_out)"}


def test_a_transformers_first_and_last_layers_are_its_projections():
    denoiser = dit_denoiser()
    trace = trace_network(denoiser, next(denoiser.walk([0, 1], [0, 1])))
    assert trace.first == {"pos_embed.proj"}
    assert trace.last == {"proj_out_2"}


def test_a_skip_that_matches_nothing_is_refused_with_what_is_near():
    network = class_conditional_denoiser().network
    check_skip(network, ("conv_in", "conv_out", "auto:2", "attention.*"))
    with pytest.raises(
        PcrExportError, match=r"--skip atention.to_q matches no Linear or Conv2d: near it are attention.to_q"
    ):
        check_skip(network, ("atention.to_q",))
    with pytest.raises(PcrExportError, match=r"write attention.\* for all layers in it"):
        check_skip(network, ("attention",))


def test_a_default_that_keeps_no_layer_is_said():
    layers = [Layer(name="a", op="Linear", site="a"), Layer(name="b", op="Linear", site=None, reason=STANDS_LAST)]
    (warning,) = skip_warnings(layers, ("conv_in", "conv_out"))
    assert warning.startswith("no layer was found to be the first layer of the network")
    assert skip_warnings(layers, ()) == []


def test_layers_are_found_without_computing_anything():
    """As the full-size benchmarks find them: on tensors that hold nothing."""
    denoiser = unet_denoiser("sdxl")
    inputs = unet_inputs(denoiser)
    skip = ("conv_in", "conv_out")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        found = find_layers(denoiser, {name: fake.from_tensor(x) for name, x in inputs.items()}, skip)
    assert found == find_layers(denoiser, inputs, skip)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv1d(6, 6, 3),
        nn.Conv3d(6, 6, 3),
        nn.ConvTranspose1d(6, 6, 3),
        nn.Bilinear(6, 6, 6),
        nn.LSTM(6, 6),
        nn.GRUCell(6, 6),
    ],
    ids=lambda module: type(module).__name__,
)
def test_whatever_holds_weights_and_stays_float_is_listed(other):
    network = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Embedding(100, 6))
    network.add_module("other", other)
    denoiser = denoiser_of(network, (6,), lambda network, inputs: network[2](network[1](network[0](inputs["x"]))))
    layers = find_layers(denoiser, next(denoiser.walk([0], [0])), ())
    name = type(other).__name__
    assert {layer.name: layer.reason for layer in layers if layer.reason} == {
        "other": f"{name} is not quantized",
        "3": "Embedding is not quantized",
    }
    network.register_module("3", nn.Linear(600, 600))  # beside which everything else is small
    listed = {layer.name for layer in find_layers(denoiser, next(denoiser.walk([0], [0])), ())}
    assert listed == {"0", "2", "3", "other"}
