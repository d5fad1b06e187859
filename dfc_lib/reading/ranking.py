"""How well each feature tells two sets of prompts apart, and the order this gives within a block.

Tool prompts against prose confound the template with the decision to call; so rank call-gold
against no-call-gold prompts of the same template too. Rank on a split of its own, disjoint from
the prompts on which the ranked features are then evaluated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.sparse import csc_array, issparse, sparray, spmatrix

Codes = np.ndarray | torch.Tensor | sparray | spmatrix

_CHUNK = 2**21  # activations looked at together: some 200 MB of scratch if all of them are non-zero


def discriminability(positive: Codes, negative: Codes) -> pd.DataFrame:
    """How well every feature separates positive from negative prompts.

    Top-k codes are nearly all zeros, and the zeros of a feature are one big tie. So a feature is
    reduced to its distinct values and how often each occurs on either side (the zero among them),
    which is all that means, variances and ranks need. Only non-zero activations are ever sorted,
    and ties and constants are exact.

    Args:
        positive: (n_positive, n_features) activations: an array, a tensor on any device, or a scipy
            sparse matrix; any real dtype.
        negative: (n_negative, n_features) the same features on the other prompts.

    Returns:
        one row per feature, in feature order:

        - `cohens_d`: (mean_positive - mean_negative) / sqrt((var_positive + var_negative) / 2),
          variances with ddof 1; 0 for equal constants, signed infinity for different ones
        - `auroc`: the chance that a positive prompt's activation exceeds a negative one's, ties
          counted half: Mann and Whitney's U / (n_positive n_negative)
        - `fire_rate_positive`, `fire_rate_negative`: share of prompts with activation > 0
        - `mean_difference`: mean_positive - mean_negative, in the units of the activations

    Raises:
        ValueError: shapes that do not fit, a side with fewer than two prompts, values that are NaN
            or infinite; names the argument.
    """
    sides = _sparse(positive, "positive"), _sparse(negative, "negative")
    n_features, other = sides[0].shape[1], sides[1].shape[1]
    if n_features != other:
        raise ValueError(
            f"positive has {n_features} features and negative {other}; encode both with the same "
            "crosscoder"
        )
    step = max(1, _CHUNK // (sides[0].shape[0] + sides[1].shape[0]))
    step = min(step, 2**16)  # features within a chunk are sorted as 16-bit integers
    parts = [
        _separation([side[:, start : start + step] for side in sides])
        for start in range(0, n_features, step)
    ]
    return pd.concat(parts, ignore_index=True).rename_axis("feature")


def _sparse(side: Codes, name: str) -> csc_array:
    """The non-zero activations by feature, float64."""
    if len(side.shape) != 2 or side.shape[0] < 2:
        raise ValueError(
            f"{name} has shape {tuple(side.shape)}; it must be (n_prompts, n_features), and a "
            "variance needs two prompts or more"
        )
    if not issparse(side):
        side = torch.as_tensor(side).detach().cpu()
        # of a mask: numpy finds few set bits several times faster than few non-zero floats
        at = np.divmod(np.flatnonzero((side != 0).numpy()), side.shape[1])
        side = csc_array((side[at].double().numpy(), at), shape=tuple(side.shape))
    side = csc_array(side, dtype=np.float64)
    bad = ~np.isfinite(side.data)
    if bad.any():
        feature = np.searchsorted(side.indptr, bad.argmax(), side="right") - 1
        raise ValueError(f"{name}: feature {feature} has activations that are NaN or infinite")
    return side


def _separation(sides: Sequence[csc_array]) -> pd.DataFrame:
    """The measures of one chunk of features, from the positive and the negative prompts."""
    n = np.array([[side.shape[0]] for side in sides])
    every = np.arange(sides[0].shape[1])

    # One entry per non-zero activation, counted on its side, and one per feature for its zeros.
    stored = np.stack([np.diff(side.indptr) for side in sides])
    feature = np.concatenate([*(np.repeat(every, of_side) for of_side in stored), every])
    value = np.concatenate([*(side.data for side in sides), np.zeros(every.size)])
    one_each = np.repeat(np.eye(2, dtype=np.int64), stored.sum(1), axis=1)
    count = np.concatenate([one_each, n - stored], axis=1)

    # Sort by feature, then value, and merge equal values: the distinct values of each feature.
    # (As np.lexsort does in three times the time: a stable sort of 16-bit integers is linear.)
    order = np.argsort(value)
    order = order[np.argsort(feature[order].astype(np.uint16), kind="stable")]
    feature, value, count = feature[order], value[order], count[:, order]
    new = np.append(True, (np.diff(feature) > 0) | (np.diff(value) > 0))
    count = np.add.reduceat(count, np.flatnonzero(new), axis=1)
    used = count.any(axis=0)  # a feature without zeros has a value 0 that occurs 0 times
    feature, value, count = feature[new][used], value[new][used], count[:, used]
    first = np.searchsorted(feature, every)  # each feature's smallest value

    def total(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x, first, axis=-1)

    # U: a positive beats all negatives of smaller value, and half of those of the same value.
    # Everything is an integer until the last division.
    below = np.cumsum(count[1]) - count[1]
    below -= below[first][feature]
    auroc = total(count[0] * (2 * below + count[1])) / (2 * n.prod())

    mean = total(count * value) / n
    variance = total(count * (value - mean[:, feature]) ** 2) / (n - 1)
    # The mean of a constant may be rounded, and its variance with it.
    constant = total(count > 0) == 1
    mean = np.where(constant, total((count > 0) * value), mean)
    difference = mean[0] - mean[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        d = difference / np.sqrt(np.where(constant, 0.0, variance).sum(0) / 2)
    fire_rate = total(count * (value > 0)) / n
    return pd.DataFrame(
        {
            "cohens_d": np.where(difference == 0, 0.0, d),
            "auroc": auroc,
            "fire_rate_positive": fire_rate[0],
            "fire_rate_negative": fire_rate[1],
            "mean_difference": difference,
        }
    )


# ---------------------------------------------------------------------------------------------
# from measures to ranks


def rank_within_blocks(table: pd.DataFrame, blocks: Mapping[str, slice]) -> pd.DataFrame:
    """Order the features of each block by Cohen's d, most positive first.

    Args:
        table: what `discriminability` returns, a row per feature in feature order.
        blocks: the features of each block: `{block.name: partition.slice(block.name), ...}`.

    Returns:
        one row per feature of a block, blocks in the order given: `block`, `rank` (1 is the best),
        `feature` (its index in the whole dictionary) and the measures. Equal d (two infinite ones,
        dead features) are ordered by AUROC, then by feature index.

    Raises:
        ValueError: a slice reaches beyond the table.
    """
    parts = []
    for name, block in blocks.items():
        if block.stop > len(table):
            raise ValueError(
                f"block {name!r} is {block}, but the table has {len(table)} features; were they "
                "encoded by another crosscoder?"
            )
        part = table.iloc[block].rename_axis("feature").reset_index()
        part = part.sort_values(["cohens_d", "auroc", "feature"], ascending=[False, False, True])
        part.insert(0, "rank", np.arange(1, len(part) + 1))
        part.insert(0, "block", name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


class Stability(NamedTuple):
    """Agreement of two rankings of the same features."""

    overlap: float  # share of the `top` features that both have
    chance: float  # the overlap expected of two unrelated rankings, top / n_features
    spearman: float  # rank correlation over all features; NaN if one side is constant


def stability(scores_a: ArrayLike, scores_b: ArrayLike, top: int) -> Stability:
    """Do two rankings of the same features agree (from two prompt splits, say)?

    Ties at the boundary of the top (dead features, all with d = 0) share the places that are left:
    the overlap is its expectation when ties are broken at random, on each side by itself.

    Args:
        scores_a, scores_b: (n_features,) larger is better, such as `table["cohens_d"]` or a block's
            part of it; infinite values are fine. The features must be the same ones: those of two
            crosscoders have to be matched first.
        top: size of the top, at most the number of features.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (scores_a, scores_b))
    overlap = float((_in_top(a, top) * _in_top(b, top)).sum()) / top
    rho = np.nan
    if (a != a[0]).any() and (b != b[0]).any():
        from scipy.stats import spearmanr

        rho = float(spearmanr(a, b).statistic)
    return Stability(overlap, top / a.size, rho)


def _in_top(scores: Float[np.ndarray, " n"], top: int) -> Float[np.ndarray, " n"]:
    """Chance of each feature to be among the `top`, ties broken at random."""
    boundary = np.sort(scores)[-top]
    above, tied = scores > boundary, scores == boundary
    return above + tied * (top - above.sum()) / tied.sum()
