import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import REFERENCE_MODEL
from pcr_export.qdiffbench import features
from pcr_export.qdiffbench.features import (
    INCEPTION_FILE,
    Clip,
    RealNets,
    _inception_weights,
    find_extractors,
    own_extractors,
    unweighted_lpips,
)
from pcr_export.stages import hash_file

PROMPTS = ["a large red circle, plain white background", "a small blue square"]


def random_images(seed, shape=(2, 3, 64, 64)):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


@pytest.fixture(scope="module")
def own():
    return find_extractors(REFERENCE_MODEL)


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory):
    """A folder as openai/clip-vit-large-patch14 has it: both towers in one file, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = json.loads((REFERENCE_MODEL / "text_encoder_2" / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "projection_dim": 24}
    shape = {**sizes, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings")
    text = {name: vocabulary[name] for name in names if name in vocabulary}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, **shape}, vision_config={"image_size": 32, "patch_size": 8, **shape}, projection_dim=24
        )
    )
    model.eval().save_pretrained(folder)
    for path in (REFERENCE_MODEL / "tokenizer_2").iterdir():
        shutil.copy(path, folder)
    shutil.copy(REFERENCE_MODEL / "clip_vision" / "preprocessor_config.json", folder)
    return folder, model


def test_lpips_is_the_formula(own):
    """Written out: per layer and patch, unit vectors, squared difference; then the mean over patches and over layers."""
    ours, theirs = own.outputs(random_images(0)), own.outputs(random_images(1))
    for image in range(2):
        layers = []
        for x, y in zip(ours.layers, theirs.layers, strict=True):
            patches = []
            for a, b in zip(x[image].double().numpy(), y[image].double().numpy(), strict=True):
                difference = a / np.sqrt(sum(a * a)) - b / np.sqrt(sum(b * b))
                patches.append(sum(difference * difference))
            layers.append(np.mean(patches))
        rounding = 4 * 128 * 2**-24  # float32 against float64: a and b are below 1, their norms are sums of 128 squares
        assert own.lpips(ours, theirs)[image].item() == pytest.approx(np.mean(layers), rel=0, abs=rounding)


def test_lpips_has_a_position_for_each_patch_of_each_layer(own):
    assert [tuple(layer.shape) for layer in own.outputs(random_images(0)).layers] == [(2, 64, 128)] * 3


def test_lpips_grows_with_noise(own):
    image = torch.full((1, 3, 64, 64), 128.0)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1, image.shape))
    outputs = [own.outputs((image + scale * noise).clamp(0, 255).to(torch.uint8)) for scale in (0, 5, 20, 60)]
    each = [own.lpips(look, outputs[0]).item() for look in outputs]
    assert each == sorted(each)
    assert each[0] == 0 < each[1]


def test_lpips_of_opposite_features_is_4():
    layer = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 7)))
    assert unweighted_lpips([layer], [-layer]).tolist() == pytest.approx([4, 4, 4])


def test_features_of_a_look_are_the_features(own):
    images = random_images(0)
    assert torch.equal(own.outputs(images).features, own.features(images))


def test_protocol_names_the_network_and_its_weights(own):
    assert own.protocol["features"] == own.features(random_images(0)).shape[1] == 128
    assert len(own.protocol["extractor_sha256"]) == 64
    assert own.protocol["extractor_sha256"][:16] in own.name
    assert json.loads(json.dumps(own.protocol)) == own.protocol


def test_a_folder_without_clip_has_no_extractors_of_its_own(tmp_path):
    assert own_extractors(tmp_path) is None
    assert own_extractors("organisation/model") is None


def test_a_whole_clip_gives_the_features_of_transformers(whole_clip):
    folder, model = whole_clip
    clip = Clip(folder, folder, folder, "random")
    mean, std = (
        torch.tensor(json.loads((folder / "preprocessor_config.json").read_text())[f"image_{x}"])
        for x in ("mean", "std")
    )
    images = random_images(0, (2, 3, 32, 32))
    pixels = (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    rounding = 192 * 2**-24 * expected.abs().max().item()  # its longest sums, 3 x 8 x 8 pixels, in another order
    assert torch.allclose(clip.image_features(images), expected, rtol=0, atol=rounding)
    assert clip.text_features(PROMPTS).shape == (2, 24)


def test_clip_sees_the_middle_square(whole_clip):
    folder, _model = whole_clip
    clip = Clip(folder, folder, folder, "random")
    images = random_images(0, (1, 3, 40, 64))
    assert torch.equal(clip.image_features(images), clip.image_features(images[..., 12:52]))


class Mean(nn.Module):
    """Stands at InceptionV3's place: the mean of the pixels 2048 times."""

    def forward(self, images):
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 2048)


class Squared(nn.Module):
    """Stands at LPIPS's place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, ours, theirs, normalize):
        assert normalize
        return (self.weight * (ours - theirs)).square().mean((1, 2, 3), keepdim=True)


def test_real_nets_take_each_figure_from_its_network(whole_clip):
    folder, _model = whole_clip
    clip = Clip(folder, folder, folder, "random")
    nets = RealNets(Mean(), "ab" * 32, clip, Squared(), load=None)
    white, black = (torch.full((2, 3, 32, 32), value, dtype=torch.uint8) for value in (255, 0))
    ours, theirs = nets.outputs(white), nets.outputs(black)
    assert nets.lpips(ours, theirs).tolist() == [1, 1]
    assert ours.features.shape == (2, nets.num_features)
    assert ours.features[0, 0] == 255
    assert torch.equal(ours.embeds, clip.image_features(white))
    assert "ab" * 8 in nets.name
    assert clip.sha256[:16] in nets.name
    assert json.loads(json.dumps(nets.protocol)) == nets.protocol


def test_another_inception_is_refused(tmp_path):
    path = tmp_path / INCEPTION_FILE
    path.write_bytes(b"weights")
    with pytest.raises(PcrExportError, match="not torch-fidelity's InceptionV3: fetch https"):
        _inception_weights(path)


def test_all_digits_of_inceptions_hash_are_compared(tmp_path, monkeypatch):
    assert len(features.INCEPTION_SHA256) == 64
    assert features.INCEPTION_SHA256.startswith(Path(INCEPTION_FILE).stem.rsplit("-", 1)[1])
    path = tmp_path / INCEPTION_FILE
    path.write_bytes(b"weights")
    digest = hash_file(path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    assert _inception_weights(path) == path
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest[:-1] + ("0" if digest[-1] != "0" else "1"))
    with pytest.raises(PcrExportError, match="not torch-fidelity's InceptionV3"):
        _inception_weights(path)


def test_missing_inception_says_which_option_gives_it(tmp_path):
    with pytest.raises(PcrExportError, match="as a file with --inception"):
        _inception_weights(tmp_path / "none.pth")


class _RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_pickle_runs_though_a_library_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"weight": torch.ones(2), "bad": _RunsCode(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    with features.no_pickled_code():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "bad.pth", weights_only=False)
        assert torch.equal(torch.load(tmp_path / "good.pth", weights_only=False)["weight"], torch.ones(2))
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
