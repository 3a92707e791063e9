"""The networks that judge images: the reference model's own CLIP, or InceptionV3, CLIP ViT-L/14 and AlexNet for real models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import cached_file

from pcr_export.errors import PcrExportError, first_line
from pcr_export.models.clean_part import TOKENIZER_FILES, clean_part, read_tokenizer
from pcr_export.models.fetch import quiet
from pcr_export.read_files import read_json
from pcr_export.stages import hash_file

CLIP = "openai/clip-vit-large-patch14"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SHOWN_LETTERS = 16  # of a sha256, in a name


@dataclass(frozen=True, kw_only=True)
class NetworkOutputs:
    """What the networks compute from a batch of images, float32."""

    features: Tensor  # [batch, num_features], of the Frechet and the kernel distance
    embeds: Tensor  # [batch, CLIP's width], of the CLIP score
    layers: tuple[Tensor, ...]  # of LPIPS: [batch, patches, channels] each, or the pixels, [batch, 3, height, width]


WEIGHTS = "model.safetensors"


class Preprocessing(TypedDict):
    """What is read of a preprocessor_config.json."""

    image_mean: Annotated[list[float], Meta(min_length=3, max_length=3)]
    image_std: Annotated[list[float], Meta(min_length=3, max_length=3)]


class Extractors(Protocol):
    """The networks of one evaluation. Figures of two of them are never compared, so each has a name with its weights' hash.

    They are pickled as the call that loads them, not with their weights: every process of a cluster reads its own files.
    """

    name: str
    num_features: int
    protocol: dict[str, Any]  # plain JSON: the networks, the sha256 of their weights, how images are resized for them

    def features(self, images: Tensor) -> Tensor:
        """uint8 [batch, 3, height, width] -> float32 [batch, num_features]."""

    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Everything of uint8 [batch, 3, height, width]."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """float32 [len(prompts), CLIP's width]."""

    def lpips(self, ours: NetworkOutputs, theirs: NetworkOutputs) -> Tensor:
        """float32 [batch], the perceptual distance of each pair."""


class Clip:
    """A CLIP of transformers: both sides of the CLIP score.

    Args:
        vision: folder or hub id of the image tower; `text` and `tokenizer` alike. A whole CLIP is all three.
        name: what it is called in the report.
    """

    def __init__(self, vision: str | Path, text: str | Path, tokenizer: str | Path, name: str) -> None:
        with quiet():
            self._vision = _read_tower(CLIPVisionModelWithProjection, CLIPVisionConfig, vision)
            self._text = _read_tower(CLIPTextModelWithProjection, CLIPTextConfig, text)
            self._tokenizer = read_tokenizer(_fetch_tokenizer(tokenizer))
            preprocessing = read_json(_fetch(vision, "preprocessor_config.json"), Preprocessing)
            self.sha256, self.text_sha256 = (hash_file(_fetch(tower, WEIGHTS)) for tower in (vision, text))
        self._mean, self._std = (
            torch.tensor(preprocessing[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std")
        )
        self.width: int = self._vision.config.projection_dim
        self.name = f"{name} sha256:{self.sha256[:SHOWN_LETTERS]}"
        size = self._vision.config.image_size
        self.resize = f"middle square, bicubic with antialias to {size} x {size} pixels"

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [batch, 3, height, width] -> float32 [batch, width]."""
        features: Tensor = self._vision(pixel_values=self._pixels(images)).image_embeds
        return features

    @torch.inference_mode()
    def image_features_and_layers(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `image_features`, and each transformer layer's output for the patches, float32 [batch, patches, channels]."""
        outputs = self._vision(pixel_values=self._pixels(images), output_hidden_states=True)
        return outputs.image_embeds, tuple(states[:, 1:] for states in outputs.hidden_states[1:])

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """float32 [len(prompts), width]."""
        length = self._text.config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        features: Tensor = self._text(input_ids=tokens.input_ids).text_embeds
        return features

    def _pixels(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        side, size = min(height, width), self._vision.config.image_size
        top, left = (height - side) // 2, (width - side) // 2
        pixels = images[..., top : top + side, left : left + side].float() / 255
        if side != size:
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self._mean) / self._std


def _read_tower(network_class: Any, kind: type, source: str | Path) -> Any:
    """A side of a CLIP, float32, from its known settings and its weights alone."""
    folder = _fetch(source, "config.json").parent
    _fetch(source, WEIGHTS)
    with clean_part(folder, kind, [WEIGHTS]) as clean:
        return network_class.from_pretrained(clean, dtype=torch.float32, use_safetensors=True).eval()


def _fetch(source: str | Path, name: str) -> Path:
    """A file of a folder or of a repository of the hub. Raises OSError where there is none."""
    return Path(str(cached_file(source, name)))


def _fetch_tokenizer(source: str | Path) -> Path:
    """The folder of a tokenizer, with those of its files that there are."""
    found = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in TOKENIZER_FILES]
    folders = [Path(str(file)).parent for file in found if file is not None]
    return folders[0] if folders else Path(source)


class OwnClip:
    """Extractors of a model that brings its own CLIP along: its image tower is the network of every figure."""

    def __init__(self, clip: Clip, load: Callable[[], Any]) -> None:
        self._clip = clip
        self._load = load
        self.name = clip.name
        self.num_features = clip.width
        self.text_features = clip.text_features
        self.features = clip.image_features
        self.protocol: dict[str, Any] = {
            "extractor": clip.name,
            "extractor_sha256": clip.sha256,
            "features": clip.width,
            "resize": clip.resize,
            "clip": clip.name,
            "clip_text_sha256": clip.text_sha256,
            "lpips": f"unweighted, mean over the layers of {clip.name}",
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return self._load, ()

    def outputs(self, images: Tensor) -> NetworkOutputs:
        """As Extractors says."""
        embeds, layers = self._clip.image_features_and_layers(images)
        return NetworkOutputs(features=embeds, embeds=embeds, layers=layers)

    def lpips(self, ours: NetworkOutputs, theirs: NetworkOutputs) -> Tensor:
        """As Extractors says."""
        return unweighted_lpips(ours.layers, theirs.layers)


def unweighted_lpips(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over layers l and positions p of |x_lp / |x_lp| - y_lp / |y_lp||^2: LPIPS (Zhang et al. 2018, eq. 1) with all w_l = 1.

    Args:
        ours, theirs: a float32 [batch, positions, channels] per layer.

    Returns:
        float32 [batch], 0 to 4.
    """
    each = [
        (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(-1).mean(-1)
        for x, y in zip(ours, theirs, strict=True)
    ]
    return torch.stack(each).mean(0)


class RealNets:
    """Extractors of real models: InceptionV3, a CLIP and LPIPS.

    Args:
        inception: uint8 [batch, 3, height, width] -> float32 [batch, 2048], resizing by itself.
        lpips: two float32 [batch, 3, height, width] in 0..1, normalize=True -> float32 [batch, 1, 1, 1].
    """

    num_features = 2048

    def __init__(
        self, inception: nn.Module, inception_sha256: str, clip: Clip, lpips: nn.Module, load: Callable[[], Any]
    ) -> None:
        self._inception, self._clip, self._lpips = inception, clip, lpips
        self._load = load
        self.text_features = clip.text_features
        extractor = f"InceptionV3 of torch-fidelity sha256:{inception_sha256[:SHOWN_LETTERS]}"
        self.name = f"{extractor}, {clip.name}"
        self.protocol: dict[str, Any] = {
            "extractor": extractor,
            "extractor_sha256": inception_sha256,
            "features": self.num_features,
            "resize": "whole image, bilinear as in TensorFlow 1 (no antialias) to 299 x 299 pixels",
            "clip": clip.name,
            "clip_sha256": clip.sha256,
            "clip_resize": clip.resize,
            "lpips": f"AlexNet of torchmetrics sha256:{_state_sha256(lpips)[:SHOWN_LETTERS]}, images not resized",
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return self._load, ()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """As Extractors says."""
        features: Tensor = self._inception(images)
        return features

    def outputs(self, images: Tensor) -> NetworkOutputs:
        """As Extractors says."""
        embeds = self._clip.image_features(images)
        return NetworkOutputs(features=self.features(images), embeds=embeds, layers=(images.float() / 255,))

    @torch.inference_mode()
    def lpips(self, ours: NetworkOutputs, theirs: NetworkOutputs) -> Tensor:
        """As Extractors says."""
        distances: Tensor = self._lpips(ours.layers[0], theirs.layers[0], normalize=True)
        return distances.flatten()


def find_extractors(source: str | Path, *, inception: Path | None = None, clip: str | Path | None = None) -> Extractors:
    """The networks for the model of a pipeline folder or hub id: its own CLIP where it has one, otherwise the real ones.

    Args:
        inception: torch-fidelity's file of InceptionV3; None: fetched. Giving it or `clip` asks for the real networks.
        clip: folder or hub id of a whole CLIP; None: CLIP, fetched.

    Raises:
        PcrExportError: torch-fidelity or torchvision is missing, or weights are damaged or can't be fetched.
    """
    own = own_extractors(source) if inception is None and clip is None else None
    return own or _load_real_nets(inception, clip or CLIP)


def own_extractors(source: str | Path) -> OwnClip | None:
    """The CLIP that a pipeline folder brings along (clip_vision/ beside text_encoder_2/), or None."""
    folder = Path(source)
    if not (folder / "clip_vision" / "model.safetensors").is_file():
        return None
    vision, text, tokenizer = (folder / part for part in ("clip_vision", "text_encoder_2", "tokenizer_2"))
    clip = _load_clip(vision, text, tokenizer, f"{folder.name}/clip_vision")
    return OwnClip(clip, load=partial(own_extractors, folder.resolve()))


def _load_real_nets(inception: Path | None, clip: str | Path) -> RealNets:
    try:  # torchmetrics itself can't be imported where torch-fidelity is installed without torchvision
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise PcrExportError(
            f"InceptionV3 and LPIPS need torch-fidelity and torchvision ({error}): pip install pcr-export[fid]"
        ) from error
    weights = _inception_weights(inception)
    try:
        with no_pickled_code():
            net = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], str(weights), antialias=False
            )  # whose bytes are known
            lpips = LearnedPerceptualImagePatchSimilarity("alex").net
    except (OSError, RuntimeError) as error:
        raise PcrExportError(
            f"AlexNet for LPIPS can't be fetched ({error}): put torchvision's alexnet-owt-7be5be79.pth into "
            f"{_torch_cache()}"
        ) from error
    load = partial(_load_real_nets, inception and inception.resolve(), _absolute(clip))
    return RealNets(net, hash_file(weights), _load_whole_clip(clip), lpips, load)


@contextmanager
def no_pickled_code() -> Iterator[None]:
    """Inside, `torch.load` reads tensors alone, whatever the library that calls it asks for (torch-fidelity: weights_only=False)."""
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _absolute(clip: str | Path) -> str | Path:
    return Path(clip).resolve() if Path(clip).is_dir() else clip


def _load_whole_clip(clip: str | Path) -> Clip:
    return _load_clip(clip, clip, clip, Path(clip).name if Path(clip).is_dir() else str(clip))


def _load_clip(vision: str | Path, text: str | Path, tokenizer: str | Path, name: str) -> Clip:
    try:
        return Clip(vision, text, tokenizer, name)
    except PcrExportError:
        raise
    except Exception as error:  # whatever damaged files make of transformers
        reason = first_line(error)
        raise PcrExportError(f"CLIP {vision} can't be loaded ({reason}): give its folder with --clip") from error


def _inception_weights(given: Path | None) -> Path:
    """torch-fidelity's file, fetched where it is not given; its whole hash is checked, for it is a pickle and is the protocol."""
    path = given or _torch_cache() / INCEPTION_FILE
    try:
        if given is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        known = hash_file(path) == INCEPTION_SHA256
    except (OSError, RuntimeError) as error:
        raise PcrExportError(
            f"InceptionV3's weights can't be read ({error}): give {INCEPTION_URL} as a file with --inception"
        ) from error
    if not known:
        raise PcrExportError(f"{path} is not torch-fidelity's InceptionV3: fetch {INCEPTION_URL} again")
    return path


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _state_sha256(module: nn.Module) -> str:
    """sha256 over names and values of a module's weights, for one that was put together from several files."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
