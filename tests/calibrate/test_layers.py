import pytest
from class_conditional import class_conditional_denoiser
from models.tiny_pipelines import tiny_sdxl

from pcr_export.calibrate.layers import find_layers
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model


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
