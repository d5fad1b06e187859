"""The second study's crosscoder, its repetitions, and planted features."""

from dataclasses import replace

import pytest
import torch

from dfc_lib import profiles
from dfc_lib.crosscoder import losses
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.training import train
from dfc_lib.reading import evolution, specificity


def test_the_loss_is_the_published_one_over_the_number_of_elements():
    d_model, names = 6, ("base", "RL")
    config = specificity.weighted_l1(names, 40, d_model, k=40)
    crosscoder = Crosscoder.create(d_model, config.partition, config.k, init_seed=1)
    x = torch.randn(50, 2, d_model, generator=torch.Generator().manual_seed(0))
    forward = crosscoder.forward_sparse(x)
    terms = losses.terms(crosscoder, forward, config.variant)
    found = losses.weigh(terms, config.shared_coef, config.exclusive_coef, config.aux_coef)
    f = crosscoder.encode(x)
    norms = crosscoder.W_dec.norm(dim=-1).sum(1)  # over the models
    squares = (crosscoder.reconstruct(x) - x).square().sum((1, 2))
    published = (squares + 2.0 * f @ norms).mean()
    torch.testing.assert_close(found * 2 * d_model, published)
    assert float((f > 0).float().sum(1).max()) > 16  # more than a small top-k would leave


def test_a_planted_feature_is_the_copys_own_and_noise_as_large_is_not(tmp_path):
    base = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    copy = specificity.plant(base, 3.0, 2, 0.05, seed=1)
    noisy = base + 3.0 / 4 * torch.randn(base.shape, generator=torch.Generator().manual_seed(2))
    config = specificity.weighted_l1(("base", "copy"), 64, 16, steps=1500, batch_size=128, lr=3e-3)
    highest = {}
    for name, other in (("planted", copy), ("noise", noisy)):
        both = torch.stack([base, other], dim=1)
        crosscoder = train(config, both, tmp_path / name, progress=False)
        live = (crosscoder.encode(both) > 0).float().mean(0) > 0.01
        highest[name] = evolution.nrn(crosscoder, "copy", "base")[live].topk(2).values.min()
    assert highest["planted"] > 0.9 > highest["noise"]


def test_plant_adds_what_was_asked_for():
    base = torch.zeros(20_000, 12)
    copy = specificity.plant(base, 2.0, 4, 0.1, seed=3)
    assert float(copy.square().sum(1).mean().sqrt()) == pytest.approx(2.0, rel=0.03)
    assert int(torch.linalg.matrix_rank(copy)) == 4
    share = (copy.norm(dim=1) > 0).float().mean()
    assert float(share) == pytest.approx(1 - 0.9**4, abs=0.02)
    assert torch.equal(copy, specificity.plant(base, 2.0, 4, 0.1, seed=3))


def test_a_bracket_is_of_the_nearest_on_both_sides():
    moved = {"8": 1.0, "16": 3.0, "32": 2.0, "64": 4.0}
    assert specificity.bracket(moved, 2.75) == ("32", "16", 0.75)
    assert specificity.bracket(moved, 3.0)[2] * 3.0 == 0.0  # the same one on both sides
    assert specificity.bracket(moved, 0.5) == ("8", "8", 0.0)
    assert specificity.bracket(moved, 9.0) == ("64", "64", 0.0)


def test_replications_are_the_numbered_folders_with_both_runs(tmp_path):
    for name in ("0", "10", "2", "other"):
        for step in ("rl/step_0004", "sft/step_0004"):
            (tmp_path / name / step).mkdir(parents=True)
    (tmp_path / "3" / "rl" / "step_0004").mkdir(parents=True)  # not finished
    profile = replace(profiles.get("smoke"), pair=str(tmp_path / "2"))
    found = specificity.replications(profile)
    assert list(found) == ["0", "2", "10"]
    assert found["10"].checkpoints("sft")[4] == tmp_path / "10" / "sft" / "step_0004"
    alone = specificity.replications(replace(profile, pair=str(tmp_path / "other")))
    assert list(alone) == ["other"]
    for pair in (None, str(tmp_path / "3")):
        with pytest.raises(ValueError, match="no checkpoints of an RL and of an SFT run"):
            specificity.replications(replace(profile, pair=pair))
