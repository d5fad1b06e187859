"""Planted data, claims and recovery against hand-built truth."""

import numpy as np
import pytest
import torch

from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.reading import groundtruth as gt

CONFIG = gt.PlantedConfig(d_model=24, n_shared=30, n_per_rate=2)


@pytest.fixture(scope="module")
def sample():
    return gt.sample(CONFIG, 40_000, seed=3)


def hand_built(partition, rows):
    """A crosscoder with the given decoder rows, and the encoder that reads them back."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    crosscoder = Crosscoder.create(rows.shape[-1], partition, len(rows))
    with torch.no_grad():
        crosscoder.W_dec.copy_(rows)
        encoder = rows / rows.square().sum((1, 2), keepdim=True).clamp(min=1e-12)
        crosscoder.W_enc.copy_(encoder.permute(1, 2, 0))
    return crosscoder.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# planted data


def test_features_fire_at_their_rates(sample):
    """Rates are wrong by more than sampling error."""
    rate = (sample.codes > 0).double().mean(0)
    error = (sample.truth.rate * (1 - sample.truth.rate) / len(sample.x)).sqrt()
    assert ((rate - sample.truth.rate).abs() < 5 * error).all()
    assert sorted(set(sample.truth.rate[:8].tolist())) == pytest.approx(CONFIG.exclusive_rates)
    assert (sample.codes >= 0).all()


def test_exclusive_features_are_absent_from_the_other_stream():
    """Without noise, shared features or offset, the other stream is not exactly constant."""
    config = gt.PlantedConfig(noise=0.0, offset=0.0, max_rate=1e-9)
    x, codes, truth = gt.sample(config, 2_000, seed=0)
    for m in (0, 1):
        mine = (codes[:, truth.exclusive(m)] > 0).any(1)
        alone = mine & ~(codes[:, truth.exclusive(1 - m)] > 0).any(1)
        assert alone.sum() > 50
        assert (x[alone, 1 - m] == 0).all()
        assert (x[alone, m].norm(dim=-1) > 0).all()
    assert (truth.directions[truth.owner == 0, 1] == 0).all()
    assert (truth.gain[truth.owner == 1, 0] == 0).all()


def test_activations_are_the_code_times_the_directions(sample):
    """A stream is anything else than scale * (code @ directions + mean + noise)."""
    truth = sample.truth
    clean = torch.einsum("nf,fmd->nmd", sample.codes, truth.directions * truth.gain[..., None])
    rest = sample.x / torch.tensor(CONFIG.scale)[:, None] - clean
    assert rest.mean(0).norm(dim=-1) == pytest.approx([CONFIG.offset] * 2, abs=0.02)
    assert rest.std(0).mean() == pytest.approx(CONFIG.noise, rel=0.01)
    assert sample.x.dtype == torch.float32
    assert sample.x.shape == (40_000, 2, 24)


@pytest.mark.parametrize("cosine", [1.0, 0.6])
def test_shared_directions_have_the_cosine_asked_for(cosine):
    """The two directions of a shared feature have another angle."""
    truth = gt.sample(gt.PlantedConfig(shared_cosine=cosine), 1, seed=0).truth
    first, second = truth.directions[truth.owner < 0].unbind(1)
    assert (first * second).sum(-1) == pytest.approx(cosine, abs=1e-5)
    assert truth.directions[truth.owner < 0].norm(dim=-1) == pytest.approx(1, abs=1e-5)


def test_features_fire_together_if_and_only_if_they_share_factors():
    """The copula does not correlate, or correlates where it should not."""
    spread = {}
    for share in (0.0, 0.6):
        codes = gt.sample(gt.PlantedConfig(factor_share=share, n_shared=40), 8_000, seed=1).codes[
            :, 40:
        ]
        r = np.corrcoef((codes > 0).double().numpy().T)
        spread[share] = r[np.triu_indices_from(r, 1)].std()
    assert spread[0.0] < 0.02
    assert spread[0.6] > 4 * spread[0.0]


def test_seeds_reproduce_samples_and_truth_does_not_depend_on_n(sample):
    """A seed does not fix the draw, or two seeds give the same truth."""
    assert torch.equal(gt.sample(CONFIG, 50, 3).x, gt.sample(CONFIG, 50, 3).x)
    assert torch.equal(gt.sample(CONFIG, 50, 3).truth.directions, sample.truth.directions)
    assert not torch.equal(gt.sample(CONFIG, 50, 4).truth.directions, sample.truth.directions)


def test_null_pairs_double_a_stream():
    """The copy differs from the stream, or its noise has another size or changes between calls."""
    x = torch.randn(500, 2, 16)
    copy = gt.NullPair(x)
    got = copy.gather(np.arange(100, 200))
    assert copy.n == 500
    assert torch.equal(got[:, 0], x[100:200, 0])
    assert torch.equal(got[:, 1], x[100:200, 0])
    noisy = gt.NullPair(x, noise=2.0)
    got = noisy.gather(np.arange(500))
    gap = got[:, 1] - got[:, 0]
    assert gap.square().sum(-1).mean().sqrt() == pytest.approx(2.0, rel=0.03)
    assert torch.equal(got[7:9], noisy.gather(np.array([7, 8])))
    assert torch.equal(gt.NullPair(noisy).gather(np.array([7]))[:, 0], x[7:8, 0])  # from a source


# --------------------------------------------------------------------------------------------------
# recovery


def toy_truth():
    """Two A-exclusive features (axes 0, 1), one B-exclusive (2), one shared (3)."""
    directions = torch.zeros(4, 2, 6)
    for feature, (axis, models) in enumerate([(0, (0,)), (1, (0,)), (2, (1,)), (3, (0, 1))]):
        directions[feature, list(models), axis] = 1
    owner = torch.tensor([0, 0, 1, -1])
    rate = torch.tensor([0.005, 0.02, 0.005, 0.1])
    return gt.Truth(directions, directions.norm(dim=-1), owner, rate)


def toy_rows():
    """A's first; B's; the shared one; the shared one mostly in A; junk; A's second, dead."""
    rows = torch.zeros(6, 2, 6)
    rows[0, 0, 0], rows[0, 1, 5] = 2.0, 0.1
    rows[1, 1, 2] = 1.0
    rows[2, :, 3] = 1.0
    rows[3, 0, 3], rows[3, 1, 3] = 1.0, 0.2
    rows[4, 0, 4], rows[4, 1, 4] = 1.0, 0.5
    rows[5, 0, 1] = 1.0
    return rows, torch.tensor([True] * 5 + [False])


def test_recall_and_false_positives_of_a_hand_built_decoder():
    """A count of the recovery tables is wrong."""
    rows, live = toy_rows()
    claims = gt.norm_ratio_claims(hand_built(Partition.plain(6), rows))
    assert claims.model.tolist() == [0, 1, 0, 0, 0, 0]
    assert claims.score.tolist() == pytest.approx([2 / 2.1, 1, 0.5, 1 / 1.2, 1 / 1.5, 1])
    planted, learned = gt.recovery(rows, claims, toy_truth(), live)
    assert planted.rate.tolist() == pytest.approx([0.005, 0.02, 0.005])
    assert planted.learned.tolist() == [True, False, True]  # the dead feature does not count
    assert learned.is_true.tolist() == [True, True, False, False, False]
    assert learned.is_shared.tolist() == [False, False, True, True, False]
    strict = gt.rates(planted, learned, 0.9525)
    assert strict["recall"] == pytest.approx(1 / 3)  # A's first is claimed at 0.95238 only
    lax = gt.rates(planted, learned, 0.6)
    assert (lax["recall"], lax["claimed"], lax["false"], lax["false_shared"]) == (2 / 3, 4, 2, 1)
    assert lax["false_positive_rate"] == pytest.approx(2 / 3)
    assert lax["false_discovery_rate"] == pytest.approx(1 / 2)


def test_a_claim_for_the_wrong_model_is_false():
    """A feature that holds A's direction but is claimed for B counts as recovered."""
    rows = torch.zeros(1, 2, 6)
    rows[0, 0, 0], rows[0, 1, 3] = 1.0, 5.0
    claims = gt.Claims(torch.tensor([1]), torch.tensor([0.9]))
    planted, learned = gt.recovery(rows, claims, toy_truth(), torch.tensor([True]))
    assert planted.learned.tolist() == [True, False, False]
    assert gt.rates(planted, learned, 0.5)["recall"] == 0
    assert gt.rates(planted, learned, 0.5)["false_shared"] == 1


def test_the_cosine_decides():
    """A direction just below the limit is recovered, or one just above is not."""
    for cosine, expected in ((0.91, 1 / 3), (0.89, 0.0)):
        rows = torch.zeros(1, 2, 6)
        rows[0, 0, 0], rows[0, 0, 5] = cosine, (1 - cosine**2) ** 0.5
        claims = gt.Claims(torch.tensor([0]), torch.tensor([1.0]))
        tables = gt.recovery(rows, claims, toy_truth(), torch.tensor([True]))
        assert gt.rates(*tables, 1.0)["recall"] == pytest.approx(expected)


def test_block_claims_are_the_exclusive_blocks():
    """A shared feature is claimed, or an exclusive one for the wrong model."""
    partition = Partition.dedicated(10, 0.2)
    claims = gt.block_claims(Crosscoder.create(4, partition, 2))
    assert (claims.score == 1).tolist() == [True] * 4 + [False] * 6
    assert claims.model[:4].tolist() == [0, 0, 1, 1]


def test_sweep_and_equal_false_positive_rate():
    """The sweep misses a threshold, or the laxest one within a rate is not found."""
    rows, live = toy_rows()
    claims = gt.norm_ratio_claims(hand_built(Partition.plain(6), rows))
    planted, learned = gt.recovery(rows, claims, toy_truth(), live)
    curve = gt.sweep(planted, learned)
    assert curve.false_positive_rate.tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1])
    assert curve.recall.is_monotonic_increasing
    assert gt.threshold_at(curve, 0.0) == pytest.approx(2 / 2.1)
    assert gt.threshold_at(curve, 0.5) == pytest.approx(1 / 1.2)


# --------------------------------------------------------------------------------------------------
# latent scaling


def test_latent_scaling_recovers_known_coefficients():
    """Beta of a direction that the other model holds at 0.3 of the strength, unwritten, is not 0.3.

    The decoder writes nothing into B (complete shrinkage): the error shows it. The reconstruction
    shows what other features write there.
    """
    rows = torch.zeros(3, 2, 8)
    rows[0, 0, 0] = 2.0  # claimed for A, but B holds 0.3 of it
    rows[1, :, 1] = 1.0
    rows[2, 1, 2], rows[2, 0, 3] = 1.0, 0.1
    crosscoder = hand_built(Partition.plain(3), rows)
    f = torch.rand(4_000, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    x = torch.einsum("nf,fmd->nmd", f, rows)
    x[:, 1, 0] += 0.3 * 2.0 * f[:, 0]
    betas = gt.latent_scaling(crosscoder, x)
    beta = betas["error"]
    assert beta[0, 0].tolist() == pytest.approx([1.0, 0.3], abs=1e-4)
    assert torch.isnan(beta[0, 1]).all()  # no row in B to scale
    assert beta[1].flatten().tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert betas["reconstruction"][0, 0].tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    assert gt.latent_scaling_claims(crosscoder, x, ("error",)).score.tolist() == pytest.approx(
        [0.7, 0.0, 1.0], abs=1e-3
    )


def test_latent_scaling_sees_a_feature_written_by_another():
    """Decoupling: two features that always fire together, one for each model, look exclusive."""
    rows = torch.zeros(2, 2, 4)
    rows[0, 0, 0] = 1.0
    rows[1, 1, 0] = 1.0
    crosscoder = hand_built(Partition.dedicated(4, 0.25), torch.cat([rows, torch.zeros(2, 2, 4)]))
    f = torch.rand(1_000, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    x = torch.zeros(1_000, 2, 4)
    x[:, :, 0] = f
    error = gt.latent_scaling_claims(crosscoder, x, ("error",)).score
    both = gt.latent_scaling_claims(crosscoder, x).score
    assert error[:2].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert both[:2].tolist() == pytest.approx([0, 0], abs=1e-4)
    assert (both[2:] == -torch.inf).all()  # dead features are never claimed


def test_latent_scaling_is_in_normalised_units():
    """Raw scales change beta."""
    rows = torch.zeros(2, 2, 4)
    rows[0, 0, 0] = rows[1, 1, 1] = 1.0
    partition, generator = Partition.plain(2), torch.Generator().manual_seed(0)
    x = torch.rand(500, 2, 4, generator=generator)
    first = hand_built(partition, rows)
    second = hand_built(partition, rows)
    second.normaliser = Normaliser(torch.ones(2, 4), torch.tensor([5.0, 0.1]))
    raw = second.normaliser.invert(x)
    a, b = (gt.latent_scaling(c, y)["error"] for c, y in ((first, x), (second, raw)))
    assert torch.allclose(a, b, atol=1e-3, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# checks without a truth


def mirrored():
    """A DFC whose first A- and B-exclusive features are one direction; the second ones are not."""
    rows = torch.zeros(8, 2, 5)
    rows[0, 0, 0], rows[1, 0, 1] = 1.0, 1.0  # A-exclusive
    rows[2, 1, 0], rows[3, 1, 2] = 1.0, 1.0  # B-exclusive
    rows[4, :, 4] = 1.0
    return hand_built(Partition.dedicated(8, 0.25), rows)


def test_mirrors_need_the_direction_and_tell_whether_they_fire_together():
    """A mirror is missed, a pair of different directions is one, or the overlap is wrong."""
    x = torch.zeros(100, 2, 5)
    x[:60, 0, 0] = 1.0  # A's feature fires on 60 samples, B's on 40 of these
    x[:40, 1, 0] = 1.0
    x[:, 0, 1] = x[:, 1, 2] = 1.0
    found = gt.mirrors(mirrored(), x)
    assert found[["feature_A", "feature_B"]].to_numpy().tolist() == [[0, 2]]
    assert found.cosine[0] == pytest.approx(1)
    assert found.overlap[0] == pytest.approx(40 / 60)
    assert gt.mirrors(mirrored(), x, min_rate=0.5).empty  # B's fires too rarely


def test_share_of_explained_variance_of_a_block():
    """Leaving a block out does not cost exactly the variance that it explains."""
    rng = torch.Generator().manual_seed(0)
    x = torch.zeros(5_000, 2, 5)
    x[:, 0, 0] = torch.rand(5_000, generator=rng)  # A-exclusive, feature 0
    x[:, 0, 4] = x[:, 1, 4] = 2 * torch.rand(5_000, generator=rng)  # shared
    crosscoder = mirrored()
    table = gt.block_table(crosscoder, x).set_index("block")
    assert table.live.tolist() == [1, 0]
    assert table.fve.tolist() == pytest.approx([1, 1], abs=1e-5)
    # The block carries its mean too, which a constant would explain as well.
    share = x[:, 0, 0].square().mean() / x[:, 0].var(0, correction=0).sum()
    assert table.share["A_exclusive"] == pytest.approx(float(share), rel=1e-4)
    assert table.share["B_exclusive"] == 0


def test_stability_counts_partners():
    """A share is wrong, or a run without features is not NaN."""
    eye = torch.eye(4)
    assert gt.stability(eye[:2], [eye[1:], eye]) == pytest.approx(0.75)
    assert gt.stability(-eye[:2], [eye]) == 0.0  # the opposite direction is another feature
    assert np.isnan(gt.stability(eye[:0], [eye]))
    assert gt.stability(eye, [eye[:0]]) == 0.0
