"""Intervals and tests against closed forms, scipy, statsmodels and simulated coverage."""

import subprocess
import sys
from math import inf, isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dfc_lib.results.statistics import (
    bootstrap_mean,
    exact_binomial,
    max_statistic,
    paired_difference,
    pearson,
    sign_test,
    welch,
    wilson,
)

# ---------------------------------------------------------------------------------------------
# paired differences and bootstrap


def test_paired_difference_of_the_published_cell():
    """27 rescued, 1 broken, 12 unchanged is +65.0 pp [47.9, 82.1] in the paper."""
    before = np.array([0] * 27 + [1] + [0, 1] * 6)
    after = np.array([1] * 27 + [0] + [0, 1] * 6)
    d = paired_difference(before, after)
    assert d.mean == pytest.approx(0.65)
    assert [round(100 * x, 1) for x in (d.t_low, d.t_high)] == [47.9, 82.1]
    assert (d.n, d.n_rescued, d.n_broken) == (40, 27, 1)
    assert d.bootstrap_low == pytest.approx(0.48, abs=0.03)
    assert d.bootstrap_high == pytest.approx(0.80, abs=0.03)


def test_paired_difference_equals_scipy_on_margins():
    """The t interval of a continuous outcome, at another level."""
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 30))
    d = paired_difference(before, after, confidence=0.9)
    expected = stats.ttest_rel(after, before).confidence_interval(0.9)
    assert (d.t_low, d.t_high) == pytest.approx((expected.low, expected.high))
    assert d.n_rescued + d.n_broken == 30


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
@settings(deadline=None, max_examples=20)
def test_paired_difference_is_antisymmetric(outcomes):
    """Swapping before and after does not mirror the result."""
    before, after = np.array(outcomes).T
    forth = paired_difference(before, after, n_bootstrap=50)
    back = paired_difference(after, before, n_bootstrap=50)
    assert forth.mean == pytest.approx(-back.mean, abs=1e-15)
    assert forth.t_low == pytest.approx(-back.t_high, abs=1e-12)
    assert forth.bootstrap_low == pytest.approx(-back.bootstrap_high, abs=1e-12)
    assert (forth.n_rescued, forth.n_broken) == (back.n_broken, back.n_rescued)


def test_constant_and_single_observations():
    """No change gives width 0, one prompt NaN bounds, and neither a warning."""
    d = paired_difference(np.zeros(5), np.zeros(5))
    assert (d.mean, d.t_low, d.t_high, d.bootstrap_low, d.bootstrap_high) == (0,) * 5
    one = paired_difference([0], [1])
    assert (one.mean, one.n, one.n_rescued) == (1, 1, 1)
    assert all(map(isnan, (one.t_low, one.t_high, one.bootstrap_low, one.bootstrap_high)))
    assert bootstrap_mean([0.25] * 7) == (0.25, 0.25, 0.25)


def test_seed_fixes_the_bootstrap():
    """Two runs of a notebook differ, or the seed is ignored."""
    x = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(x, seed=3) == bootstrap_mean(x, seed=3) != bootstrap_mean(x, seed=4)


def test_bootstrap_agrees_with_the_normal_interval_at_large_n():
    """The percentile interval of a mean tends to mean +- 1.96 se."""
    x = np.random.default_rng(0).normal(3, 2, size=2_000)
    mean, low, high = bootstrap_mean(x, n_bootstrap=4_000)
    half = 1.96 * x.std(ddof=1) / sqrt(x.size)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.06)


def test_coverage_of_the_paired_intervals():
    """95 % intervals cover the true difference about 95 % of the time at n = 40."""
    rng = np.random.default_rng(1)
    covered_t = covered_bootstrap = 0
    for seed in range(300):
        before, after = rng.random(40) < 0.2, rng.random(40) < 0.6
        d = paired_difference(before, after, seed=seed, n_bootstrap=400)
        covered_t += d.t_low <= 0.4 <= d.t_high
        covered_bootstrap += d.bootstrap_low <= 0.4 <= d.bootstrap_high
    assert 0.91 < covered_t / 300 < 0.99
    assert 0.89 < covered_bootstrap / 300 < 0.99


def test_resampling_in_chunks_changes_nothing(monkeypatch):
    """Memory is bounded by chunking; the numbers must not depend on it."""
    x = np.random.default_rng(0).normal(size=30)
    whole = bootstrap_mean(x)
    monkeypatch.setattr("dfc_lib.results.statistics._CHUNK", 3_000)
    assert whole == bootstrap_mean(x)


# ---------------------------------------------------------------------------------------------
# many cells


def test_max_statistic_finds_a_real_effect():
    """One cell of thirty that works survives the correction; the seed fixes the flips."""
    rng = np.random.default_rng(0)
    clean, cells = rng.random(80) < 0.2, rng.random((30, 80)) < 0.2
    weak = max_statistic(clean, cells, n_permutations=999)
    assert weak == max_statistic(clean, cells, n_permutations=999) > 0.05
    assert weak != max_statistic(clean, cells, seed=1, n_permutations=999)
    cells[17] = rng.random(80) < 0.8
    assert max_statistic(clean, cells, n_permutations=999) == 1 / 1000


def test_max_statistic_is_calibrated_under_the_null():
    """The best of twenty cells that do nothing is significant no more often than it may be."""
    rng = np.random.default_rng(0)
    p = []
    for seed in range(200):
        prompt = rng.normal(size=40)  # cells share the prompt's difficulty
        clean, *cells = (prompt + rng.normal(size=(21, 40))) > 0.8
        p.append(max_statistic(clean, cells, seed, n_permutations=99))
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 3 * sqrt(0.05 * 0.95 / 200)
    assert 0.4 < np.mean(p) < 0.65


def test_max_statistic_equals_the_enumerated_one():
    """With five prompts all 32 flips can be listed; the sampled p must tend to that share."""
    rng = np.random.default_rng(3)
    clean, cells = np.zeros(5), rng.normal(0.5, 1, size=(3, 5))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    sums = cells @ signs  # (cells, flips)
    exact = (sums.max(axis=0) >= cells.sum(axis=1).max() - 1e-12).mean()
    found = max_statistic(clean, cells, n_permutations=20_000)
    assert found == pytest.approx(exact, abs=4 * sqrt(exact * (1 - exact) / 20_000))


def test_max_statistic_of_no_ops():
    """Cells that change nothing (alpha = 1) have no evidence at all."""
    clean = np.arange(10) % 2
    assert max_statistic(clean, np.tile(clean, (3, 1)), n_permutations=99) == 1


@pytest.mark.parametrize(
    ("clean", "cells", "message"),
    [
        ([0, 1], [0, 1], r"cells has shape \(2,\), expected \(n_cells, 2\)"),
        ([0, 1], [[0, 1, 1]], r"cells has shape \(1, 3\)"),
        ([0, 1], np.zeros((0, 2)), r"cells has shape \(0, 2\)"),
        ([0, 1], [[0, nan]], "cells: 1 of 2 values are NaN"),
    ],
)
def test_max_statistic_refuses(clean, cells, message):
    """A transposed grid would test prompts."""
    with pytest.raises(ValueError, match=message):
        max_statistic(clean, cells)


# ---------------------------------------------------------------------------------------------
# rates and signs


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (190, 1000), (1, 1)])
def test_wilson_equals_its_closed_form(k, n):
    """Wilson (1927): the rates whose score test just does not reject."""
    z = stats.norm.ppf(0.975)
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    expected = k / n, max(centre - half, 0), min(centre + half, 1)
    assert wilson(k, n) == pytest.approx(expected, abs=1e-12)


def test_exact_binomial_of_none_and_all():
    """The bounds where nothing, or everything, happened (C3)."""
    assert exact_binomial(0, 40) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 40)))
    assert exact_binomial(40, 40) == pytest.approx((1, 0.025 ** (1 / 40), 1))
    k, n = 3, 17
    _, low, high = exact_binomial(k, n)
    assert stats.binom.sf(k - 1, n, low) == pytest.approx(0.025)
    assert stats.binom.cdf(k, n, high) == pytest.approx(0.025)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5), (2.5, 5), (nan, 5)])
def test_impossible_counts_are_refused(k, n):
    """A rate passed as a count would get an interval."""
    for interval in (wilson, exact_binomial):
        with pytest.raises(ValueError, match="successes"):
            interval(k, n)


def test_sign_test():
    """45 of 47 positive, as a public draft of S1 has it; zeros are left out."""
    s = sign_test([0.1] * 45 + [-0.1] * 2 + [0] * 3)
    assert (s.n_positive, s.n_negative, s.n_zero) == (45, 2, 3)
    tail = (1 + 47 + 47 * 46 / 2) / 2**47
    assert s.p == pytest.approx(2 * tail)
    assert sign_test([-1] * 48).p == pytest.approx(2 / 2**48)
    assert sign_test([1, -1]).p == 1
    assert sign_test([0, 0]) == (0, 0, 2, 1)


# ---------------------------------------------------------------------------------------------
# two groups


def groups():
    rng = np.random.default_rng(0)
    return rng.normal(0.06, 0.05, 36), rng.normal(0.09, 0.02, 12)


def test_welch_equals_scipy():
    """Test and interval of groups with different sizes and variances."""
    a, b = groups()
    w, expected = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval()
    assert w == pytest.approx((a.mean() - b.mean(), *interval, expected.pvalue))
    back = welch(b, a)
    assert (back.difference, back.low, back.p) == pytest.approx((-w.difference, -w.high, w.p))


def test_welch_of_constants_and_singles():
    """Constant groups (0 pp in all runs) and single runs."""
    assert welch([0.1] * 3, [0.1] * 7) == (0, 0, 0, 1)
    assert welch([0.0] * 3, [0.1] * 3) == (-0.1, -0.1, -0.1, 0)
    half = welch([0.0] * 3, [0.1, 0.2, 0.3])  # one constant group is like a one-sample test
    one_sample = stats.ttest_1samp([0.1, 0.2, 0.3], 0)
    interval = one_sample.confidence_interval()
    assert half[1:] == pytest.approx((-interval.high, -interval.low, one_sample.pvalue))
    single = welch([1.0], [2.0, 3.0])
    assert single.difference == -1.5
    assert all(map(isnan, single[1:]))


# ---------------------------------------------------------------------------------------------
# correlation


def test_pearson_equals_fishers_formula():
    """r = 0.08 over 48 runs must get the interval that it has (C8)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 48))
    c = pearson(x, y)
    z, half = np.arctanh(np.corrcoef(x, y)[0, 1]), stats.norm.ppf(0.975) / sqrt(45)
    assert (c.r, c.low, c.high) == pytest.approx(tuple(np.tanh([z, z - half, z + half])))
    t = c.r * sqrt(46 / (1 - c.r**2))
    assert c.p == pytest.approx(2 * stats.t.sf(abs(t), 46))


@pytest.mark.filterwarnings("error")
def test_pearson_of_constants_and_few():
    """A constant has no correlation, rounding noise or not, and no warning is printed."""
    for constant in ([0, 0, 0, 0], [0.1 + 0.2, 0.3, 0.3, 0.3]):
        for c in (pearson(constant, [1, 2, 3, 4]), pearson([1, 2, 3, 4], constant)):
            assert all(map(isnan, (c.r, c.low, c.high, c.p)))
            assert c.n == 4
    assert pearson([1, 2], [1, 3]).r == pytest.approx(1)
    three = pearson([1, 2, 3], [1, 2, 4])
    assert (three.low, three.high) == (-1, 1)


# ---------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([], []), "before is empty"),
        (lambda: paired_difference([0, 1], [1]), "before has 2 values and after 1"),
        (lambda: paired_difference([0, nan], [1, 1]), "before: 1 of 2 values are NaN"),
        (lambda: paired_difference([0, 1], [inf, 1]), "after: 1 of 2 values"),
        (lambda: paired_difference([[0]], [[1]]), r"before has shape \(1, 1\)"),
        (lambda: bootstrap_mean([1, 2], confidence=95), "confidence is 95"),
        (lambda: sign_test([]), "differences is empty"),
        (lambda: welch([], [1]), "a is empty"),
        (lambda: pearson([1, 2], [1]), "x has 2 values and y 1"),
    ],
)
def test_bad_input_is_named(call, message):
    """NaN would spread into every figure, or a mismatch be broadcast."""
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_light():
    """Every notebook kernel pays for what is imported at the top."""
    code = (
        "import sys, dfc_lib.results.statistics; "
        "sys.exit(any(m in sys.modules for m in ('scipy', 'statsmodels', 'pandas', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
