import importlib.util
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from qdiffbench.frechet_by_scipy import EPSILON, frechet_by_scipy, frechet_rounding
from qdiffbench.process_tree import descendants

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import REFERENCE_MODEL
from pcr_export.qdiffbench.features import find_extractors
from pcr_export.qdiffbench.images import image_path, read_images, write_png
from pcr_export.qdiffbench.scores import _images_per_batch, measure_scores
from pcr_export.qdiffbench.workers import Workers

# Relative, where other batches or float64 add up in another order: the longest float32 sums of the CLIP have 256 terms.
FEATURE_ROUNDING = 256 * 2**-24
CLIP_ROUNDING = 100 * 2 * FEATURE_ROUNDING  # of 100 cos(image, text)
FIGURE_ROUNDING = (
    500 * FEATURE_ROUNDING
)  # KID: of a third power of two features, a difference of sums that are 80 times as large
PROMPTS = [f"a large {colour} circle, plain white background" for colour in ("red", "blue", "green", "yellow")] * 3


def write_images(folder, noise):
    """An image for each prompt: grey of one of four shades, each pixel disturbed by `noise` times the image's own noise."""
    folder.mkdir()
    for index in range(len(PROMPTS)):
        random = np.random.default_rng(index)
        image = 40 * (index % 4) + 60 + random.normal(0, 5, (64, 64, 3)) + noise * random.normal(0, 1, (64, 64, 3))
        write_png(image.clip(0, 255).astype(np.uint8), image_path(folder, index))
    return folder


@pytest.fixture(scope="module")
def extractors():
    return find_extractors(REFERENCE_MODEL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder / "artifact", 20), write_images(folder / "fp32", 0)


@pytest.fixture(scope="module")
def scores(folders, extractors):
    return measure_scores(*folders, PROMPTS, extractors, batch=5)


def all_images(folder):
    return read_images(folder, 0, len(PROMPTS))


def assert_frechet(measured, first, second):
    """That of float64 features [count, width], which another batch gives with other float32 roundings.

    The root of the distance is a metric: features that move by `moved` (root mean square) move it by `moved` at most.
    """
    expected = frechet_by_scipy(first, second)
    moved = sum(FEATURE_ROUNDING * np.sqrt(np.square(x).sum(1).mean()) for x in (first, second))
    rounding = frechet_rounding(first, second) + 2 * moved * np.sqrt(expected) + moved**2
    assert rounding < 0.05 * expected  # so that the comparison says something
    assert measured == pytest.approx(expected, rel=0, abs=rounding)


def features_of(folder, extractors):
    return extractors.features(all_images(folder)).double().numpy()


def test_equal_images_have_no_distance(folders, extractors):
    scores = measure_scores(folders[0], folders[0], PROMPTS, extractors)
    features = features_of(folders[0], extractors)
    assert scores.fid_to_fp32 == pytest.approx(0, abs=frechet_rounding(features, features))
    kernels = (features @ features.T / features.shape[1] + 1) ** 3  # 4 of each are added up, in any order
    assert scores.kid_to_fp32 == pytest.approx(0, abs=EPSILON * 16 * np.abs(kernels).sum())
    assert scores.clip_score == scores.clip_score_fp32
    assert (scores.psnr_db, scores.ssim, scores.lpips) == (100, pytest.approx(1), 0)


def test_frechet_distance_is_that_of_the_features(folders, extractors, scores):
    assert_frechet(scores.fid_to_fp32, *(features_of(folder, extractors) for folder in folders))


def test_clip_score_is_the_mean_cosine(folders, extractors, scores):
    text = extractors.text_features(PROMPTS).double().numpy()
    for folder, score in zip(folders, (scores.clip_score, scores.clip_score_fp32), strict=True):
        image = features_of(folder, extractors)
        cosines = (image * text).sum(1) / np.sqrt(np.square(image).sum(1) * np.square(text).sum(1))
        assert score == pytest.approx(100 * cosines.clip(min=0).mean(), rel=0, abs=CLIP_ROUNDING)


def test_psnr_is_the_mean_over_images(folders, scores):
    ours, theirs = (all_images(folder).double() for folder in folders)
    expected = 10 * torch.log10(255**2 / (ours - theirs).square().mean((1, 2, 3)))
    rounding = 4.4 * 3 * 64 * 64 * 2**-24  # dB: float32 sums of as many squares in any order; 10 log10(1 + e) is 4.4 e
    assert scores.per_image.psnr_db == pytest.approx(expected.tolist(), rel=0, abs=rounding)
    assert scores.psnr_db == pytest.approx(expected.mean().item(), rel=0, abs=rounding)


def test_each_image_has_its_figures(scores):
    for name in ("psnr_db", "ssim", "lpips"):
        values = getattr(scores.per_image, name)
        assert len(values) == len(PROMPTS)
        assert np.mean(values) == pytest.approx(getattr(scores, name))


def test_batches_do_not_matter(folders, extractors, scores):
    whole = measure_scores(*folders, PROMPTS, extractors, real=folders[1], batch=64)
    parts = measure_scores(*folders, PROMPTS, extractors, real=folders[1], batch=1)
    for name, value in asdict(whole).items():
        if isinstance(value, float):
            rounding = CLIP_ROUNDING if name.startswith("clip") else 0  # near 0, a difference of large sums
            assert getattr(parts, name) == pytest.approx(value, rel=FIGURE_ROUNDING, abs=rounding), name
    assert parts.protocol == whole.protocol
    assert scores.per_image.lpips == pytest.approx(whole.per_image.lpips, rel=FIGURE_ROUNDING)


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one_though_one_is_killed(folders, extractors):
    whole = measure_scores(*folders, PROMPTS, extractors, real=folders[1], batch=2)
    killed = []

    @contextmanager
    def track(_description, _total):
        """Kills a worker when the first batch is done."""

        def advance(_count):
            if not killed:
                worker = next(pid for pid, name in descendants(os.getpid()).items() if name.startswith("ray::_Worker"))
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)

        yield advance

    parts = measure_scores(
        *folders, PROMPTS, extractors, real=folders[1], batch=2, workers=Workers(count=2), track=track
    )
    assert killed
    assert asdict(parts) == asdict(whole)
    assert sorted(path.suffix for path in folders[0].iterdir()) == [".png"] * len(PROMPTS)


def test_images_of_a_megapixel_are_scored_a_few_at_a_time():
    assert [_images_per_batch(side, side) for side in (64, 512, 1024, 4096)] == [64, 16, 4, 1]


def test_no_more_than_a_batch_is_read_at_a_time(folders, extractors):
    """The first batch is scored before a later image is missed."""
    folder = folders[0].parent / "cut"
    write_images(folder, 20)
    image_path(folder, 7).unlink()
    advanced = []

    class Track:
        def __init__(self, _description, total):
            assert total == len(PROMPTS)

        def __enter__(self):
            return advanced.append

        def __exit__(self, *_):
            return None

    with pytest.raises(PcrExportError, match=r"00007\.png"):
        measure_scores(folder, folders[1], PROMPTS, extractors, batch=3, track=Track)
    assert advanced == [3, 3]


def test_real_images_of_any_name_and_size_are_compared_with(folders, extractors, tmp_path):
    arrays = [np.random.default_rng(i).integers(0, 256, (40 + 10 * (i % 2), 64, 3)).astype(np.uint8) for i in range(6)]
    for index, array in enumerate(arrays):
        (tmp_path / f"{index % 3}").mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / f"{index % 3}" / f"photo {index}.{'PNG' if index < 3 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("no image")
    scores = measure_scores(*folders, PROMPTS, extractors, real=tmp_path, batch=2)
    real = [extractors.features(torch.from_numpy(x).permute(2, 0, 1)[None])[0].double().numpy() for x in arrays]
    assert_frechet(scores.fid_to_real, features_of(folders[0], extractors), np.stack(real))
    assert scores.protocol["n_real_images"] == 6
    assert "of 6 images is biased" in scores.warning


def test_a_folder_without_real_images_is_refused(folders, extractors, tmp_path):
    with pytest.raises(PcrExportError, match=r"holds 0 images: .* needs 2 or more"):
        measure_scores(*folders, PROMPTS, extractors, real=tmp_path)


def test_the_protocol_says_how_the_figures_were_made(scores, extractors):
    assert scores.protocol["n_images"] == scores.n_images == len(PROMPTS)
    assert scores.protocol["extractor"] == extractors.name
    assert scores.protocol["versions"]["torch"] == torch.__version__
    assert {"extractor_sha256", "features", "resize", "clip", "lpips", "kid", "psnr", "ssim"} <= set(scores.protocol)
    assert json.loads(json.dumps(asdict(scores))) == asdict(scores)
    assert "of 12 images is biased (below 2048)" in scores.warning


def test_without_a_clip_the_scores_say_so(folders):
    scores = measure_scores(*folders, PROMPTS, None)
    assert (scores.fid_to_fp32, scores.kid_to_fp32, scores.clip_score, scores.lpips) == (None, None, None, None)
    assert scores.per_image.lpips == []
    assert scores.protocol["extractor"] is None
    assert "no CLIP" in scores.warning


def test_damaged_image_is_named(folders, tmp_path):
    first = write_images(tmp_path / "a", 10)
    image_path(first, 3).write_bytes(b"PNG")
    with pytest.raises(PcrExportError, match=r"00003\.png.*delete it"):
        measure_scores(first, folders[1], PROMPTS, None)


def test_images_of_two_sizes_are_refused(folders, tmp_path):
    for index in range(len(PROMPTS)):
        write_png(np.zeros((32, 32, 3), np.uint8), image_path(tmp_path, index))
    with pytest.raises(PcrExportError, match="two sizes: make them again"):
        measure_scores(tmp_path, folders[1], PROMPTS, None)


def test_one_image_is_refused(tmp_path):
    with pytest.raises(PcrExportError, match="--images"):
        measure_scores(tmp_path, tmp_path, PROMPTS[:1], None)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_real_models_say_what_to_install():
    with pytest.raises(PcrExportError, match=r"pip install pcr-export\[fid\]"):
        find_extractors("organisation/model")
