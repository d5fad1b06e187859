"""RL against SFT: three-model crosscoders, specific features, the compact set, forgetting."""

import copy
import itertools
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dfc_lib.crosscoder import loop, training
from dfc_lib.crosscoder.batches import Batches
from dfc_lib.crosscoder.checkpoint import load
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.crosscoder.training import TrainConfig, train
from dfc_lib.data.activations import residual
from dfc_lib.data.pair import Pair
from dfc_lib.reading import evolution
from tests.test_pair import qwen
from tests.test_training import in_child, kill_at_call, needs_fork

D_MODEL, N, NAMES = 8, 150, ("base", "SFT", "RL")
THREE = Partition.dedicated(48, 0.125, NAMES)  # 6 + 6 + 6 + 30
PLAIN = replace(Partition.plain(48, 3), model_names=NAMES)
CONFIG = TrainConfig(
    THREE, k=4, steps=40, batch_size=32, lr=5e-3, aux_coef=1.0,
    exclusive_coef=1e-3, shared_coef=1e-3, dead_steps=3, log_every=1, checkpoint_every=7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Bits repeat for one number of threads; and a forked child may not use OpenMP's pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n=N, seed=0):
    """Three streams that share 14 directions, raw scale; each has two of its own besides."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, D_MODEL, generator=generator)
    code = (torch.rand(n, 20, generator=generator) < 0.1) * (
        1 + torch.rand(n, 20, generator=generator)
    )
    noise = 0.05 * torch.randn(n, 3, D_MODEL, generator=generator)
    streams = []
    for m in range(3):
        mine = code.clone()
        mine[:, [i for i in range(6) if i // 2 != m]] = 0
        streams.append(mine @ directions * (m + 1) - m)
    return torch.stack(streams, dim=1) + noise


X = planted()
VARIANTS = {
    "topk": {},
    "batchtopk": {"batchtopk": True},
    "tied": {"tie_shared": True},
    "plain": {"partition": PLAIN},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


# -- three models: what tests/test_training.py and test_crosscoder.py ask of two


def assert_forbidden_is_zero(partition, *tensors):
    for tensor in tensors:
        assert (tensor != 0).any()
        rows = tensor.detach().unflatten(1, (3, D_MODEL))
        assert partition.largest_forbidden(rows) == 0.0


@variants
def test_three_models_forbidden_weights_gradients_and_moments_are_exactly_zero(tmp_path, fields):
    config = replace(CONFIG, **fields)
    data = Batches(config, X, None)
    training._claim(tmp_path, config)
    runs = [loop.Run(config, data, tmp_path)]
    runs[0].resume()
    for step in range(20):
        runs[0].train_step(data.batch(step))
    runs[0].checkpoint()
    runs.append(loop.Run(config, data, tmp_path))  # after a save and a load
    runs[1].resume()
    assert runs[1].step == 20
    runs[1].train_step(data.batch(20))
    for run in runs:
        copied = copy.deepcopy(run.crosscoder)
        for name in ("encoder", "decoder"):
            param, state = run.params[name], run.optimiser.state[run.params[name]]
            moments = state["exp_avg"], state["exp_avg_sq"]
            tensors = (param, getattr(copied, name), param.grad, *moments)
            assert_forbidden_is_zero(config.partition, *tensors)
    forbidden = config.partition.forbidden
    assert len(forbidden) == (0 if config.partition is PLAIN else 6)


@variants
def test_three_models_save_load_and_deepcopy_keep_the_partition_and_every_value(tmp_path, fields):
    config = replace(CONFIG, **fields)
    trained = train(config, X, tmp_path / "run", progress=False)
    assert max(trained.integrity().values()) == 0.0
    again = load(trained.save(tmp_path / "again"))
    for other in (again, copy.deepcopy(trained)):
        assert other.partition == config.partition
        assert max(other.integrity().values()) == 0.0
        assert torch.equal(other.encode(X), trained.encode(X))
        assert torch.equal(other.reconstruct(X), trained.reconstruct(X))


def test_three_models_gradients_obey_the_partition(tmp_path):
    crosscoder = Crosscoder.create(D_MODEL, THREE, 4, tie_shared=True)
    crosscoder.loss(X, 0.01, 0.01, "exclusive_only")[0].backward()
    crosscoder.constrain_grads_()
    assert_forbidden_is_zero(THREE, crosscoder.encoder.grad, crosscoder.decoder.grad)
    rows = crosscoder.decoder.grad.unflatten(1, (3, D_MODEL))[THREE.slice("shared")]
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 0], rows[:, 2])


def test_three_models_a_forbidden_weight_is_refused_on_loading(tmp_path):
    crosscoder = Crosscoder.create(D_MODEL, THREE, 4)
    with torch.no_grad():
        crosscoder.W_dec[THREE.slice("SFT_exclusive"), 2] = 1e-30
    with pytest.raises(ValueError, match="partition"):
        crosscoder.check_integrity()
    crosscoder.save(tmp_path)
    with pytest.raises(ValueError, match="decoder violates the partition"):
        load(tmp_path)


def test_an_exclusive_feature_of_three_models_reads_and_writes_its_own_alone(tmp_path):
    crosscoder = train(CONFIG, X, tmp_path, progress=False)
    for m, name in enumerate(NAMES):
        block = THREE.slice(f"{name}_exclusive")
        others = [i for i in range(3) if i != m]
        changed = X.clone()
        changed[:, others] += 5.0
        before, after = (crosscoder.preactivations(x)[:, block] for x in (X, changed))
        assert torch.equal(before, after)
        f = torch.zeros(1, 48)
        f[:, block] = 1.0
        moved = (crosscoder.decode(f) - crosscoder.decode(0 * f)).abs().amax((0, 2))
        assert moved[m] > 0
        assert (moved[others] == 0).all()


@needs_fork
@variants
def test_three_models_kill_9_at_random_steps_then_resume_gives_bit_identical_weights(
    tmp_path, monkeypatch, fields
):
    config = replace(CONFIG, **fields)
    monkeypatch.setattr(
        "tests.test_training.quiet", lambda c, d: train(c, X, d, progress=False)
    )  # in_child trains on these streams
    train(config, X, tmp_path / "whole", progress=False)
    killed = tmp_path / "killed"
    for i, step in enumerate(np.random.default_rng(0).choice(np.arange(1, 40), 4, replace=False)):
        ended = in_child(
            killed,
            config,
            lambda s=int(step), i=i: kill_at_call(torch.optim.Adam, "step", s % 11 + 1, i % 2 == 0),
        )
        assert ended == -signal.SIGKILL
    assert not (killed / "cfg.json").exists()
    train(config, X, killed, progress=False)
    expected = load_file(tmp_path / "whole" / "sae_weights.safetensors")
    found = load_file(killed / "sae_weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    metrics = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "killed")]
    assert metrics[0] == metrics[1]


@needs_fork
@pytest.mark.parametrize("nth", range(1, 10, 2))
def test_three_models_kill_9_around_file_writes_leaves_nothing_half_written(
    tmp_path, monkeypatch, nth
):
    monkeypatch.setattr("tests.test_training.quiet", lambda c, d: train(c, X, d, progress=False))
    train(CONFIG, X, tmp_path / "whole", progress=False)
    killed = tmp_path / "killed"
    ended = in_child(killed, CONFIG, lambda: kill_at_call(os, "replace", nth, nth % 4 == 1))
    assert ended == -signal.SIGKILL
    train(CONFIG, X, killed, progress=False)
    expected = load_file(tmp_path / "whole" / "sae_weights.safetensors")
    found = load_file(killed / "sae_weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# -- norms


def with_rows(rows, names=NAMES):
    """A plain crosscoder with given decoder rows (d_dict, n_models, d_model)."""
    rows = torch.tensor(rows)
    partition = replace(Partition.plain(len(rows), len(names)), model_names=tuple(names))
    crosscoder = Crosscoder.create(rows.shape[2], partition, 1)
    with torch.no_grad():
        crosscoder.W_dec.copy_(rows)
    return crosscoder


def test_nrn_by_hand():
    """The 1-norm, per feature, over the decoders asked for; NaN where there is nothing."""
    rows = [
        [[1.0, -1.0], [3.0, 0.0], [0.0, -5.0]],  # 2, 3, 5
        [[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]],
        [[4.0, 0.0], [0.0, 0.0], [-2.0, 2.0]],
        [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
    ]
    crosscoder = with_rows(rows)
    nrn = evolution.nrn(crosscoder, "RL", "base")
    torch.testing.assert_close(nrn[:3], torch.tensor([5 / 7, 1.0, 0.5]))
    assert torch.isnan(nrn[3])  # the SFT model's feature is neither's
    torch.testing.assert_close(evolution.nrn(crosscoder, "SFT", "base")[0], torch.tensor(0.6))
    with pytest.raises(KeyError, match="base"):
        evolution.nrn(crosscoder, "rl", "base")


def test_an_exclusive_block_has_nrn_one_for_its_model(tmp_path):
    crosscoder = train(CONFIG, X, tmp_path, progress=False)
    for name, other in itertools.permutations(NAMES, 2):
        block = evolution.nrn(crosscoder, name, other)[THREE.slice(f"{name}_exclusive")]
        assert torch.equal(block, torch.ones_like(block))


def test_a_plain_crosscoder_gives_a_planted_feature_to_its_model(tmp_path):
    """Free norms move: what only one model has ends up with most of its norm there."""
    config = replace(CONFIG, partition=PLAIN, steps=1500, lr=1e-2, shared_coef=0.0)
    x = planted(2000)
    crosscoder = train(config, x, tmp_path, progress=False)
    live = (crosscoder.encode(x) > 0).float().mean(0) > 0.01
    norms = crosscoder.W_dec.abs().sum(-1)[live]
    assert ((norms / norms.sum(1, keepdim=True)).amax(0) > 0.8).all()


# -- overlap


def test_top_specific_takes_the_highest_live_scores_and_ties_by_index():
    score = torch.tensor([0.9, 0.5, 0.7, float("nan"), 0.7, 0.7])
    live = torch.tensor([False, True, True, True, True, True])
    assert evolution.top_specific(score, 2, live).tolist() == [2, 4]
    assert evolution.top_specific(score, 4, live).tolist() == [1, 2, 4, 5]


def test_overlap_is_a_share_of_the_smaller_set():
    a, b = torch.arange(10), torch.arange(6, 16)
    assert evolution.overlap(a, b) == 0.4
    assert evolution.overlap(a, a[:5]) == 1.0
    assert evolution.overlap(a, a[:0]) == 0.0


# -- streams


@pytest.fixture(scope="module")
def models():
    return {"base": qwen(0), "RL": qwen(1)}


@pytest.fixture
def caches(models, tmp_path, monkeypatch):
    monkeypatch.setattr(evolution, "load_model", lambda source, device: models[source])
    texts = [[3, 4, 5, 6], [7, 8, 9]]
    sources = {"base": "base", "RL": "RL"}
    return evolution.cache_models(sources, texts, 1, tmp_path / "acts", progress=False)


def test_streams_are_the_models_residuals_side_by_side(models, caches):
    streams = evolution.Streams((caches["RL"], caches["base"]))
    assert streams.n == 5
    for m, name in enumerate(("RL", "base")):
        expected = torch.cat(
            [residual(models[name], 1, torch.tensor([t]))[0, 1:] for t in ([3, 4, 5, 6], [7, 8, 9])]
        )
        torch.testing.assert_close(
            streams.gather(np.arange(5))[:, m], expected, atol=1e-5, rtol=1e-5
        )
    assert streams.key != evolution.Streams((caches["base"], caches["RL"])).key


def test_noisy_copies_have_the_noise_asked_for_and_repeat(caches):
    base = caches["base"]
    clean = evolution.Streams((base, base, base))
    noisy = evolution.Streams((base, base, base), noise=(0.0, 2.0, 5.0), seed=1)
    difference = noisy.gather(np.arange(5)) - clean.gather(np.arange(5))
    assert (difference[:, 0] == 0).all()
    rms = noisy._noise.square().sum(-1).mean(0).sqrt()
    torch.testing.assert_close(rms, torch.tensor([0.0, 2.0, 5.0]), rtol=0.01, atol=0)
    torch.testing.assert_close(difference, noisy._noise[:5], atol=1e-5, rtol=0)
    keys = {clean.key, noisy.key, replace(noisy, seed=2).key, replace(noisy, noise=(0, 2, 4)).key}
    assert len(keys) == 4


def test_caches_that_do_not_fit_are_refused(models, caches, tmp_path, monkeypatch):
    monkeypatch.setattr(evolution, "load_model", lambda source, device: models[source])
    other = evolution.cache_models(
        {"base": "base"}, [[3, 4, 5, 7], [7, 8, 9]], 1, tmp_path / "b", progress=False
    )
    with pytest.raises(ValueError, match="not of the same tokens"):
        evolution.Streams((caches["RL"], other["base"]))


# -- the compact set


def test_own_code_puts_every_other_stream_at_its_mean(tmp_path):
    crosscoder = train(replace(CONFIG, partition=PLAIN), X, tmp_path, progress=False)
    filled = crosscoder.normaliser.mean.expand_as(X).clone()
    filled[:, 2] = X[:, 2]
    found = evolution.own_code(crosscoder, X[:, 2], "RL")
    assert torch.equal(found, crosscoder.encode(filled))
    assert not torch.equal(found, crosscoder.encode(X))


def test_answer_codes_average_over_the_tokens_that_decide_the_answer(models):
    pair = Pair(models, None, 1)
    partition = replace(Partition.plain(20), model_names=("base", "RL"))
    stats = Normaliser(torch.randn(2, 32), torch.ones(2))
    crosscoder = Crosscoder.create(32, partition, 5, stats)
    texts, starts = [[3, 4, 5, 6, 7], [8, 9, 10]], [3, 2]
    found = evolution.answer_codes(crosscoder, pair, "RL", texts, starts)
    h = residual(models["RL"], 1, torch.tensor([texts[0]]))[0, 2:4]  # predict tokens 3 and 4
    torch.testing.assert_close(found[0], evolution.own_code(crosscoder, h, "RL").mean(0))
    swapped = evolution.answer_codes(crosscoder, pair, "RL", texts, starts, slot="base")
    torch.testing.assert_close(swapped[0], evolution.own_code(crosscoder, h, "base").mean(0))
    assert found.shape == (2, 20)


def test_selection_by_hand():
    """At least a fifth of the largest mean, family by family, then common to all."""
    gain = torch.tensor(
        [
            [10.0, 2.0, 1.9, -9.0, 0.0],  # food
            [10.0, 2.0, 2.0, 0.0, 0.0],
            [1.0, 5.0, 0.0, 5.0, 0.0],  # music
        ]
    )
    sets, common = evolution.select_by_family(gain, ["food", "food", "music"])
    assert {name: s.tolist() for name, s in sets.items()} == {"food": [0, 1], "music": [0, 1, 3]}
    assert common.tolist() == [0, 1]
    sets, common = evolution.select_by_family(gain, ["food", "food", "music"], share=0.5)
    assert {name: s.tolist() for name, s in sets.items()} == {"food": [0], "music": [1, 3]}
    assert common.tolist() == []
    assert evolution.select(-gain[0].abs()).tolist() == []


def test_half_overlaps_tell_families_that_share_from_families_that_do_not():
    """Family x has features 0 and 1; y shares them, z has 2 and 3; all with a little noise."""
    generator = torch.Generator().manual_seed(0)
    own = {"x": [0, 1], "y": [0, 1], "z": [2, 3]}
    names = [name for name in own for _ in range(20)]
    gain = 0.01 * torch.rand(60, 6, generator=generator)
    for row, name in zip(gain, names, strict=True):
        row[own[name]] += 1
    rng = np.random.default_rng(0)
    found = evolution.half_overlaps(gain, names, rng, (gain, names), resample=True)
    assert found["within"] == 1
    assert found["between"] == found["contrast"] == pytest.approx(1 / 3)  # x and y, of six pairs
    assert found["size"] == 2
    permuted = evolution.half_overlaps(gain, rng.permutation(names), rng, (gain, names))
    assert permuted["between"] == pytest.approx(permuted["within"]) == 1


def test_matched_sets_are_as_large_disjoint_allowed_and_of_like_activation():
    activation = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1, 1.2, 5.0, 5.1, 5.2, 9.0])
    chosen, allowed = torch.tensor([1, 4, 7]), torch.ones(10, dtype=torch.bool)
    allowed[9] = False
    draws = evolution.matched_sets(chosen, activation, allowed, 50, seed=0, nearest=2)
    assert {d for draw in draws for d in draw} == {0, 2, 3, 5, 6, 8}
    for draw in draws:  # one near each: 0 or 2, 3 or 5, 6 or 8
        assert [bool(activation[i] > 0.9) for i in draw] == [False, True, True]
        assert [bool(activation[i] > 4) for i in draw] == [False, False, True]
    assert len(set(draws)) > 4
    assert draws == evolution.matched_sets(chosen, activation, allowed, 50, seed=0, nearest=2)
    anywhere = evolution.matched_sets(chosen, activation, allowed, 50, nearest=None)
    assert {d for draw in anywhere for d in draw} == {0, 2, 3, 5, 6, 8}
    assert len({tuple(activation[list(draw)] > 4) for draw in anywhere}) > 1  # not matched
    with pytest.raises(ValueError, match="2 other features are allowed for 3"):
        evolution.matched_sets(chosen, activation, torch.arange(10) < 3, 1)


# -- forgetting


def test_on_text_is_each_models_likelihood_and_divergence_from_the_first(models, monkeypatch):
    monkeypatch.setattr(evolution, "_BATCH", 2)
    texts = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13]]
    table = evolution.on_text(models, texts)
    assert table.text.tolist() == [0, 0, 1, 1, 2, 2]
    for i, text in enumerate(texts):
        logp = {
            name: model(torch.tensor([text])).logits[0, :-1].detach().log_softmax(-1)
            for name, model in models.items()
        }
        for name in models:
            row = table[(table.text == i) & (table.model == name)].iloc[0]
            nll = -logp[name].gather(1, torch.tensor(text[1:])[:, None]).mean()
            kl = (logp["base"].exp() * (logp["base"] - logp[name])).sum(-1).mean()
            assert row.n == len(text) - 1
            assert row.nll == pytest.approx(float(nll), rel=1e-4)
            assert row.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert (table[table.model == "base"].kl == 0).all()
    assert (table[table.model == "RL"].kl > 0).all()
