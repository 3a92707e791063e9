"""The Frechet distance by scipy, and how far two computations of it in float64 may differ."""

import numpy as np
from scipy.linalg import sqrtm

EPSILON = np.finfo(np.float64).eps


def frechet_by_scipy(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two sets of features, float64 [count, width]."""
    (mu1, s1), (mu2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (ours, theirs))
    return np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)


def frechet_rounding(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far rounding may move it: sums of `count` rows, products and traces of `width` columns.

    A small distance is a difference of large traces, and the roots weigh more: an eigenvalue e of S1 S2 is known to `error`, so
    that its root may move by error / sqrt(e), or by sqrt(error) where e is 0 but for rounding (fewer images than features).
    """
    terms = sum(ours.shape)
    s1, s2 = (np.cov(x, rowvar=False) for x in (ours, theirs))
    squares = sum(np.square(x).sum() / len(x) for x in (ours, theirs))  # moments and traces are of this size
    error = terms * EPSILON * np.linalg.norm(s1, 2) * np.linalg.norm(s2, 2)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(error))
    return terms * EPSILON * squares + 2 * (error / roots).sum()
