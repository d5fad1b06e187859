"""Intervals and tests for the claims: paired differences over prompts, rates, runs, many cells.

Units are those of the input: outcomes of 0 and 1 give rates and differences of rates in [0, 1]
(multiply by 100 for percentage points), log-odds margins give differences in nats. Every interval
and every p-value is two-sided, intervals are at 95 % unless told otherwise.

Two rules for odd input, throughout. What cannot be meant is refused with a ValueError naming the
argument: nothing at all, NaN or infinity, lengths that differ, more successes than trials. Where
the data are valid but too few or too constant for a quantity (an interval from one prompt, the
correlation with a constant), that quantity is NaN, and the rest of the result stands.

Prompts are the unit that is sampled. A contrast between runs that share their prompts (pairs of
architectures within one D and k, say) is first averaged over the runs *within each prompt*; the
resulting vector, one value per prompt, goes to `bootstrap_mean`.
"""

from math import isclose, nan, sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

# scipy.stats and statsmodels are imported where they are used: together they take seconds.

_CHUNK = 2**22  # resampled values held at once (32 MiB)


class Interval(NamedTuple):
    """An estimate and its confidence bounds."""

    estimate: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------
# checks


def _vector(values: ArrayLike, name: str) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; pass one value per observation")
    if array.size == 0:
        raise ValueError(f"{name} is empty; there is nothing to estimate")
    _finite(array, name)
    return array


def _finite(array: np.ndarray, name: str) -> None:
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {array.size} values are NaN or infinite; drop these observations "
            "(from both sides of a pair) or find out why they are missing"
        )


def _paired(a: ArrayLike, b: ArrayLike, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector(a, first), _vector(b, second)
    if a.size != b.size:
        raise ValueError(f"{first} has {a.size} values and {second} {b.size}; they must be paired")
    return a, b


# ---------------------------------------------------------------------------------------------
# over prompts


def bootstrap_mean(
    values: ArrayLike, seed: int = 0, n_bootstrap: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Mean with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (n,) one value per prompt. Equal values give an interval of width 0: the bootstrap
            cannot know more (use `exact_binomial` for rates of 0 and 1). One gives NaN bounds.
        seed: fixes the resamples.
        n_bootstrap: number of resamples, n values drawn with replacement in each.
        confidence: share of the resampled means between the bounds.

    Raises:
        ValueError: `values` is empty, not one-dimensional or not finite.
    """
    values = _vector(values, "values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, such as 0.95")
    if values.size == 1:
        return Interval(float(values[0]), nan, nan)
    from scipy.stats import bootstrap

    low, high = bootstrap(
        (values,),
        np.mean,
        n_resamples=n_bootstrap,
        batch=max(1, _CHUNK // values.size),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


class PairedDifference(NamedTuple):
    """Mean of after - before over prompts, in the units of the input."""

    mean: float
    t_low: float  # paired-t interval
    t_high: float
    bootstrap_low: float  # percentile bootstrap interval over prompts
    bootstrap_high: float
    n: int  # prompts
    n_rescued: int  # prompts with after > before (0 -> 1 for binary outcomes)
    n_broken: int  # prompts with after < before


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    seed: int = 0,
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
) -> PairedDifference:
    """What an intervention changes, prompt by prompt.

    The paired-t interval is mean +- t(n - 1) sd / sqrt(n) of the differences (sd with ddof 1), the
    other one resamples prompts (`bootstrap_mean`). With 27 prompts rescued, 1 broken and 12
    unchanged the mean is 0.650 and the paired-t interval [0.479, 0.821]: S1's headline cell. Equal
    differences (all zeros, say) give intervals of width 0, one prompt gives NaN bounds.

    Args:
        before, after: (n,) outcomes of the same prompts in the same order: 0/1, bools, or real
            numbers such as margins.
        seed, n_bootstrap, confidence: see `bootstrap_mean`.

    Raises:
        ValueError: empty, not finite, not one-dimensional, or lengths that differ.
    """
    before, after = _paired(before, after, "before", "after")
    difference = after - before
    mean, low, high = bootstrap_mean(difference, seed, n_bootstrap, confidence)
    n, half = difference.size, nan
    if n > 1:
        from scipy.stats import t

        # Not scipy's interval: that is NaN where all differences are equal.
        error = float(difference.std(ddof=1)) / sqrt(n)
        half = float(t.ppf((1 + confidence) / 2, n - 1)) * error
    rescued, broken = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(mean, mean - half, mean + half, low, high, n, rescued, broken)


def max_statistic(
    clean: ArrayLike, cells: ArrayLike, seed: int = 0, n_permutations: int = 10_000
) -> float:
    """Whether any cell of a grid gains: the one-sided p-value of the best one, for having looked.

    If no cell gained, clean and steered outcomes of a prompt could change places; doing so for a
    random subset of the prompts, *for all cells jointly*, flips the signs of their differences and
    keeps the dependence between cells. The largest mean gain over the cells is compared with its
    distribution under such flips (Westfall and Young 1993; Nichols and Holmes 2002). With b of m
    flips at least as large p is (1 + b) / (1 + m), never 0 (Phipson and Smyth 2010). Cells that
    should *lower* the outcome are tested on negated outcomes.

    Args:
        clean: (n_prompts,) outcomes without intervention.
        cells: (n_cells, n_prompts) outcomes in every cell, on the same prompts.
        seed: fixes the flips.
        n_permutations: random flips.

    Raises:
        ValueError: shapes that do not fit, no cell, or values not finite.
    """
    clean, cells = _vector(clean, "clean"), np.asarray(cells, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[0] == 0 or cells.shape[1] != clean.size:
        raise ValueError(
            f"cells has shape {cells.shape}, expected (n_cells, {clean.size}): a row per cell, and "
            "in it the outcomes of the prompts of clean"
        )
    _finite(cells, "cells")
    gains = cells - clean
    # Sums in another order differ in the last bits; without slack real ties would count as smaller.
    threshold = gains.sum(axis=1).max() - 1e-10 * np.abs(gains).sum(axis=1).max()
    flips = np.random.default_rng(seed).integers(2, size=(n_permutations, clean.size))
    exceeding = int((((2.0 * flips - 1) @ gains.T).max(axis=1) >= threshold).sum())
    return (1 + exceeding) / (1 + n_permutations)


# ---------------------------------------------------------------------------------------------
# rates and signs


def wilson(successes: int, n: int) -> Interval:
    """A rate with Wilson's score interval, without continuity correction (Wilson 1927).

    Raises:
        ValueError: n < 1, or successes not in 0..n.
    """
    return _binomial(successes, n, "wilson")


def exact_binomial(successes: int, n: int) -> Interval:
    """A rate with its exact interval (Clopper and Pearson 1934): for rates of 0 and 1.

    The interval is two-sided: for 0 of n it reaches up to 1 - 0.025^(1/n).

    Raises:
        ValueError: n < 1, or successes not in 0..n.
    """
    return _binomial(successes, n, "exact")


def _binomial(successes: int, n: int, method: str) -> Interval:
    if not (0 <= successes <= n and n >= 1 and successes % 1 == n % 1 == 0):
        raise ValueError(
            f"successes = {successes} of n = {n}: expected integers, 0 <= successes <= n >= 1"
        )
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(n)).proportion_ci(0.95, method)
    return Interval(successes / n, float(interval.low), float(interval.high))


class SignTest(NamedTuple):
    """Exact test of as many positive as negative differences."""

    n_positive: int
    n_negative: int
    n_zero: int  # left out of the test
    p: float


def sign_test(differences: ArrayLike) -> SignTest:
    """The exact sign test (Dixon and Mood 1946): binomial with 1/2 over the non-zero differences.

    Args:
        differences: (n,) one per run or prompt. If all are zero, p is 1.

    Raises:
        ValueError: empty, not one-dimensional or not finite.
    """
    differences = _vector(differences, "differences")
    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    changed = positive + negative
    from scipy.stats import binomtest

    p = float(binomtest(positive, changed).pvalue) if changed else 1.0
    return SignTest(positive, negative, differences.size - changed, p)


# ---------------------------------------------------------------------------------------------
# two independent groups


class Welch(NamedTuple):
    """Difference of two group means, mean(a) - mean(b), without assuming equal variances."""

    difference: float
    low: float
    high: float
    p: float


def welch(a: ArrayLike, b: ArrayLike) -> Welch:
    """Welch's t-test and the interval of the difference (Welch 1947).

    Two constant groups give an interval of width 0 and p 1 (equal) or 0 (different): their variance
    is zero only if one believes it. A group of one gives NaN but for the difference.

    Args:
        a, b: (n_a,) and (n_b,) independent observations, such as one gain per training run.

    Raises:
        ValueError: a group is empty, not one-dimensional or not finite.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    difference = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2:
        return Welch(difference, nan, nan, nan)
    if np.ptp(a) == np.ptp(b) == 0:
        difference = float(a[0] - b[0])
        return Welch(difference, difference, difference, float(difference == 0))
    from statsmodels.stats.weightstats import CompareMeans

    groups = CompareMeans.from_data(a, b)
    low, high = groups.tconfint_diff(usevar="unequal")
    return Welch(difference, float(low), float(high), float(groups.ttest_ind(usevar="unequal")[1]))


# ---------------------------------------------------------------------------------------------
# correlation


class Pearson(NamedTuple):
    """Linear correlation."""

    r: float
    low: float
    high: float
    p: float
    n: int


def pearson(x: ArrayLike, y: ArrayLike) -> Pearson:
    """Pearson's r with Fisher's interval tanh(atanh r +- z / sqrt(n - 3)) (Fisher 1921).

    Constant x or y: all NaN. n up to 3: bounds -1 and 1; perfect correlation: width 0.

    Args:
        x, y: (n,) paired observations.

    Raises:
        ValueError: fewer than two, not one-dimensional, not finite, or lengths that differ.
    """
    x, y = _paired(x, y, "x", "y")
    # Relative to its size: the rounding of a mean must not make a constant correlate.
    if any(isclose(v.min(), v.max(), rel_tol=1e-13) for v in (x, y)):
        return Pearson(nan, nan, nan, nan, x.size)
    from scipy.stats import pearsonr

    result = pearsonr(x, y)
    low, high = result.confidence_interval()
    return Pearson(float(result.statistic), float(low), float(high), float(result.pvalue), x.size)
