"""Decoder geometry: islands are found, a blob is at chance, and zeros alone make islands."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Partition
from dfc_lib.reading import geometry

LIKE = {"A_exclusive": 30, "B_exclusive": 30, "shared": 90}
QUICK = {"n_permutations": 60}


def islands(n=150, width=24, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [30, 30, n - 60])
    centres = np.eye(3, width)
    vectors = centres[labels] + spread * rng.standard_normal((n, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return geometry.Rows(vectors, labels, tuple(LIKE))


def blob(n=150, width=24, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return geometry.Rows(vectors, np.zeros(n, dtype=int), ("shared",))


def test_planted_islands_are_recovered_in_both_spaces():
    table = geometry.recovery(islands(), **QUICK)
    kmeans = table[table.method == "k-means"]
    assert (kmeans.ari > 0.95).all()
    assert (kmeans.ari_p < 0.05).all()
    assert (table.silhouette > 0.3).all()


def test_random_blocks_of_a_blob_are_at_chance():
    rows = geometry.matched_random(blob(), LIKE, seed=1)
    table = geometry.recovery(rows, **QUICK)
    assert table.ari.abs().max() < 0.1
    assert (table.ari_p > 0.01).all()
    assert np.bincount(rows.labels).tolist() == list(LIKE.values())


def test_blanked_halves_alone_make_islands_and_one_half_does_not():
    """Rows that share a mean direction, as decoder rows do: blanking halves at random separates."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((150, 1, 12)) + 3 * rng.standard_normal((1, 1, 12))
    rows = geometry.Rows(np.tile(half, (1, 2, 1)).reshape(150, 24), np.zeros(150, int), ("shared",))
    blanked = geometry.masked(rows, LIKE)
    whole = geometry.recovery(blanked, **QUICK)
    one = geometry.recovery(geometry.half(blanked), **QUICK)
    assert whole[whole.method == "k-means"].ari.max() > 0.9
    assert one[one.method == "k-means"].ari.max() < 0.1
    assert len(geometry.half(blanked).labels) == 120  # B-exclusive rows have no A half


def test_random_rows_obey_the_mask():
    rows = geometry.masked_random({"A_exclusive": 12, "B_exclusive": 12, "shared": 36}, 8)
    assert (rows.vectors[rows.labels == 0, 8:] == 0).all()
    assert (rows.vectors[rows.labels == 1, :8] == 0).all()
    shared = rows.vectors[rows.labels == 2]
    assert np.allclose(shared[:, :8], shared[:, 8:])


def test_scores_are_scikit_learns_and_the_null_is_that_of_permuted_labels():
    rng = np.random.default_rng(0)
    blocks, found = rng.integers(0, 3, 200), rng.integers(-1, 4, 200)
    row = geometry.agreement(found, blocks, 4_000)
    assert row["ari"] == pytest.approx(adjusted_rand_score(blocks, found))
    assert row["nmi"] == pytest.approx(normalized_mutual_info_score(blocks, found))
    permuted = [adjusted_rand_score(rng.permutation(blocks), found) for _ in range(1_000)]
    bounds = np.percentile(permuted, [2.5, 97.5])
    assert [row["ari_null_low"], row["ari_null_high"]] == pytest.approx(bounds, abs=0.004)
    assert row["noise"] == pytest.approx((found == -1).mean())
    assert geometry.agreement(np.zeros(9, int), np.zeros(9, int), 10)["ari"] == 1
    noise = geometry.agreement(np.full(200, -1), blocks, 10)
    assert (noise["clusters"], noise["noise"], noise["nmi_null"], noise["nmi_p"]) == (0, 1, 0, 1)


def test_permutation_p_values_of_random_labels_are_not_small_too_often():
    rng = np.random.default_rng(0)
    found = rng.integers(0, 3, 90)
    p = [geometry.agreement(found, rng.integers(0, 3, 90), 60, seed)["ari_p"] for seed in range(40)]
    assert np.mean(np.array(p) <= 0.1) < 0.3
    assert 0.3 < np.mean(p) < 0.7


SMALL = ("A_exclusive", "B_exclusive")


def test_the_neighbours_of_planted_islands_are_their_own_and_planes_part_them():
    """Islands planted into a blob whose blocks were at chance."""
    at_chance = geometry.matched_random(blob(), LIKE, seed=1)
    found = geometry.planted(at_chance, seed=2)
    assert np.bincount(found.labels).tolist() == list(LIKE.values())
    assert geometry.purity(found, SMALL, **QUICK)["above"] > 0.9
    assert geometry.separability(found) > 0.8
    row = geometry.purity(at_chance, SMALL, **QUICK)
    assert row["above_null_low"] - 0.05 < row["above"] < row["above_null_high"] + 0.05
    assert abs(row["above"]) < 0.15
    assert abs(geometry.separability(at_chance)) < 0.2
    assert geometry.purity(islands(spread=0.02), SMALL, **QUICK)["above"] == 1


def test_purity_counts_neighbours_and_its_chance_is_that_of_permuted_labels():
    """Four rows on a circle: the block of two holds neighbours, then it does not."""
    angles = np.array([0.0, 0.1, 1.5, 1.7])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    names = ("A_exclusive", "shared")

    def of(*labels):
        return geometry.purity(geometry.Rows(vectors, np.array(labels), names), SMALL, k=10)

    together, apart = of(0, 0, 1, 1), of(0, 1, 0, 1)
    assert (together["purity"], together["chance"], together["above"]) == (
        1,
        pytest.approx(1 / 3),
        1,
    )
    assert (apart["purity"], apart["above"]) == (0, pytest.approx(-0.5))
    assert together["above_null"] == pytest.approx(0, abs=0.06)
    assert np.isnan(of(0, 1, 1, 1)["above"])  # one row has no neighbour of its block


def test_an_exclusive_block_that_is_no_island_is_not_made_one_by_its_size():
    """A tenth of a blob, as live exclusive rows are of a dictionary: chance is near zero."""
    rows = geometry.matched_random(
        blob(600, 48), {"A_exclusive": 20, "B_exclusive": 20, "shared": 560}
    )
    row = geometry.purity(rows, SMALL, **QUICK)
    assert row["chance"] == pytest.approx(19 / 599)
    assert abs(row["above"]) < 0.05
    assert np.isnan(geometry.separability(blob()))  # one block


def test_norm_ratio_blocks_take_the_extremes():
    ratio = np.linspace(0.1, 0.9, 10)
    vectors = np.stack([np.repeat(ratio[:, None], 2, 1), np.repeat(1 - ratio[:, None], 2, 1)], 1)
    rows = geometry.Rows(vectors.reshape(10, 4), np.zeros(10, dtype=int), ("shared",))
    matched = geometry.matched_norm_ratio(rows, {"A": 2, "B": 3, "shared": 5})
    assert matched.labels.tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 0, 0]


def test_rows_of_a_crosscoder_are_unit_and_labelled():
    torch.manual_seed(0)
    crosscoder = Crosscoder.create(16, Partition.dedicated(40, 0.1), 4)
    rows = geometry.decoder_rows(crosscoder, alive=[0, 5, 39])
    assert np.allclose(np.linalg.norm(rows.vectors, axis=1), 1)
    assert [rows.names[i] for i in rows.labels] == ["A_exclusive", "B_exclusive", "shared"]
    assert (rows.vectors[0, 16:] == 0).all()


def test_the_same_seed_gives_the_same_plane():
    vectors = islands().vectors
    assert np.array_equal(geometry.plane(vectors, seed=3), geometry.plane(vectors, seed=3))


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        geometry.matched_random(blob(50), LIKE)
    with pytest.raises(ValueError, match="k-means"):
        geometry.cluster(blob(50).vectors, "spectral", 3)
