import numpy as np
import pytest
import torch
from PIL import Image

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import REFERENCE_MODEL
from pcr_export.qdiffbench.images import image_path, read_images, write_png
from pcr_export.qdiffbench.quality import find_extractor, measure_quality

PROMPTS = [f"a large {colour} circle, plain white background" for colour in ("red", "blue", "green", "yellow")] * 3


def write_images(folder, noise, seed=0):
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index in range(len(PROMPTS)):
        image = np.full((64, 64, 3), 40 * (index % 4) + 60, float)
        image += (
            random.normal(0, 10, image.shape)
            if noise is None
            else np.random.default_rng(index).normal(0, noise, image.shape)
        )
        write_png(image.clip(0, 255).astype(np.uint8), image_path(folder, index))
    return folder


@pytest.fixture(scope="module")
def extractor():
    extractor = find_extractor(REFERENCE_MODEL)
    assert extractor is not None
    return extractor


def test_equal_images_have_no_distance(tmp_path, extractor):
    first, second = write_images(tmp_path / "a", 10), write_images(tmp_path / "b", 10)
    quality = measure_quality(first, second, PROMPTS, extractor)
    assert quality.fid_to_fp32 == pytest.approx(0, abs=1e-3)
    assert quality.clip_score == quality.clip_score_fp32
    assert quality.psnr_db == 100
    assert "biased" in quality.warning


def test_frechet_distance_is_the_textbook_one(tmp_path, extractor):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), in float64 with eigenvalues."""
    first, second = write_images(tmp_path / "a", 10), write_images(tmp_path / "b", 40)
    quality = measure_quality(first, second, PROMPTS, extractor, batch=5)
    features = [extractor.image_features(read_images(f, 0, len(PROMPTS))).double().numpy() for f in (first, second)]
    (mu1, s1), (mu2, s2) = [(x.mean(0), np.cov(x, rowvar=False)) for x in features]
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    expected = np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots
    assert quality.fid_to_fp32 == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_psnr_is_the_mean_over_images(tmp_path, extractor):
    first, second = write_images(tmp_path / "a", 10), write_images(tmp_path / "b", 40)
    a, b = (read_images(f, 0, len(PROMPTS)).double() for f in (first, second))
    expected = (10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))).mean().item()
    assert measure_quality(first, second, PROMPTS, None, batch=5).psnr_db == pytest.approx(expected, abs=1e-3)


def test_without_a_clip_the_report_says_so(tmp_path):
    first, second = write_images(tmp_path / "a", 10), write_images(tmp_path / "b", 40)
    quality = measure_quality(first, second, PROMPTS, None)
    assert quality.fid_to_fp32 is None
    assert quality.clip_score is None
    assert "no CLIP" in quality.warning


def test_damaged_image_is_named(tmp_path):
    first, second = write_images(tmp_path / "a", 10), write_images(tmp_path / "b", 40)
    image_path(first, 3).write_bytes(b"PNG")
    with pytest.raises(PcrExportError, match=r"00003\.png.*delete it"):
        measure_quality(first, second, PROMPTS, None)


def test_one_image_is_refused(tmp_path):
    with pytest.raises(PcrExportError, match="--images"):
        measure_quality(tmp_path, tmp_path, PROMPTS[:1], None)


def test_png_keeps_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    write_png(pixels, tmp_path / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
