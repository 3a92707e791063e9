import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from qdiffbench.frechet_by_scipy import EPSILON, frechet_by_scipy, frechet_rounding
from torchmetrics.image.kid import KernelInceptionDistance

from pcr_export.qdiffbench.distances import (
    KID_ROWS,
    Features,
    clip_scores,
    frechet_distance,
    kernel_distance,
    psnr_db,
    ssim,
)

WIDTH = 24  # of the features


def pairs(count=200, noise=0.3, seed=0, shift=0.0):
    """Features of images and of their counterparts, float32 [count, WIDTH], correlated over their columns."""
    random = np.random.default_rng(seed)
    theirs = random.normal(size=(count, WIDTH)) @ random.normal(size=(WIDTH, WIDTH)) / 4 + 1
    ours = theirs + noise * random.normal(size=theirs.shape) + shift
    return ours.astype(np.float32), theirs.astype(np.float32)


def kept(folder, features, batch=50):
    """Features in a file, written from its end to its beginning."""
    store = Features(folder, *features.shape)
    for start in reversed(range(0, len(features), batch)):
        part = features[start : start + batch]
        store.write(range(start, start + len(part)), part)
    return store


def frechet(ours, theirs):
    return _measured(frechet_distance, ours, theirs)


def kernel(ours, theirs):
    return _measured(kernel_distance, ours, theirs)


def _measured(distance, ours, theirs):
    with tempfile.TemporaryDirectory() as folder:
        return distance(*(kept(Path(folder) / name, x) for name, x in (("ours", ours), ("theirs", theirs))))


@pytest.mark.parametrize(("noise", "shift"), [(0.3, 0.0), (0.01, 0.0), (1.0, 0.5)])
def test_frechet_distance_is_that_of_scipys_matrix_root(noise, shift):
    ours, theirs = (x.astype(np.float64) for x in pairs(noise=noise, shift=shift))
    expected = frechet_by_scipy(ours, theirs)
    rounding = frechet_rounding(ours, theirs)
    assert rounding < 1e-4 * expected  # so that the comparison says something
    assert frechet(*pairs(noise=noise, shift=shift)) == pytest.approx(expected, rel=0, abs=rounding)


@pytest.mark.parametrize("count", [200, 20])  # 20: fewer than features, so that the covariances have no full rank
def test_frechet_distance_is_that_of_torch_fidelity(count):
    metric_fid = pytest.importorskip(
        "torch_fidelity.metric_fid", reason="pip install pcr-export[fid]", exc_type=ImportError
    )
    ours, theirs = pairs(count)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x).double()) for x in (ours, theirs)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]
    rounding = frechet_rounding(ours.astype(np.float64), theirs.astype(np.float64))
    assert frechet(ours, theirs) == pytest.approx(expected, rel=0, abs=rounding)


def test_kernel_distance_is_the_formula():
    """Gretton et al. 2012, eq. 4, as two loops."""
    ours, theirs = (x.astype(np.float64) for x in pairs(30))

    def k(x, y):
        return (x @ y / WIDTH + 1) ** 3

    terms = [
        (k(ours[i], ours[j]), k(theirs[i], theirs[j]), -k(ours[i], theirs[j]), -k(ours[j], theirs[i]))
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    rounding = EPSILON * np.size(terms) * np.abs(terms).sum()  # of a sum, in any order
    assert kernel(*pairs(30)) == pytest.approx(np.sum(terms) / (30 * 29), rel=0, abs=rounding / (30 * 29))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance_of_unpaired_sets_is_that_of_torchmetrics():
    """Where i and j of a pair are independent, both estimates have the same mean: here they differ by their spread alone."""
    random = np.random.default_rng(1)
    ours, theirs = (torch.from_numpy(random.normal(shift, 1, (600, WIDTH))) for shift in (0.5, 0))
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=600)
    metric.update(ours, real=False)
    metric.update(theirs, real=True)
    assert kernel(ours.float().numpy(), theirs.float().numpy()) == pytest.approx(metric.compute()[0].item(), rel=0.02)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance_is_not_put_below_zero_by_counterparts():
    """Equal sets: torchmetrics' estimate is far below 0, for it counts k(x_i, y_i) among those of independent images."""
    _ours, theirs = pairs(200)
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=200)
    for real in (False, True):
        metric.update(torch.from_numpy(theirs).double(), real=real)
    assert metric.compute()[0].item() < -0.01
    terms = (theirs.astype(np.float64) @ theirs.T / WIDTH + 1) ** 3  # 4 of each are added up, in any order
    assert kernel(theirs, theirs) == pytest.approx(0, abs=EPSILON * 4 * terms.size * 4 * np.abs(terms).mean())


def test_kernel_distance_grows_with_the_shift_of_the_features():
    each = [kernel(*pairs(shift=shift)) for shift in (0.1, 0.3, 1)]
    assert 0 < each[0] < each[1] < each[2]


def test_rows_of_the_kernel_matrix_are_all_summed():
    ours, theirs = pairs(2 * KID_ROWS + 7)
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    xx, yy, xy = ((a @ b.T / WIDTH + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    total = sum(matrix.sum() - np.trace(matrix) for matrix in (xx, yy, -xy, -xy))
    rounding = EPSILON * 4 * xx.size * sum(np.abs(matrix).mean() for matrix in (xx, yy, xy, xy))  # a sum in any order
    assert kernel(ours, theirs) == pytest.approx(total / (len(x) * (len(x) - 1)), rel=0, abs=rounding)


def test_features_in_a_file_are_read_back_in_order(tmp_path):
    ours, _ = pairs()
    store = kept(tmp_path / "folder" / "ours", ours, batch=7)
    parts = list(store.split(64))
    assert [len(part) for part in parts] == [64, 64, 64, 8]
    np.testing.assert_array_equal(torch.cat(parts).numpy(), ours.astype(np.float64))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_memory_does_not_grow_with_the_number_of_features(distance, tmp_path):
    """The most that numpy allocates; torch's matrices have KID_ROWS rows and columns at most."""
    peaks = []
    for count in (3 * KID_ROWS, 6 * KID_ROWS):
        rows = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32)
        stores = [kept(tmp_path / name, rows + shift, batch=500) for name, shift in (("a", 0), ("b", 0.1))]
        tracemalloc.start()
        distance(*stores)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3 * KID_ROWS * 64 * 4 / 2  # half of what the other features take


def random_images(seed, noise=None):
    random = np.random.default_rng(seed)
    base = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 20))
    return np.clip(base + (random.normal(0, noise, base.shape) if noise else 0), 0, 255).astype(np.uint8)


# dB, by float32: sums of 3 x 24 x 20 squares may be off by their number times 2^-24 (in any order), and 10 log10(1 + e) is 4.4 e
PSNR_ROUNDING = 4.4 * 3 * 24 * 20 * 2**-24


def test_psnr_is_the_formula():
    ours, theirs = random_images(1, 20), random_images(2)
    squared = np.square(ours.astype(float) - theirs.astype(float)).mean((1, 2, 3))
    expected = 10 * np.log10(255**2 / squared)
    assert psnr_db(torch.from_numpy(ours), torch.from_numpy(theirs)) == pytest.approx(
        expected, rel=0, abs=PSNR_ROUNDING
    )


def test_psnr_of_equal_images_counts_as_100_db():
    images = torch.from_numpy(random_images(0))
    assert psnr_db(images, images) == [100, 100]


def test_ssim_is_the_formula():
    """Wang et al. 2004, eq. 13, written out for each pixel and channel over a window of 11 x 11 with sigma 1.5."""
    ours, theirs = random_images(1, 20), random_images(2)
    steps = np.arange(-5, 6)
    window = np.exp(-np.add.outer(steps**2, steps**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = []
    for x_image, y_image in zip(ours, theirs, strict=True):
        x_image, y_image = (np.pad(x.astype(float), ((0, 0), (5, 5), (5, 5)), "reflect") for x in (x_image, y_image))
        values = []
        for channel, row, column in np.ndindex(3, 24, 20):
            x, y = (image[channel, row : row + 11, column : column + 11] for image in (x_image, y_image))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            covariance = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        expected.append(np.mean(values))
    # float32: four moments, each of about 74^2, are differences of two sums of 121 terms that are up to 255^2 together
    rounding = 4 * 121 * 2**-24 * 255**2 / 74**2
    assert ssim(torch.from_numpy(ours), torch.from_numpy(theirs)) == pytest.approx(expected, rel=0, abs=rounding)


def test_clip_score_counts_an_opposite_text_as_0():
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    text = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0]])
    assert clip_scores(images, text).tolist() == pytest.approx(
        [60, 0, 100], abs=100 * 4 * 2**-24
    )  # float32: 2 products, 2 norms
