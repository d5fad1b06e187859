"""Discriminability against a per-feature scipy reference; ranks and their stability."""

from math import inf, nan

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats

from dfc_lib.reading.ranking import discriminability, rank_within_blocks, stability

COLUMNS = ["cohens_d", "auroc", "fire_rate_positive", "fire_rate_negative", "mean_difference"]


def reference(positive, negative):
    """One feature at a time, as the definitions read."""
    rows = []
    for p, n in zip(positive.T.astype(float), negative.T.astype(float), strict=True):
        constant = len(set(p)) == len(set(n)) == 1
        difference = p[0] - n[0] if constant else p.mean() - n.mean()
        if constant:
            d = float(np.sign(difference)) * inf if difference else 0.0
        else:
            d = difference / np.sqrt((p.var(ddof=1) + n.var(ddof=1)) / 2)
        auroc = stats.mannwhitneyu(p, n, method="asymptotic").statistic / (p.size * n.size)
        rows.append((d, auroc, (p > 0).mean(), (n > 0).mean(), difference))
    return pd.DataFrame(rows, columns=COLUMNS).rename_axis("feature")


def codes(n=60, n_features=40, k=5, seed=0):
    """Top-k-like codes with ties, dead features, constants and dense ones."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, n_features), dtype=np.float32)
    for row in x:
        row[rng.choice(n_features, k, replace=False)] = rng.integers(1, 6, size=k) / 4
    x[:, 0] = 0  # dead
    x[:, 1] = 0.1  # constant, and 0.1 is no binary fraction
    x[: n // 3, 2], x[n // 3 :, 2] = 0.3, 0.1  # two constants
    x[: n // 3, 3], x[n // 3 :, 3] = 0, 0.7  # two constants, the other way round
    x[: n // 3, 4] = 0.1  # constant on one side
    x[:, 5] = rng.normal(size=n)  # dense, both signs
    x[:, 6] = np.abs(rng.normal(size=n))  # dense, no zero
    x[:, 7] = -x[:, 7]  # zero is the largest value
    return x[: n // 3], x[n // 3 :]


def assert_equal(found, expected):
    pd.testing.assert_frame_equal(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_equals_the_reference_on_ties_and_constants():
    """A measure is off for ties, constants, dead or dense features, or a warning is printed."""
    positive, negative = codes()
    table = discriminability(positive, negative)
    with np.errstate(all="ignore"):
        assert_equal(table, reference(positive, negative))
    assert list(table["cohens_d"][:4]) == [0, 0, inf, -inf]
    assert list(table["auroc"][:4]) == [0.5, 0.5, 1, 0]
    assert list(table["mean_difference"][:2]) == [0, 0]


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_equals_the_reference_on_any_codes(data):
    """Small integers make every pattern of ties, zeros and constants likely."""
    n_features = data.draw(st.integers(1, 3))
    positive, negative = (
        data.draw(
            hnp.arrays(
                np.float64,
                (data.draw(st.integers(2, 6)), n_features),
                elements=st.integers(-1, 2).map(float),
            )
        )
        for _ in range(2)
    )
    assert_equal(discriminability(positive, negative), reference(positive, negative))


def test_sides_swap():
    """Swapping the sides mirrors every measure."""
    positive, negative = codes()
    forth, back = discriminability(positive, negative), discriminability(negative, positive)
    np.testing.assert_allclose(forth["cohens_d"], -back["cohens_d"])
    np.testing.assert_allclose(forth["auroc"], 1 - back["auroc"])
    np.testing.assert_array_equal(forth["fire_rate_positive"], back["fire_rate_negative"])


def test_chunks_change_nothing(monkeypatch):
    """Features are mixed up between chunks, or the last, shorter one is dropped."""
    whole = discriminability(*codes())
    for chunk in (1, 60 * 7, 60 * 39):
        monkeypatch.setattr("dfc_lib.reading.ranking._CHUNK", chunk)
        pd.testing.assert_frame_equal(discriminability(*codes()), whole, check_exact=True)


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: torch.from_numpy(x.T.copy()).T,
        np.asfortranarray,
        sparse.csr_array,
        sparse.csc_matrix,
        sparse.coo_array,
    ],
)
def test_every_container_gives_the_same(convert):
    """Tensors, layouts and sparse matrices of the same activations rank alike."""
    positive, negative = codes()
    pd.testing.assert_frame_equal(
        discriminability(convert(positive), convert(negative)),
        discriminability(positive, negative),
        check_exact=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_other_dtypes(dtype):
    """bfloat16 has no numpy type, and integers no NaN."""
    positive, negative = (torch.from_numpy(x).to(dtype) for x in codes())
    expected = discriminability(positive.double().numpy(), negative.double().numpy())
    pd.testing.assert_frame_equal(discriminability(positive, negative), expected, check_exact=True)


def test_sparse_with_stored_zeros_and_duplicates():
    """A stored zero is a zero, and duplicate entries of COO add up."""
    dense = np.array([[0.0, 3.0], [1.0, 0.0], [2.0, 0.0]])
    rows, columns, values = [0, 0, 0, 1, 2, 1], [0, 1, 1, 0, 0, 1], [0.0, 1.0, 2.0, 1.0, 2.0, -0.0]
    stored = sparse.coo_array((values, (rows, columns)), shape=(3, 2))
    pd.testing.assert_frame_equal(discriminability(stored, dense), discriminability(dense, dense))


def test_memory_is_bounded():
    """Scratch memory must depend on the chunk, not on the matrix."""
    import tracemalloc

    rng = np.random.default_rng(0)
    x = np.zeros((1_000, 10_000), dtype=np.float32)  # 40 MB
    x[np.arange(1_000)[:, None], rng.integers(10_000, size=(1_000, 20))] = 1
    discriminability(x[:2, :2], x[:2, :2])  # what is imported on the way is no scratch
    tracemalloc.start()
    try:
        discriminability(x[:500], x[500:])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 2


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (np.zeros(3), np.zeros((3, 1)), r"positive has shape \(3,\)"),
        (np.zeros((3, 2)), np.zeros((1, 2)), r"negative has shape \(1, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 4)), "positive has 2 features and negative 4"),
        (np.zeros((2, 2)), np.array([[0, nan], [0, 0]]), "negative: feature 1"),
        (torch.full((2, 2), inf), np.zeros((2, 2)), "positive: feature 0"),
    ],
)
def test_bad_input_is_named(positive, negative, message):
    """NaN would be sorted to the top of the ranking, a transposed matrix ranked by prompt."""
    with pytest.raises(ValueError, match=message):
        discriminability(positive, negative)


# ---------------------------------------------------------------------------------------------
# ranks


def table_of(d, auroc=None):
    d = np.asarray(d, dtype=float)
    auroc = np.full(d.size, 0.5) if auroc is None else auroc
    return pd.DataFrame({"cohens_d": d, "auroc": auroc}).rename_axis("feature")


def test_rank_within_blocks():
    """Each block has its own ranks, features keep their dictionary index, ties are settled."""
    table = table_of([1, inf, 0, 0, -inf, 2], [0.6, 1, 0.5, 0.55, 0, 0.9])
    blocks = {"A_exclusive": slice(0, 2), "shared": slice(2, 6)}
    ranked = rank_within_blocks(table, blocks)
    assert list(ranked.columns) == ["block", "rank", "feature", "cohens_d", "auroc"]
    assert list(ranked["block"]) == ["A_exclusive"] * 2 + ["shared"] * 4
    assert list(ranked["rank"]) == [1, 2, 1, 2, 3, 4]
    assert list(ranked["feature"]) == [1, 0, 5, 3, 2, 4]
    assert list(ranked["cohens_d"]) == [inf, 1, 2, 0, 0, -inf]


def test_ranks_of_the_real_thing():
    """The table of discriminability goes in as it comes out."""
    table = discriminability(*codes())
    ranked = rank_within_blocks(table, {"all": slice(0, 40)})
    assert sorted(ranked["feature"]) == list(range(40))
    pd.testing.assert_frame_equal(
        ranked.set_index("feature")[COLUMNS].sort_index(), table, check_exact=True
    )
    assert (ranked["cohens_d"].diff().dropna() <= 0).sum() >= 35  # inf - inf is NaN


def test_a_block_that_does_not_fit_is_refused():
    """Python would clip the slice, and rank the wrong crosscoder's features."""
    with pytest.raises(ValueError, match="block 'A'"):
        rank_within_blocks(table_of(range(6)), {"A": slice(0, 7)})


# ---------------------------------------------------------------------------------------------
# stability


def test_stability_of_equal_opposite_and_half_equal_rankings():
    """Overlap counts common features, Spearman their order; infinite scores are fine."""
    scores = np.array([inf, 3, 2, 1, 0, -inf])
    assert stability(scores, scores, 2) == (1, 1 / 3, pytest.approx(1))
    assert stability(scores, -scores, 2) == (0, 1 / 3, pytest.approx(-1))
    assert stability(scores, [9, 0, 8, 1, 2, 3], 2).overlap == 0.5


def test_stability_does_not_count_ties_as_agreement():
    """Dead features, all at d = 0, would agree by their index."""
    dead = np.zeros(10)
    result = stability(dead, dead, 4)
    assert (result.overlap, result.chance) == (pytest.approx(0.4), 0.4)
    assert np.isnan(result.spearman)
    scores = np.array([5.0] + [0.0] * 9)  # one live feature; one of nine dead ones fills the top 2
    assert stability(scores, scores, 2).overlap == pytest.approx((1 + 9 * (1 / 9) ** 2) / 2)


def test_unrelated_rankings_overlap_by_chance():
    """`chance` is what independent rankings reach on average."""
    rng = np.random.default_rng(0)
    found = [stability(*rng.normal(size=(2, 30)), 6) for _ in range(300)]
    assert np.mean([s.overlap for s in found]) == pytest.approx(found[0].chance, abs=0.03)
    assert abs(np.mean([s.spearman for s in found])) < 0.05
