"""Training runs: reproducible to the bit, killable at any moment, and equal to a plain loop."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dfc_lib import profiles, provenance, store
from dfc_lib.crosscoder import loop, losses, partition, recipes, training
from dfc_lib.crosscoder.batches import Batches
from dfc_lib.crosscoder.fidelity import fidelity
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.crosscoder.recipes import Recipe
from dfc_lib.crosscoder.training import (
    Job,
    TrainConfig,
    config_key,
    get_all,
    run_directory,
    train,
)
from dfc_lib.data import activations
from dfc_lib.data.pair import Pair
from tests.test_crosscoder import dense_loss
from tests.test_pair import qwen

D_MODEL, N = 8, 150
CONFIG = TrainConfig(
    Partition.dedicated(48, 0.125), k=4, steps=40, batch_size=32, lr=5e-3,
    exclusive_coef=1e-3, dead_steps=3, log_every=1, checkpoint_every=7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Bits repeat for one number of threads; and a forked child may not use OpenMP's pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n=N, seed=0):
    """Two streams of sparse combinations of shared directions, raw scale, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, D_MODEL, generator=generator)
    code = (torch.rand(n, 20, generator=generator) < 0.1) * (
        1 + torch.rand(n, 20, generator=generator)
    )
    noise = 0.05 * torch.randn(n, 2, D_MODEL, generator=generator)
    only_a = code.clone()
    only_a[:, :3] = 0
    return torch.stack([code @ directions * 3 + 1, only_a @ directions - 2], dim=1) + noise


X = planted()


def quiet(config, directory, activations=X, **kwargs):
    return train(config, activations, directory, progress=False, **kwargs)


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


def weights(directory):
    return load_file(directory / "sae_weights.safetensors")


def metrics_of(directory):
    return pd.read_csv(directory / "metrics.csv")


def assert_same_run(directory, expected):
    """The same weights to the last bit, and the same metrics to the last character."""
    found = weights(directory)
    for name, tensor in weights(expected).items():
        assert torch.equal(found[name], tensor), name
    assert (directory / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


# -- killed and resumed


def in_child(directory, config, sabotage):
    """Train in a forked process that ``sabotage`` makes kill itself; how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            sabotage()
            quiet(config, directory)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_call(target, name, n, before=True):
    """``kill -9`` this process at the n-th call of ``target.name``, before or after its work."""
    original, calls = getattr(target, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, wrapped)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"batchtopk": True},
        {"tie_shared": True, "normalise": "zscore_unstored"},
        recipes.anchored(40),
    ],
    ids=["topk", "batchtopk", "tied-zscore", "anchored"],
)
def test_kill_9_at_random_steps_then_resume_gives_bit_identical_weights(tmp_path, fields):
    config = changed(**fields)
    quiet(config, tmp_path / "whole")
    steps = np.random.default_rng(0).choice(np.arange(1, 40), 5, replace=False)
    for i, step in enumerate(steps):  # each kill hits the run that the last one left
        ended = in_child(
            tmp_path / "killed",
            config,
            lambda s=int(step), i=i: kill_at_call(torch.optim.Adam, "step", s % 11 + 1, i % 2 == 0),
        )
        assert ended == -signal.SIGKILL
    assert not (tmp_path / "killed" / "cfg.json").exists()
    quiet(config, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@needs_fork
@pytest.mark.parametrize("nth", range(1, 10))
def test_kill_9_around_every_file_write_leaves_nothing_half_written(tmp_path, nth):
    """Before and after each rename: run, states, metrics, weights and configuration in turn."""
    quiet(CONFIG, tmp_path / "whole")
    killed = tmp_path / "killed"
    ended = in_child(killed, CONFIG, lambda: kill_at_call(os, "replace", nth, nth % 2 == 0))
    assert ended == -signal.SIGKILL
    quiet(CONFIG, killed)
    assert_same_run(killed, tmp_path / "whole")
    expected = ["cfg.json", "metrics.csv", "run.json", "sae_weights.safetensors"]
    assert [
        f for f in sorted(os.listdir(killed)) if f.endswith((".json", ".csv", "ors"))
    ] == expected


@needs_fork
def test_kill_9_from_outside_at_any_moment(tmp_path):
    config = changed(steps=300)
    quiet(config, tmp_path / "whole")
    killed, delays = tmp_path / "killed", np.random.default_rng(1)
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            quiet(config, killed)
            os._exit(0)
        time.sleep(delays.uniform(0.05, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    quiet(config, killed)
    assert_same_run(killed, tmp_path / "whole")


def test_how_often_the_state_is_written_does_not_change_the_run(tmp_path):
    quiet(CONFIG, tmp_path / "often")
    quiet(changed(checkpoint_every=1000), tmp_path / "never")
    assert_same_run(tmp_path / "often", tmp_path / "never")


def test_a_damaged_state_file_is_refused_by_name(tmp_path, monkeypatch):
    run = loop.Run(CONFIG, Batches(CONFIG, X, None), tmp_path)
    run.resume()
    for step in range(3):
        run.train_step(run.batches.batch(step))
    run.checkpoint()
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*delete it"):
        quiet(CONFIG, tmp_path)


# -- the run itself


def plain_loop(config, x):
    """The same run with dense autograd and an unfused Adam; nothing taken from ``training``."""
    crosscoder = Crosscoder.create(
        D_MODEL, config.partition, config.k, Normaliser.fit(x), dtype="float64",
        tie_shared=config.tie_shared, init_seed=config.seed,
    )  # fmt: skip
    optimiser = torch.optim.Adam(crosscoder.parameters(), config.lr, foreach=False)
    order = np.concatenate(
        [np.random.default_rng([config.seed, e]).permutation(len(x)) for e in range(20)]
    )
    silent = torch.zeros(config.partition.dict_size)
    for step in range(config.steps):
        batch = x[order[step * config.batch_size : (step + 1) * config.batch_size]]
        optimiser.zero_grad()
        total = dense_loss(
            crosscoder, batch, config.shared_coef, config.exclusive_coef, config.variant,
            dead=silent >= config.dead_steps, aux_coef=config.aux_coef,
        )  # fmt: skip
        fired = (crosscoder.encode(batch) > 0).any(0)
        total.backward()
        crosscoder.constrain_grads_()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), loop.CLIP_NORM)
        optimiser.step()
        silent = torch.where(fired, 0, silent + 1)
    return crosscoder


@pytest.mark.parametrize(
    ("fields", "clip_norm"),
    [
        ({}, 1.0),
        ({"variant": "published", "shared_coef": 1e-2}, 1.0),
        ({"tie_shared": True, "shared_coef": 1e-2}, 1.0),
        ({"aux_coef": 1.0}, 1e-2),
    ],
    ids=["default", "published", "tied", "clipped-aux"],
)
def test_the_fast_loop_trains_to_the_weights_of_a_plain_dense_loop(
    tmp_path, monkeypatch, fields, clip_norm
):
    monkeypatch.setattr(loop, "CLIP_NORM", clip_norm)
    config = changed(dtype="float64", **fields)
    fast, plain = quiet(config, tmp_path), plain_loop(config, X.double())
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], expected, rtol=1e-6, atol=1e-8)
    if config.aux_coef and config.variant != "published":
        assert metrics_of(tmp_path)["aux"].max() > 0  # the auxiliary loss did take part


def test_forbidden_weights_gradients_and_moments_are_exactly_zero_after_training_and_resume(
    tmp_path,
):
    config = changed(shared_coef=1e-3, aux_coef=1.0)
    data = Batches(config, X, None)
    runs = [loop.Run(config, data, tmp_path)]
    training._claim(tmp_path, config)
    runs[0].resume()
    for step in range(20):
        runs[0].train_step(data.batch(step))
    runs[0].checkpoint()
    runs.append(loop.Run(config, data, tmp_path))
    runs[1].resume()
    assert runs[1].step == 20
    runs[1].train_step(data.batch(20))
    runs[1].crosscoder = copy.deepcopy(runs[1].crosscoder)
    for run in runs:
        for name in ("encoder", "decoder"):
            param = run.params[name]
            state = run.optimiser.state[param]
            copied = getattr(run.crosscoder, name)
            for tensor in (param, copied, param.grad, state["exp_avg"], state["exp_avg_sq"]):
                assert (tensor != 0).any()
                rows = tensor.detach().unflatten(1, (2, D_MODEL))
                assert config.partition.largest_forbidden(rows) == 0.0
    final = quiet(config, tmp_path)
    assert final.integrity() == {"encoder": 0.0, "decoder": 0.0, "tied": 0.0}


def test_tied_rows_are_exactly_equal_and_untied_ones_are_not(tmp_path):
    shared = CONFIG.partition.slice("shared")
    tied = quiet(changed(tie_shared=True), tmp_path / "tied")
    untied = quiet(CONFIG, tmp_path / "untied")
    assert torch.equal(tied.W_dec[shared, 0], tied.W_dec[shared, 1])
    assert not torch.equal(tied.W_enc[0, :, shared], tied.W_enc[1, :, shared])  # encoders stay free
    assert not torch.equal(untied.W_dec[shared, 0], untied.W_dec[shared, 1])


def test_an_anchored_dfc_writes_the_difference_with_its_exclusive_features_alone(tmp_path):
    crosscoder = quiet(changed(**recipes.anchored(CONFIG.steps)), tmp_path)
    assert crosscoder.integrity() == {"encoder": 0.0, "decoder": 0.0, "tied": 0.0}
    scale, mean = crosscoder.normaliser.scale, crosscoder.normaliser.mean
    assert torch.equal(scale[0], scale[1])
    assert torch.equal(mean[0], mean[1])
    code = crosscoder.encode(X)
    of_a, of_b = crosscoder.decode(code).unbind(1)
    own = [
        code[:, crosscoder.partition.slice(f"{m}_exclusive")]
        @ crosscoder.decoder_rows(m, crosscoder.partition.slice(f"{m}_exclusive"))
        for m in "AB"
    ]
    torch.testing.assert_close(of_a - of_b, own[0] - own[1], rtol=1e-4, atol=1e-4)
    assert crosscoder.reserved == []  # in use there is one top k


def test_the_difference_term_is_the_share_that_is_left_and_nothing_where_models_are_equal():
    normaliser = Normaliser.fit(X, pooled=True)
    crosscoder = Crosscoder.create(D_MODEL, CONFIG.partition, CONFIG.k, normaliser, tie_shared=True)
    forward = crosscoder.forward_sparse(X)
    z = forward.z.view(len(X), 2, D_MODEL)
    gap, z_hat = z[:, 0] - z[:, 1], forward.reconstruction.view(z.shape)
    variance = normaliser.variance_of_differences(X, 1)
    torch.testing.assert_close(variance, torch.tensor([float(gap.var(0, False).mean()), 0.0]))
    found = losses.terms(
        crosscoder, forward, "exclusive_only", differences=losses.Differences(1, variance)
    )["difference"]
    left = (gap - (z_hat[:, 0] - z_hat[:, 1])).square().mean() / gap.var(0, False).mean()
    torch.testing.assert_close(found, left)
    same = X[:, :1].expand_as(X)
    nothing = losses.Differences(1, normaliser.variance_of_differences(same, 1))
    term = losses.terms(
        crosscoder, crosscoder.forward_sparse(same), "exclusive_only", differences=nothing
    )["difference"]
    term.backward()
    assert float(term.detach()) == 0
    assert bool(torch.isfinite(crosscoder.decoder.grad).all())


def test_a_reserved_block_has_its_place_for_as_long_as_it_is_reserved(tmp_path):
    config = changed(**recipes.anchored(CONFIG.steps) | {"log_every": 1, "aux_coef": 0.0})
    run, a = (
        loop.Run(config, Batches(config, X, None), tmp_path),
        config.partition.slice("A_exclusive"),
    )
    run.resume()
    assert config.reserved == [a]
    for step in range(config.reserved_steps + 1):
        run.train_step(run.batches.batch(step))
        pattern = run.crosscoder.forward_sparse(X).pattern
        in_a = ((pattern.feature >= a.start) & (pattern.feature < a.stop)).float()
        per_sample = in_a.view(len(X), config.k).sum(1)
        if step < config.reserved_steps:
            assert bool((per_sample == 1).all())
    assert not bool((per_sample == 1).all())


def test_every_epoch_visits_every_sample_once_and_steps_are_reproducible_in_any_order():
    data = Batches(CONFIG, X, None)
    steps = [data.indices(s) for s in range(15)]  # 480 samples: three epochs of 150 and a bit
    again = [Batches(CONFIG, X, None).indices(s) for s in reversed(range(15))]
    assert all((a == b).all() for a, b in zip(steps, reversed(again), strict=True))
    counts = np.bincount(np.concatenate(steps), minlength=N)
    assert counts.min() >= 3
    assert counts.max() <= 4
    assert not (data.indices(0) == Batches(changed(seed=1), X, None).indices(0)).all()


def test_a_source_and_a_tensor_train_the_same_crosscoder(tmp_path):
    class Source:
        n = N

        def gather(self, indices):
            return X[torch.as_tensor(indices)]

    expected = quiet(CONFIG, tmp_path / "tensor").encoder
    assert torch.equal(quiet(CONFIG, tmp_path / "source", Source()).encoder, expected)


def test_the_published_protocol_zscores_per_dataset_and_model_and_stores_nothing(tmp_path):
    labels = np.arange(N) % 2 + 5
    x = X + 10.0 * torch.as_tensor(labels == 5)[:, None, None]
    z = torch.empty_like(x)
    for label in (5, 6):
        rows = x[labels == label]
        z[labels == label] = (rows - rows.mean(0)) / rows.std(0)
    config = changed(normalise="zscore_unstored", variant="published", lr=1e-3)
    found = Batches(config, x, labels).batch(3)
    expected = z[Batches(config, x, labels).indices(3)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    crosscoder = quiet(config, tmp_path, x, labels=labels)
    assert crosscoder.normaliser.is_identity
    fve = fidelity(crosscoder, z).fve[:2]
    assert (fve > fidelity(crosscoder, x).fve[:2] + 0.1).all()  # raw in: the scale is missing


def test_metrics_are_those_of_the_step_and_losses_fall(tmp_path):
    config = changed(steps=300, lr=1e-2, log_every=50, shared_coef=1e-4)
    crosscoder = quiet(config, tmp_path)
    metrics = metrics_of(tmp_path)
    assert metrics["step"].tolist() == [1, 50, 100, 150, 200, 250, 300]
    assert metrics["mse"].iloc[-1] < 0.5 * metrics["mse"].iloc[0]

    first = Crosscoder.create(D_MODEL, config.partition, config.k, Normaliser.fit(X))
    x = Batches(config, X, None).batch(0)
    total, terms = first.loss(x, 1e-4, 1e-3, "exclusive_only")
    z, f = first.normaliser.apply(x), first.encode(x)
    error = z - first.normaliser.apply(first.decode(f))
    fve = 1 - error.square().sum((0, 2)) / (z - z.mean(0)).square().sum((0, 2))
    row = metrics.iloc[0]
    expected = {"loss": total, **terms, "fve_A": fve[0], "fve_B": fve[1]}
    for block, features in config.partition.slices.items():
        expected[f"l0_{block}"] = (f[:, features] > 0).sum(-1).float().mean()
        expected[f"dead_{block}"] = 0.0
    for name, value in expected.items():
        value = float(torch.as_tensor(value).detach())
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    l0 = metrics[[f"l0_{b}" for b in config.partition.names]].sum(axis=1)
    assert l0.max() <= config.k
    final = fidelity(crosscoder, X).fve[:2].to_numpy()
    np.testing.assert_allclose(metrics[["fve_A", "fve_B"]].iloc[-1], final, atol=0.1)


def test_fidelity_by_hand(tmp_path, monkeypatch):
    crosscoder = quiet(CONFIG, tmp_path)
    x, table = planted(seed=3), None
    for batch_size in (7, 4096):
        monkeypatch.setattr(partition, "BATCH", batch_size)
        table = fidelity(crosscoder, x)
        error, spread = crosscoder.error(x), x - x.mean(0)
        fve = 1 - error.square().sum((0, 2)) / spread.square().sum((0, 2))
        np.testing.assert_allclose(table.fve[:2], fve.numpy(), rtol=1e-4)
        active = crosscoder.encode(x) > 0
        for i, features in enumerate(CONFIG.partition.slices.values()):
            assert table.l0[2 + i] == pytest.approx(
                float(active[:, features].sum(-1).float().mean())
            )
            dead = float((~active[:, features].any(0)).float().mean())
            assert table.dead_share[2 + i] == pytest.approx(dead)
    assert table.name.tolist() == ["A", "B", "A_exclusive", "B_exclusive", "shared"]


def test_three_models_train(tmp_path):
    x = torch.cat([X, X[:, :1] * 2], dim=1)
    config = changed(partition=Partition.dedicated(48, 0.1, ("RL", "SFT", "base")))
    crosscoder = quiet(config, tmp_path, x)
    assert {"fve_RL", "fve_SFT", "fve_base", "l0_base_exclusive"} <= set(metrics_of(tmp_path))
    crosscoder.check_integrity()


# -- one way to get a crosscoder


def test_a_crosscoder_is_trained_once_and_again_for_a_changed_config_or_data_key(tmp_path):
    calls = []

    def get(config, data_key):
        return get_all({0: Job(config, activations, data_key)}, tmp_path, progress=False)[0]

    def activations():
        calls.append(1)
        return X

    first, second = get(CONFIG, "data-1"), get(CONFIG, "data-1")
    assert len(calls) == 1
    assert torch.equal(first.encoder, second.encoder)
    assert (run_directory(CONFIG, tmp_path, "data-1") / "metrics.csv").is_file()
    get(changed(seed=1), "data-1")
    get(CONFIG, "data-2")
    assert len(calls) == 3
    assert len([p for p in (tmp_path / "crosscoders").iterdir() if p.is_dir()]) == 3


def test_the_key_ignores_what_cannot_change_the_weights_and_nothing_else():
    key = config_key(CONFIG, "data")
    assert key == config_key(changed(checkpoint_every=1, device="cuda"), "data")
    values = {
        "partition": Partition.plain(48), "k": 5, "batchtopk": True, "tie_shared": True,
        "steps": 41, "batch_size": 33, "lr": 1e-4, "shared_coef": 1.0, "exclusive_coef": 1.0,
        "variant": "published", "aux_coef": 0.0, "dead_steps": 4,
        "normalise": "zscore_unstored", "seed": 1, "log_every": 2,
        "dtype": "float64", "tie_bias": True, "reference": "B", "difference_coef": 0.1,
        "reserved_steps": 5,
    }  # fmt: skip
    assert values.keys() == {f.name for f in dataclasses.fields(CONFIG)} - {
        "checkpoint_every",
        "device",
    }
    compared = {"difference_coef": {"reference": "B"}, "reserved_steps": {"reference": "B"}}
    keys = {
        config_key(changed(**{name: value} | compared.get(name, {})), "data")
        for name, value in values.items()
    }
    assert len(keys | {key}) == len(values) + 1


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    quiet(CONFIG, tmp_path)
    again = quiet(changed(checkpoint_every=3), tmp_path)  # decides no weight: the same run
    assert torch.equal(again.encoder, quiet(CONFIG, tmp_path).encoder)
    for spoil in (
        lambda: quiet(changed(k=3, lr=1e-4), tmp_path),
        lambda: ((tmp_path / "run.json").write_text("{"), quiet(CONFIG, tmp_path)),
        lambda: ((tmp_path / "run.json").unlink(), quiet(CONFIG, tmp_path)),
    ):
        with pytest.raises(
            ValueError, match=r"holds another run, or its run\.json is missing or damaged"
        ) as e:
            spoil()
        assert str(tmp_path) in str(e.value)


def test_a_finished_run_is_returned_without_training(tmp_path, monkeypatch):
    expected = quiet(CONFIG, tmp_path).encoder
    monkeypatch.setattr(loop.Run, "train_step", lambda *_: pytest.fail("trained again"))
    assert torch.equal(quiet(CONFIG, tmp_path).encoder, expected)
    assert json.loads((tmp_path / "run.json").read_text()) == CONFIG.to_dict()


# -- bad input


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "paper"}, {"normalise": "zscore"}, {"dtype": "bfloat16"}, {"steps": 0},
        {"k": 0}, {"batch_size": 0}, {"log_every": 0},
        {"reference": "", "difference_coef": 0.1}, {"reference": "C", "reserved_steps": 5},
        {"k": 1, "reference": "B", "reserved_steps": 5},
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused_by_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        changed(**fields)


@pytest.mark.parametrize("x", [X[:, :1], X[:, 0], torch.cat([X, X], 1), X[:0]])
def test_activations_of_the_wrong_shape_are_refused(tmp_path, x):
    with pytest.raises(ValueError, match=r"activations"):
        quiet(CONFIG, tmp_path, x)


def test_labels_of_the_wrong_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"labels have shape"):
        quiet(changed(normalise="zscore_unstored"), tmp_path, labels=np.zeros(3))


def test_a_diverging_run_stops_with_the_step_and_the_learning_rate(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step \d+ .*lower lr"):
        quiet(changed(lr=1e30), tmp_path)


def jobs_of(configs):
    return {name: Job(config, X, "x") for name, config in configs.items()}


def test_many_crosscoders_side_by_side_are_the_same_as_one_by_one(tmp_path):
    configs = {seed: changed(seed=seed) for seed in range(5)}
    together = get_all(jobs_of(configs), tmp_path / "together", 3, progress=False)
    assert list(together) == list(configs)
    for seed, config in configs.items():
        alone = quiet(config, tmp_path / str(seed))
        for one, other in zip(alone.parameters(), together[seed].parameters(), strict=True):
            assert torch.equal(one, other)


def test_two_that_want_one_run_train_it_once(tmp_path, monkeypatch):
    """A sweep beside a notebook: the second waits, and finds the run finished."""
    begun, run = [], loop.run

    def counted(*args):
        begun.append(args)
        run(*args)

    monkeypatch.setattr(loop, "run", counted)
    jobs = jobs_of({"first": CONFIG, "second": CONFIG})
    first, second = get_all(jobs, tmp_path, 2, progress=False).values()
    assert len(begun) == 1
    assert torch.equal(first.W_dec, second.W_dec)


def test_what_another_process_trains_comes_last(tmp_path):
    """Two notebooks that want the same crosscoders share the work; neither stands still."""
    jobs = jobs_of({seed: changed(seed=seed) for seed in range(3)})
    folders = [run_directory(job.config, tmp_path, "x") for job in jobs.values()]
    others = store.lock(folders[0].with_name(f".{folders[0].name}.lock"))
    with ThreadPoolExecutor() as pool:
        with others:
            found = pool.submit(get_all, jobs, tmp_path, 1, False)
            while not all((folder / "cfg.json").is_file() for folder in folders[1:]):
                assert not found.done()
                time.sleep(0.01)
            assert not (folders[0] / "cfg.json").is_file()
        assert list(found.result()) == [0, 1, 2]


def test_many_crosscoders_stop_at_the_first_that_fails(tmp_path):
    jobs = jobs_of({"bad": changed(lr=1e30)})
    jobs |= jobs_of({i: changed(seed=i) for i in range(5)})
    with pytest.raises(FloatingPointError, match="lower lr"):
        get_all(jobs, tmp_path, 1, progress=False)
    assert len(list(tmp_path.glob("crosscoders/*/cfg.json"))) < 5
    del jobs["bad"]
    assert len(get_all(jobs, tmp_path, 2, progress=False)) == 5


# -- provenance: what retrains what

LIBRARY = Path(training.__file__).parents[1]
CALIBRATED, PUBLISHED = changed(), changed(variant="published", aux_coef=0.0)
MAKES_CACHES = ("dfc_lib.data.activations",)


def keys_after(root, module="", old="", new=""):
    """Keys of a calibrated crosscoder, a published one, and the caches, in an edited library."""
    path = root / "dfc_lib"
    shutil.copytree(LIBRARY, path, ignore=shutil.ignore_patterns("__pycache__"))
    if module:
        source = (path / module).read_text()
        assert source.count(old) == 1, old
        (path / module).write_text(source.replace(old, new))
    library = provenance.Library(root)

    def code(*modules):
        reached = library.closure(f"import {name}" for name in modules)
        return tuple(library.fingerprint(name) for name in reached)

    run = (training.LOOP, training.PENALTIES["exclusive_only"])
    published = (training.LOOP, training.PENALTIES["published"])
    return np.array([hash(code(*run)), hash(code(*published)), hash(code(*MAKES_CACHES))])


@pytest.mark.parametrize(
    ("module", "old", "new", "changes"),
    [
        # one operation: of every loss, of one penalty, of a kernel, of the optimiser
        ("crosscoder/losses.py", "aux_coef * terms", "2 * aux_coef * terms", (True, True, False)),
        ("crosscoder/penalty_published.py", "return 1.0", "return 2.0", (False, True, False)),
        ("crosscoder/penalty_exclusive_only.py", "not in", "in", (True, False, False)),
        ("crosscoder/kernels.py", "norms.sum(dim=-1)", "norms.mean(dim=-1)", (True, True, False)),
        ("crosscoder/loop.py", "torch.optim.Adam(", "torch.optim.AdamW(", (True, True, False)),
        # words
        ("crosscoder/losses.py", "pull at them", "tug at them", (False, False, False)),
        ("crosscoder/losses.py", "The total loss", "The sum", (False, False, False)),
        # what finds, reads or describes a crosscoder
        ("crosscoder/training.py", "min(workers", "min(2 * workers", (False, False, False)),
        ("crosscoder/checkpoint.py", '"n_a": 0', '"n_a": 1', (False, False, False)),
        ("crosscoder/fidelity.py", "1 - residual", "2 - residual", (False, False, False)),
        ("crosscoder/recipes.py", '"k": profile.k', '"k": profile.k + 1', (False, False, False)),
    ],
)  # fmt: skip
def test_an_edit_gives_other_keys_to_what_it_touches_and_to_nothing_else(
    tmp_path, module, old, new, changes
):
    before = keys_after(tmp_path / "before")
    after = keys_after(tmp_path / "after", module, old, new)
    assert tuple(before != after) == changes


def test_the_key_of_a_run_holds_the_code_of_its_loop_and_of_its_own_penalty(monkeypatch):
    penalties = training.PENALTIES
    assert set(penalties) == set(training.loop.losses.VARIANTS)
    for variant, module in penalties.items():
        assert training.loop.losses.penalty(variant).__name__ == module
    root = LIBRARY.parent  # what opens a study depends on both: a notebook is stale with either
    assert set(penalties.values()) <= set(
        provenance.Library(root).closure(["from dfc_lib.study import Study"])
    )
    before = [config_key(c, "data") for c in (CALIBRATED, PUBLISHED)]
    hashed = []
    monkeypatch.setattr(provenance, "code_hash", lambda *m: hashed.append(m) or "other code")
    assert all(config_key(c, "data") not in before for c in (CALIBRATED, PUBLISHED))
    assert hashed == [(training.LOOP, penalties[v]) for v in ("exclusive_only", "published")]


@pytest.mark.parametrize("before", [1, 2])
def test_a_small_run_does_not_depend_on_the_number_of_threads(tmp_path, before):
    config = changed(batch_size=64, partition=Partition.dedicated(256, 0.1), k=8)
    x = torch.randn(300, 2, 32, generator=torch.Generator().manual_seed(3))
    usual = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        crosscoder = train(config, x, tmp_path / "a", progress=False)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(usual)
    again = train(config, x, tmp_path / "b", progress=False)
    assert torch.equal(crosscoder.W_dec, again.W_dec)


def test_a_recipe_trains_from_its_cache_and_the_protocols_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    pair = Pair({"A": qwen(0), "B": qwen(1)}, None, 1)
    ids = [[3 + (i * j) % 40 for j in range(1, 9)] for i in range(24)]
    meta = pd.DataFrame({"source": ["tool"] * 12 + ["neutral"] * 12})
    for name, positions in (("train_all", "all"), ("train_last", "last")):
        activations.cache(
            pair, ids, tmp_path / "smoke" / "activations" / name, positions=positions, meta=meta
        )
    profile = dataclasses.replace(profiles.get("smoke"), dict_size=20, k=2, steps=3, batch_size=8)
    recipes = {
        "calibrated": Recipe(profile),
        "published": Recipe(profile, "published", "last"),
        "tied": Recipe(profile, tie_shared=True, vectors="last"),
    }
    assert recipes["calibrated"].activations.positions == "all"
    assert recipes["published"].activations.positions == "last"
    jobs = {name: recipe.job(seed=1) for name, recipe in recipes.items()}
    found = get_all(jobs, tmp_path / "smoke", progress=False)
    assert not found["calibrated"].normaliser.is_identity
    assert found["published"].normaliser.is_identity
    assert found["calibrated"].cfg.tie_shared is False
    assert found["tied"].cfg.tie_shared is True
    assert recipes["tied"].metrics(seed=1).step.tolist() == [1, 3]
    with pytest.raises(ValueError, match="protocol='other'"):
        Recipe(profile, "other")
    with pytest.raises(ValueError, match="anchored=True"):
        Recipe(profile, "published", anchored=True)
