"""How well each feature tells two sets of prompts apart, and the order this gives within a block.

Tool prompts against prose confound the template with the decision to call; so rank call-gold
against no-call-gold prompts of the same template too. Rank on a split of its own, disjoint from
the prompts on which the ranked features are then evaluated.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import sparray, spmatrix
    from torch import Tensor

    Codes = np.ndarray | Tensor | sparray | spmatrix

_CHUNK = 2**21  # activations looked at together: some 200 MB of scratch if all of them are non-zero


def discriminability(positive: "Codes", negative: "Codes") -> "pd.DataFrame":
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
    import pandas as pd

    n_features = _check(positive, negative)
    step = max(1, _CHUNK // (positive.shape[0] + negative.shape[0]))
    step = min(step, 2**16)  # features within a chunk are sorted as 16-bit integers
    columns = zip(
        _nonzeros(positive, step, "positive"), _nonzeros(negative, step, "negative"), strict=True
    )
    parts = [
        _separation(*sides, positive.shape[0], negative.shape[0], min(step, n_features - start))
        for start, sides in zip(range(0, n_features, step), columns, strict=True)
    ]
    return pd.concat(parts, ignore_index=True).rename_axis("feature")


def _check(positive: "Codes", negative: "Codes") -> int:
    for name, side in (("positive", positive), ("negative", negative)):
        if len(side.shape) != 2 or side.shape[0] < 2:
            raise ValueError(
                f"{name} has shape {tuple(side.shape)}; it must be (n_prompts, n_features), and a "
                "variance needs two prompts or more"
            )
    if positive.shape[1] != negative.shape[1]:
        raise ValueError(
            f"positive has {positive.shape[1]} features and negative {negative.shape[1]}; encode "
            "both with the same crosscoder"
        )
    return positive.shape[1]


def _nonzeros(side: "Codes", step: int, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(feature within the chunk, value) of the non-zero entries, for each chunk of `step`."""
    if is_sparse := not isinstance(side, np.ndarray) and hasattr(side, "tocsc"):
        side = side.tocsc()
        side.sum_duplicates()
    elif hasattr(side, "detach"):
        side = side.detach()
    for start in range(0, side.shape[1], step):
        block = side[:, start : start + step]
        if is_sparse:
            feature = np.repeat(np.arange(block.shape[1]), np.diff(block.indptr))
            value = block.data
        else:
            if hasattr(block, "cpu"):
                block = block.cpu()
                # numpy has no bfloat16; both conversions are exact
                block = (block.float() if block.dtype.itemsize < 4 else block).numpy()
            # of a mask: numpy finds few set bits several times faster than few non-zero floats
            row, feature = np.divmod(np.flatnonzero(block != 0), block.shape[1])
            value = block[row, feature]
        value = value.astype(np.float64)
        if not np.isfinite(value).all():
            bad = start + feature[~np.isfinite(value)][0]
            raise ValueError(f"{name}: feature {bad} has activations that are NaN or infinite")
        yield feature, value


def _separation(
    positive: tuple[np.ndarray, np.ndarray],
    negative: tuple[np.ndarray, np.ndarray],
    n_positive: int,
    n_negative: int,
    n_features: int,
) -> "pd.DataFrame":
    """The measures of one chunk of features, from its non-zero entries."""
    import pandas as pd

    n = (n_positive, n_negative)
    sides = positive, negative

    # One entry per non-zero activation, counted on its side, and one per feature for its zeros.
    every = np.arange(n_features)
    zeros = [n[s] - np.bincount(sides[s][0], minlength=n_features) for s in (0, 1)]
    feature = np.concatenate([sides[0][0], sides[1][0], every])
    value = np.concatenate([sides[0][1], sides[1][1], np.zeros(n_features)])
    count = np.zeros((2, feature.size), dtype=np.int64)
    ends = np.cumsum([0, sides[0][0].size, sides[1][0].size])
    for s in (0, 1):
        count[s, ends[s] : ends[s + 1]] = 1
        count[s, ends[2] :] = zeros[s]

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
        return np.add.reduceat(x, first)

    # U: a positive beats all negatives of smaller value, and half of those of the same value.
    # Everything is an integer until the last division.
    below = np.cumsum(count[1]) - count[1]
    below -= below[first][feature]
    auroc = total(count[0] * (2 * below + count[1])) / (2 * n_positive * n_negative)

    means, variances = [], []
    for s in (0, 1):
        mean = total(count[s] * value) / n[s]
        deviation = total(count[s] * (value - mean[feature]) ** 2)
        # The mean of a constant may be rounded, and its variance with it.
        constant = total(count[s] > 0) == 1
        means.append(np.where(constant, total((count[s] > 0) * value), mean))
        variances.append(np.where(constant, 0.0, deviation / (n[s] - 1)))
    difference = means[0] - means[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        d = difference / np.sqrt((variances[0] + variances[1]) / 2)
    fires = value > 0
    return pd.DataFrame(
        {
            "cohens_d": np.where(difference == 0, 0.0, d),
            "auroc": auroc,
            "fire_rate_positive": total(count[0] * fires) / n_positive,
            "fire_rate_negative": total(count[1] * fires) / n_negative,
            "mean_difference": difference,
        }
    )


# ---------------------------------------------------------------------------------------------
# from measures to ranks


def rank_within_blocks(table: "pd.DataFrame", blocks: Mapping[str, slice]) -> "pd.DataFrame":
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
    import pandas as pd

    parts = []
    for name, block in blocks.items():
        if block.stop > len(table):
            raise ValueError(
                f"block {name!r} is {block}, but the table has {len(table)} features; were they "
                "encoded by another crosscoder?"
            )
        part = table.iloc[block].rename_axis("feature").reset_index()
        part = part.sort_values(
            ["cohens_d", "auroc", "feature"], ascending=[False, False, True], ignore_index=True
        )
        part.insert(0, "rank", part.index + 1)
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
        top: size of the top.

    Raises:
        ValueError: lengths that differ, NaN, or `top` not in 1..n_features.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (scores_a, scores_b))
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"scores_a has shape {a.shape} and scores_b {b.shape}; pass one score per feature, for "
            "the same features"
        )
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("scores_a or scores_b has NaN scores; drop these features from both")
    if not 1 <= top <= a.size:
        raise ValueError(f"top is {top}; it must lie between 1 and the {a.size} features")
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
