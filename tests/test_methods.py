"""Every way finds a planted direction, claims nothing of a null, and a span is what it says."""

import numpy as np
import pytest
import torch
from sae_lens import SAE

from dfc_lib.crosscoder import training
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.crosscoder.training import TrainConfig
from dfc_lib.reading import groundtruth, methods
from dfc_lib.steering.interventions import OtherModel, Site, apply

D_MODEL, N = 16, 4_000
# As many shared features as the base has: an untied DFC with more puts the difference there.
RUN = TrainConfig(Partition.dedicated(16, 0.25), k=3, steps=300, batch_size=128, lr=3e-3)
WAYS = methods.crosscoders(RUN, D_MODEL)


@pytest.fixture(scope="module")
def planted():
    """A base of eight sparse features, A like it, and one direction that A alone has."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=rng))[0]
    fires = torch.rand(N, 8, generator=rng) < 0.2
    code = (1 + 0.3 * torch.rand(N, 8, generator=rng)) * fires
    base = code @ rows[:8] + 0.02 * torch.randn(N, D_MODEL, generator=rng)
    fires = torch.rand(N, generator=rng) < 0.4
    size = 1.5 + 0.3 * torch.randn(N, generator=rng).abs()
    tuned = base + (fires * size)[:, None] * rows[12]
    return torch.stack([tuned, base], dim=1), rows[12], fires


def test_ways_without_a_crosscoder_find_the_planted_direction(planted):
    x, direction, fires = planted
    found = {
        "mean": methods.mean_difference(x),
        "uncentred": methods.principal(x, 1, centred=False),
        "centred": methods.principal(x, 1),
        "probe": methods.probe(x[:, 0], fires),
    }
    for name, rows in found.items():
        cosine = groundtruth.cosines(methods.oriented(rows, x), direction[None])
        assert float(cosine) > 0.9, name


@pytest.mark.parametrize("name", WAYS)
def test_ways_that_train_one_find_the_planted_direction(planted, tmp_path, name):
    x, direction, _ = planted
    way = WAYS[name]
    crosscoder = training.train(way.config, x, tmp_path / name, progress=False)
    rows = methods.candidates(crosscoder, way.rule(crosscoder, x), x, 8)
    assert 0 < len(rows) <= 8
    assert float(groundtruth.cosines(rows, direction[None]).amax()) > 0.9


def test_an_sae_on_the_difference_finds_it_and_comes_back_from_disk_the_same(planted, tmp_path):
    x, direction, _ = planted
    sae = methods.difference_sae(x, RUN, 16, tmp_path, "planted")
    rows = methods.of_sae(sae, x, 8)
    assert float(groundtruth.cosines(rows, direction[None]).amax()) > 0.9
    folders = list((tmp_path / "saes").glob("[!.]*"))
    assert len(folders) == 1
    written = (folders[0] / "cfg.json").stat().st_mtime_ns
    again = methods.difference_sae(x, RUN, 16, tmp_path, "planted")
    assert (folders[0] / "cfg.json").stat().st_mtime_ns == written  # found, not trained again
    gaps = x[:100, 0] - x[:100, 1]
    assert torch.equal(sae.encode(gaps), again.encode(gaps))
    assert (sae.encode(gaps) > 0).sum(1).max() <= RUN.k


def test_the_sae_that_is_read_back_codes_raw_differences_as_the_trained_one(planted, tmp_path):
    """The scale and the decoder norms are folded into the weights, and nothing else changes."""
    x, _, _ = planted
    gaps = 50 * (x[:, 0] - x[:, 1])
    trained = methods.train_sae(gaps, RUN, 16).eval()
    trained.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(gaps[:200]), trained(gaps[:200]), rtol=1e-3, atol=1e-2)
        left = (loaded(gaps) - gaps).square().sum() / gaps.square().sum()
    assert left < 0.2


def test_training_an_sae_leaves_the_random_state_alone(planted):
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    methods.train_sae(planted[0][:256, 0], TrainConfig(Partition.plain(8), 2, steps=2), 8)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_nothing_is_claimed_of_a_model_beside_itself(planted, noise):
    x, _, _ = planted
    pair = groundtruth.NullPair(x, noise)
    null = pair.gather(np.arange(pair.n))
    assert len(methods.claimed_mean(null)) == 0
    for centred in (True, False):
        assert len(methods.claimed_principal(null, centred)) == 0


def test_what_differs_is_claimed(planted):
    x, direction, _ = planted
    for rows in (methods.claimed_mean(x), methods.claimed_principal(x, centred=False)):
        assert len(rows) == 1
        assert abs(float(groundtruth.cosines(rows, direction[None]))) > 0.9


def test_a_dead_block_offers_no_direction(planted):
    x = planted[0]
    crosscoder = Crosscoder.create(D_MODEL, RUN.partition, 4, Normaliser.fit(x))
    crosscoder.requires_grad_(False)
    crosscoder.b_enc[:8] = -1e4  # both exclusive blocks
    rows = methods.candidates(crosscoder, groundtruth.block_claims(crosscoder), x, 8)
    assert rows.shape == (0, D_MODEL)


def test_strength_ranks_exclusive_features_by_what_they_write(planted):
    x = planted[0]
    torch.manual_seed(0)
    crosscoder = Crosscoder.create(D_MODEL, RUN.partition, 16, Normaliser.fit(x))
    crosscoder.requires_grad_(False)
    before = methods.by_strength(crosscoder, x).score
    crosscoder.W_dec[1] *= 7
    after = methods.by_strength(crosscoder, x).score
    assert after[1] == pytest.approx(7 * before[1])
    assert (after[8:] == -torch.inf).all()  # shared features are never claimed


def test_a_span_of_everything_is_the_other_models_vector():
    h = torch.randn(5, 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(2))
    for target in (0, 1):
        new, _ = apply(methods.Span(methods.orthonormal(rows)), h, target)
        torch.testing.assert_close(new, apply(OtherModel(1 - target), h, target)[0])


def test_a_span_moves_its_own_component_alone():
    h = torch.randn(5, 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(2))
    rows[2] = rows[0] - 2 * rows[1]  # adds nothing
    basis = methods.orthonormal(rows)
    assert len(basis) == 2
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=0)
    new = methods.Span(basis).new(Site(h, 0))
    torch.testing.assert_close(new @ rows.T, h[:, 1] @ rows.T, atol=1e-4, rtol=0)
    rest = torch.eye(D_MODEL) - basis.T @ basis
    torch.testing.assert_close(new @ rest, h[:, 0] @ rest, atol=1e-4, rtol=0)


def test_directions_are_turned_towards_a(planted):
    x, direction, _ = planted
    turned = methods.oriented(torch.stack([-3 * direction, direction]), x)
    torch.testing.assert_close(turned, direction.expand(2, -1), atol=1e-5, rtol=0)


def test_recovery_of_directions_takes_either_sign():
    config = groundtruth.PlantedConfig(n_per_rate=1)
    truth = groundtruth.sample(config, 10, 0).truth
    mine = truth.directions[truth.exclusive(0), 0]
    other = truth.directions[truth.owner < 0][:2, 0]
    features, rates = methods.recovered(torch.cat([-mine[:3], other]), truth)
    assert features.found.tolist() == [True] * 3 + [False] * 5
    assert rates == {"claimed": 5, "recall": 3 / 8, "false_discovery_rate": 2 / 5}
    assert methods.recovered(mine[:0], truth)[1]["false_discovery_rate"] == 0


def test_numbers_of_directions_and_stability():
    assert methods.needed({1: 0.5, 2: 0.95, 3: 0.92}) == 2
    assert np.isnan(methods.needed({1: 0.5}))
    e = torch.eye(3)
    assert methods.stability([e[0], -e[0]]) == pytest.approx(1)
    assert methods.stability([e[0], e[0], e[1]]) == pytest.approx(1 / 3)
    assert np.isnan(methods.stability([e[0]]))


def test_a_probe_needs_both_kinds():
    with pytest.raises(ValueError, match="at least 2 classes"):
        methods.probe(torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
