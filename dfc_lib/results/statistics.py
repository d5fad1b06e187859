"""Intervals and tests for the claims: paired differences over prompts, rates, runs, the best cell.

Units are those of the input: outcomes of 0 and 1 give rates and differences of rates in [0, 1]
(multiply by 100 for percentage points), log-odds margins give differences in nats. Every interval
is two-sided, at 95 % unless told otherwise; every p-value is two-sided unless its name says not.

Two rules for odd input, throughout. What cannot be meant is refused with a ValueError naming the
argument: nothing at all, NaN or infinity, lengths that differ, more successes than trials. Where
the data are valid but too few or too constant for a quantity (an interval from one prompt, the
correlation with a constant), that quantity is NaN, and the rest of the result stands.

Prompts are the unit that is sampled. A contrast between runs that share their prompts (pairs of
architectures within one D and k, say) is first averaged over the runs *within each prompt*; the
resulting vector, one value per prompt, goes to `bootstrap_mean`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isclose, nan, sqrt
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


def _paired(a: ArrayLike, b: ArrayLike, names: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = names.split()
    a, b = _vector(a, first), _vector(b, second)
    if a.size != b.size:
        raise ValueError(f"{first} has {a.size} values and {second} {b.size}; they must be paired")
    return a, b


def _level(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, such as 0.95")


def _chunks(total: int, width: int) -> Iterator[int]:
    """Sizes of the chunks that `total` resamples of `width` values each are drawn in."""
    step = max(1, _CHUNK // width)
    yield from (min(step, total - start) for start in range(0, total, step))


def _t_interval(mean: float, error: float, df: float, confidence: float) -> tuple[float, float]:
    if not df > 0:
        return nan, nan
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, df)) * error
    return mean - half, mean + half


# ---------------------------------------------------------------------------------------------
# bootstrap


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
    _level(confidence)
    if values.size == 1:
        return Interval(float(values[0]), nan, nan)
    from scipy.stats import bootstrap

    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=n_bootstrap,
        batch=max(1, _CHUNK // values.size),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence | np.ndarray,
    seed: int = 0,
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean over all observations, with whole clusters resampled (Davison and Hinkley 1997, 3.8).

    For cells pooled over one prompt set: the cluster is the prompt, since its outcomes in different
    cells go together. A drawn cluster brings all its values, so larger clusters weigh more.

    Args:
        values: (n,) observations.
        clusters: (n,) the cluster of each observation: integers or strings. A single cluster gives
            NaN bounds.

    Raises:
        ValueError: as in `bootstrap_mean`, or the lengths differ.
    """
    values = _vector(values, "values")
    _level(confidence)
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(
            f"clusters has shape {labels.shape}, values {values.shape}; give each value its cluster"
        )
    _, index = np.unique(labels, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    if sums.size == 1:
        return Interval(float(values.mean()), nan, nan)
    rng = np.random.default_rng(seed)
    means = []
    for rows in _chunks(n_bootstrap, sums.size):
        drawn = rng.integers(sums.size, size=(rows, sums.size))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


# ---------------------------------------------------------------------------------------------
# paired over prompts


@dataclass(frozen=True)
class PairedDifference:
    """Mean of after - before over prompts, in the units of the input."""

    mean: float
    t_low: float  # paired-t interval
    t_high: float
    bootstrap_low: float  # percentile bootstrap interval over prompts
    bootstrap_high: float
    n: int  # prompts
    n_rescued: int  # prompts with after > before (0 -> 1 for binary outcomes)
    n_broken: int  # prompts with after < before

    def __str__(self) -> str:
        return (
            f"{self.mean:+.3f} (paired t [{self.t_low:.3f}, {self.t_high:.3f}], bootstrap "
            f"[{self.bootstrap_low:.3f}, {self.bootstrap_high:.3f}], n = {self.n}, "
            f"{self.n_rescued} rescued, {self.n_broken} broken)"
        )


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
    before, after = _paired(before, after, "before after")
    difference = after - before
    n = difference.size
    mean, low, high = bootstrap_mean(difference, seed, n_bootstrap, confidence)
    error = float(difference.std(ddof=1)) / sqrt(n) if n > 1 else nan
    return PairedDifference(
        mean,
        *_t_interval(mean, error, n - 1, confidence),
        low,
        high,
        n=n,
        n_rescued=int((difference > 0).sum()),
        n_broken=int((difference < 0).sum()),
    )


@dataclass(frozen=True)
class BestCell:
    """The best of many cells, chosen on one half of the prompts and reported on the other."""

    index: int  # of the cell with the largest gain on the selection half
    selection_mean: float  # its gain there: too large on average (the winner's curse)
    report: PairedDifference  # its gain on the other half: free of the selection
    p_greater: float  # one-sided, for "some cell gains": max statistic over all cells and prompts
    selection_prompts: tuple[int, ...]
    report_prompts: tuple[int, ...]


def best_cell(
    clean: ArrayLike,
    cells: ArrayLike,
    seed: int = 0,
    n_permutations: int = 10_000,
    n_bootstrap: int = 10_000,
    confidence: float = 0.95,
) -> BestCell:
    """Select a cell on a random half of the prompts, report it on the other half, test the grid.

    The test asks whether any cell gains at all. If none did, clean and steered outcomes of a prompt
    could change places; doing so for a random subset of the prompts, *for all cells jointly*, flips
    the signs of their differences and keeps the dependence between cells. The p-value compares
    the largest mean gain over the cells with its distribution under such flips, on all prompts (the
    max statistic: Westfall and Young 1993; Nichols and Holmes 2002). With b of m flips at least as
    large it is (1 + b) / (1 + m), never 0 (Phipson and Smyth 2010). Cells that should *lower* the
    outcome are tested on negated outcomes.

    Args:
        clean: (n_prompts,) outcomes without intervention.
        cells: (n_cells, n_prompts) outcomes in every cell, on the same prompts. Of cells with equal
            gains the first is selected.
        seed: fixes the halves, the flips and the bootstrap.
        n_permutations: random flips.

    Raises:
        ValueError: shapes that do not fit, no cell, fewer than two prompts, values not finite.
    """
    clean, cells = _vector(clean, "clean"), np.asarray(cells, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[0] == 0 or cells.shape[1] != clean.size:
        raise ValueError(
            f"cells has shape {cells.shape}, expected (n_cells, {clean.size}): a row per cell, and "
            "in it the outcomes of the prompts of clean"
        )
    if clean.size < 2:
        raise ValueError("one prompt cannot be halved; pass at least two")
    _finite(cells, "cells")
    rng = np.random.default_rng([seed, 1])  # not the stream that the report's bootstrap draws from
    order = rng.permutation(clean.size)
    chosen_on, reported_on = np.sort(order[: clean.size // 2]), np.sort(order[clean.size // 2 :])
    gains = cells - clean
    on_selection = gains[:, chosen_on].mean(axis=1)
    index = int(on_selection.argmax())
    report = paired_difference(
        clean[reported_on], cells[index, reported_on], seed, n_bootstrap, confidence
    )

    observed = gains.sum(axis=1).max()
    # Sums in another order differ in the last bits; without slack real ties would count as smaller.
    threshold = observed - 1e-10 * np.abs(gains).sum(axis=1).max()
    exceeding = 0
    for rows in _chunks(n_permutations, clean.size + len(cells)):
        signs = 2.0 * rng.integers(2, size=(rows, clean.size)) - 1
        exceeding += int(((signs @ gains.T).max(axis=1) >= threshold).sum())
    return BestCell(
        index=index,
        selection_mean=float(on_selection[index]),
        report=report,
        p_greater=(1 + exceeding) / (1 + n_permutations),
        selection_prompts=tuple(chosen_on.tolist()),
        report_prompts=tuple(reported_on.tolist()),
    )


# ---------------------------------------------------------------------------------------------
# rates and signs


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A rate with Wilson's score interval, without continuity correction (Wilson 1927).

    Raises:
        ValueError: n < 1, or successes not in 0..n.
    """
    return _binomial(successes, n, confidence, "wilson")


def exact_binomial(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A rate with its exact interval (Clopper and Pearson 1934): for rates of 0 and 1.

    The interval is two-sided: for 0 of n it reaches up to 1 - ((1 - confidence) / 2)^(1/n).

    Raises:
        ValueError: n < 1, or successes not in 0..n.
    """
    return _binomial(successes, n, confidence, "exact")


def _binomial(successes: int, n: int, confidence: float, method: str) -> Interval:
    _level(confidence)
    if not (0 <= successes <= n and n >= 1 and successes % 1 == n % 1 == 0):
        raise ValueError(
            f"successes = {successes} of n = {n}: expected integers, 0 <= successes <= n >= 1"
        )
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(n)).proportion_ci(confidence, method)
    return Interval(successes / n, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class SignTest:
    """Exact test of as many positive as negative differences."""

    n_positive: int
    n_negative: int
    n_zero: int  # left out of the test
    p: float  # two-sided
    p_greater: float  # one-sided, for "more are positive"


def sign_test(differences: ArrayLike) -> SignTest:
    """The exact sign test (Dixon and Mood 1946): binomial with 1/2 over the non-zero differences.

    Args:
        differences: (n,) one per run or prompt. If all are zero, p is 1.

    Raises:
        ValueError: empty, not one-dimensional or not finite.
    """
    differences = _vector(differences, "differences")
    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    if positive + negative == 0:
        return SignTest(0, 0, differences.size, 1.0, 1.0)
    from scipy.stats import binomtest

    p, p_greater = (
        float(binomtest(positive, positive + negative, alternative=a).pvalue)
        for a in ("two-sided", "greater")
    )
    return SignTest(positive, negative, differences.size - positive - negative, p, p_greater)


# ---------------------------------------------------------------------------------------------
# two independent groups


@dataclass(frozen=True)
class Welch:
    """Difference of two group means, mean(a) - mean(b), without assuming equal variances."""

    difference: float
    low: float
    high: float
    t: float
    df: float  # Welch-Satterthwaite
    p: float
    n_a: int
    n_b: int


def welch(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Welch:
    """Welch's t-test and the interval of the difference (Welch 1947).

    Two constant groups give an interval of width 0, df NaN, and p 1 (equal) or 0 (different): their
    variance is zero only if one believes it. A group of one gives NaN but for the difference.

    Args:
        a, b: (n_a,) and (n_b,) independent observations, such as one gain per training run.

    Raises:
        ValueError: a group is empty, not one-dimensional or not finite.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    _level(confidence)
    difference, error, df = _welch_parts(a, b)
    low, high = _t_interval(difference, error, df, confidence)
    t = p = nan
    if error > 0:
        from scipy.stats import t as t_distribution

        t = difference / error
        p = 2 * float(t_distribution.sf(abs(t), df))
    elif error == 0:
        t, p = (0.0, 1.0) if difference == 0 else (inf if difference > 0 else -inf, 0.0)
        low = high = difference
    return Welch(difference, low, high, t, df, p, a.size, b.size)


def _welch_parts(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Difference of means, its standard error, and the degrees of freedom."""
    difference = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2:
        return difference, nan, nan
    # ptp, not var: the variance of a constant need not be exactly 0 in floating point
    variances = [float(x.var(ddof=1)) / x.size if np.ptp(x) > 0 else 0.0 for x in (a, b)]
    total = sum(variances)
    if total == 0:
        return float(a[0] - b[0]), 0.0, nan
    shares = [v / total for v in variances]
    df = 1 / (shares[0] ** 2 / (a.size - 1) + shares[1] ** 2 / (b.size - 1))
    return difference, sqrt(total), df


@dataclass(frozen=True)
class Tost:
    """Two one-sided tests of |mean(a) - mean(b)| < margin."""

    difference: float
    low: float  # interval at 1 - 2 alpha: inside (-margin, margin) exactly when equivalent
    high: float
    p: float  # the larger of the two one-sided p-values
    equivalent: bool  # p < alpha
    margin: float


def tost(a: ArrayLike, b: ArrayLike, margin: float, alpha: float = 0.05) -> Tost:
    """Equivalence of two group means within a margin, by Welch's t (Schuirmann 1987).

    Two constant groups are equivalent if they differ by less than the margin; a group of one gives
    NaN and is not equivalent.

    Args:
        a, b: (n_a,) and (n_b,) independent observations.
        margin: largest difference that would not matter, in the units of a and b.
        alpha: level of each one-sided test, and of the whole.

    Raises:
        ValueError: margin not positive, or a group empty, not one-dimensional or not finite.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    if not 0 < margin < inf:
        raise ValueError(f"margin is {margin}; give a positive difference in the units of the data")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}; give a level between 0 and 0.5, such as 0.05")
    difference, error, df = _welch_parts(a, b)
    low, high = _t_interval(difference, error, df, 1 - 2 * alpha)
    p = nan
    if error > 0:
        from scipy.stats import t

        p = float(t.sf((margin - abs(difference)) / error, df))
    elif error == 0:
        p, low, high = float(abs(difference) >= margin), difference, difference
    return Tost(difference, low, high, p, p < alpha, margin)


def power_welch(
    n_a: int, n_b: int, sd_a: float, sd_b: float, difference: float, alpha: float = 0.05
) -> float:
    """Chance that `welch` finds a true difference: whether a null result says anything.

    From the non-central t distribution with the Welch-Satterthwaite degrees of freedom of the true
    standard deviations (an approximation: the test estimates them).

    Raises:
        ValueError: a group of fewer than two, a negative or two zero standard deviations.
    """
    if min(n_a, n_b) < 2 or min(sd_a, sd_b) < 0 or max(sd_a, sd_b) == 0:
        raise ValueError(
            f"n_a = {n_a}, n_b = {n_b} must be at least 2, and sd_a = {sd_a}, sd_b = {sd_b} "
            "non-negative and not both 0"
        )
    from scipy.stats import nct, t

    v_a, v_b = sd_a**2 / n_a, sd_b**2 / n_b
    df = (v_a + v_b) ** 2 / (v_a**2 / (n_a - 1) + v_b**2 / (n_b - 1))
    shift, critical = difference / sqrt(v_a + v_b), t.ppf(1 - alpha / 2, df)
    return float(nct.sf(critical, df, shift) + nct.cdf(-critical, df, shift))


# ---------------------------------------------------------------------------------------------
# correlation and multiplicity


@dataclass(frozen=True)
class Pearson:
    """Linear correlation."""

    r: float
    low: float
    high: float
    p: float
    n: int


def pearson(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Pearson:
    """Pearson's r with Fisher's interval tanh(atanh r +- z / sqrt(n - 3)) (Fisher 1921).

    Constant x or y: all NaN. n = 2: r alone; n = 3: bounds -1 and 1; perfect correlation: width 0.

    Args:
        x, y: (n,) paired observations.

    Raises:
        ValueError: empty, not one-dimensional, not finite, or lengths that differ.
    """
    x, y = _paired(x, y, "x y")
    _level(confidence)
    # Relative to its size: the rounding of a mean must not make a constant correlate.
    if any(isclose(v.min(), v.max(), rel_tol=1e-13) for v in (x, y)):
        return Pearson(nan, nan, nan, nan, x.size)
    from scipy.stats import pearsonr

    result = pearsonr(x, y)
    if x.size == 2:
        return Pearson(float(result.statistic), nan, nan, nan, 2)
    low, high = result.confidence_interval(confidence)
    return Pearson(float(result.statistic), float(low), float(high), float(result.pvalue), x.size)


def holm(p_values: ArrayLike) -> Float[np.ndarray, " n"]:
    """Holm's step-down adjustment (Holm 1979): p-values valid for all tests jointly, in order.

    Raises:
        ValueError: a p-value is not in [0, 1].
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p_values must be a list of numbers in [0, 1], got {p_values}")
    if p_values.size == 0:
        return p_values
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1]
