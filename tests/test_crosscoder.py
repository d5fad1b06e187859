"""The crosscoder: what its partition, scale, loss, gradients and files promise."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from dfc_lib.crosscoder import kernels, losses, partition
from dfc_lib.crosscoder.checkpoint import load, load_published
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Block, Normaliser, Partition

DFC = Partition.dedicated(40, 0.15)  # 6 + 6 + 28
PLAIN = Partition.plain(40)
THREE = Partition.dedicated(40, 0.1, ("RL", "SFT", "base"))
WITH_PAIR = Partition(  # a block that belongs to two of three models
    ("A", "B", "C"),
    (Block("A_exclusive", 8, (0,)), Block("AB", 12, (0, 1)), Block("shared", 20, (0, 1, 2))),
)
D_MODEL = 6


def activations(partition=DFC, n=32, seed=0, dtype=torch.float64):
    """Raw activations with a mean and another scale per model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, partition.n_models, D_MODEL, generator=generator, dtype=dtype)
    scale = torch.arange(1, partition.n_models + 1, dtype=dtype)[:, None]
    return x * 2.5 * scale + scale


def build(partition=DFC, seed=3, **fields):
    """A small crosscoder in float64 with biases and a fitted normaliser."""
    fields = {"dtype": "float64", "init_seed": seed} | fields
    normaliser = Normaliser.fit(activations(partition))
    crosscoder = Crosscoder.create(D_MODEL, partition, 5, normaliser, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # weights without the symmetry of the initial ones, forbidden ones kept 0
        for name, param in crosscoder.named_parameters():
            param += 0.2 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
            if name in ("encoder", "decoder"):
                partition.zero_forbidden_(param.unflatten(1, (partition.n_models, D_MODEL)))
    crosscoder.tie_()
    crosscoder.check_integrity()
    return crosscoder


def dense_code(crosscoder, x):
    """Activations and what they came from, in plain einsum with explicit masks."""
    mask = crosscoder.partition.mask().to(x)
    mean, scale = crosscoder.normaliser_mean, crosscoder.normaliser_scale
    z = (x - mean) / scale[:, None]
    W_enc = crosscoder.W_enc * mask.T[:, None, :]
    pre = torch.einsum("bmd,mdf->bf", z, W_enc) + crosscoder.b_enc
    return z, pre, crosscoder.W_dec * mask[:, :, None]


def strongest(pre, k, by_batch=False):
    """The k strongest features per sample (or on average over the batch), the others 0."""
    kept = pre.detach().flatten().topk(k * len(pre)) if by_batch else pre.detach().topk(k, dim=-1)
    shape = pre.flatten() if by_batch else pre
    chosen = torch.zeros_like(shape).scatter(-1, kept.indices, 1.0).view_as(pre)
    return pre.relu() * chosen


def by_hand(crosscoder, x):
    """Features and reconstruction from the definition."""
    z, pre, W_dec = dense_code(crosscoder, x)
    f = strongest(pre, crosscoder.cfg.k, crosscoder.cfg.batchtopk and crosscoder.training)
    z_hat = torch.einsum("bf,fmd->bmd", f, W_dec) + crosscoder.b_dec
    x_hat = z_hat * crosscoder.normaliser_scale[:, None] + crosscoder.normaliser_mean
    return f, z, z_hat, x_hat


def dense_loss(
    crosscoder, x, shared_coef=0.0, exclusive_coef=0.0, variant="published", dead=None, aux_coef=0.0
):
    """The loss from its definition; gradients need ``constrain_grads_`` afterwards."""
    f, z, z_hat, _ = by_hand(crosscoder, x)
    partition, k = crosscoder.partition, crosscoder.cfg.k
    mask = partition.mask()
    shared = mask.all(1)
    if variant == "published":
        counts, groups = f, [mask[:, m] for m in range(partition.n_models)]
    else:
        zero_row = crosscoder.W_dec.detach().abs().sum(-1, keepdim=True) == 0
        norms = torch.where(zero_row, 1.0, crosscoder.W_dec).norm(dim=-1)  # no NaN behind 0
        counts, groups = f * (norms * ~zero_row.squeeze(-1)).sum(-1), [~shared]

    def mean(keep):
        return counts[:, keep].mean() if keep.any() else f.new_zeros(())

    total = (z_hat - z).square().mean() + shared_coef * mean(shared)
    total = total + exclusive_coef * sum(mean(group) for group in groups) / len(groups)
    if dead is None or not dead.any() or variant == "published":
        return total
    _, pre, W_dec = dense_code(crosscoder, x)
    n_dead = int(dead.sum())
    only_dead = strongest(pre[:, dead], min(2 * k, n_dead))
    explained = torch.einsum("bf,fmd->bmd", only_dead, W_dec[dead])
    aux = (explained - (z - z_hat).detach()).square().mean() * min(n_dead / (2 * k), 1.0)
    return total + aux_coef * aux


# -- partition


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    n_models=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_any_partition_covers_every_feature_once_and_zeroes_exactly_its_forbidden_weights(
    sizes, n_models, data
):
    models = st.sets(st.integers(0, n_models - 1), min_size=1).map(lambda m: tuple(sorted(m)))
    blocks = tuple(Block(f"b{i}", size, data.draw(models)) for i, size in enumerate(sizes))
    partition = Partition(tuple(f"m{m}" for m in range(n_models)), blocks)
    features = np.concatenate(
        [np.arange(partition.dict_size)[s] for s in partition.slices.values()]
    )
    assert features.tolist() == list(range(sum(sizes)))
    rows = partition.zero_forbidden_(torch.ones(sum(sizes), n_models, 2))
    assert torch.equal(rows[..., 0].bool(), partition.mask())
    assert partition.largest_forbidden(rows) == 0.0
    assert partition.largest_forbidden(-2 * torch.ones_like(rows)) == (
        2.0 if not partition.mask().all() else 0.0
    )
    assert Partition.from_dict(json.loads(json.dumps(partition.to_dict()))) == partition


@pytest.mark.parametrize(("size", "share"), [(8192, 0.05), (16384, 0.03), (8192, 0.1), (100, 0.29)])
def test_dedicated_has_the_published_block_sizes(size, share):
    p = Partition.dedicated(size, share)
    exclusive = {(8192, 0.05): 409, (16384, 0.03): 491, (8192, 0.1): 819, (100, 0.29): 29}[
        size, share
    ]
    assert [b.size for b in p.blocks] == [exclusive, exclusive, size - 2 * exclusive]
    assert p.names == ("A_exclusive", "B_exclusive", "shared")


def test_three_models_each_get_their_own_block():
    assert THREE.names == ("RL_exclusive", "SFT_exclusive", "base_exclusive", "shared")
    assert THREE.mask().sum(0).tolist() == [4 + 28] * 3


def test_what_saelens_would_fold_into_the_weights_is_refused():
    crosscoder = Crosscoder.create(8, Partition.dedicated(20, 0.1), 2)
    with pytest.raises(NotImplementedError, match="among the top k"):
        crosscoder.fold_W_dec_norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Partition.dedicated(10, 0.05),  # no exclusive feature
        lambda: Partition.dedicated(10, 0.5),  # no shared feature
        lambda: Crosscoder.create(D_MODEL, DFC, 41),  # k of fewer features
    ],
)
def test_impossible_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r"every block needs|k=41 must lie between 1 and the 40"):
        make()


def test_unknown_block_and_model_names_are_refused_by_name():
    with pytest.raises(KeyError, match="A_exclusive"):
        DFC.slice("a_exclusive")
    with pytest.raises(KeyError, match="base"):
        build().decoder_rows("base")


# -- normaliser


def test_normaliser_makes_the_mean_squared_norm_d_model_and_round_trips(monkeypatch):
    monkeypatch.setattr(partition, "BATCH", 77)
    x = activations(n=500)
    normaliser = Normaliser.fit(x)
    z = normaliser.apply(x.float())
    torch.testing.assert_close(z.square().sum(-1).mean(0), torch.full((2,), float(D_MODEL)))
    torch.testing.assert_close(z.mean(0), torch.zeros(2, D_MODEL), atol=1e-5, rtol=0)
    torch.testing.assert_close(normaliser.invert(z), x.float())


def test_normaliser_is_the_same_from_a_tensor_and_a_source():
    class Source:
        n = 500

        def gather(self, indices):
            return x[torch.as_tensor(indices)]

    x = activations(n=500, dtype=torch.float32)
    fitted = Normaliser.fit(Source())
    assert torch.equal(fitted.mean, Normaliser.fit(x).mean)
    assert torch.equal(fitted.scale, Normaliser.fit(x).scale)


def test_a_normaliser_can_be_taken_off_and_put_back():
    crosscoder, x = build(), activations(seed=1)
    expected, stored = crosscoder.encode(x), crosscoder.normaliser
    crosscoder.normaliser = Normaliser(torch.zeros(2, D_MODEL), torch.ones(2))
    assert crosscoder.normaliser.is_identity
    assert not torch.equal(crosscoder.encode(x), expected)
    crosscoder.normaliser = stored
    assert torch.equal(crosscoder.encode(x), expected)
    assert set(dict(crosscoder.named_buffers())) >= {"normaliser_mean", "normaliser_scale"}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((5, 2, 3), float("nan")), "NaN"),
        (torch.full((5, 2, 3), 7.0), "all equal"),
    ],
)
def test_normaliser_refuses_useless_data(x, message):
    with pytest.raises(ValueError, match=message):
        Normaliser.fit(x)


# -- forward pass


@pytest.mark.parametrize("partition", [DFC, PLAIN, THREE, WITH_PAIR])
def test_encode_decode_and_error_equal_the_definition(partition):
    crosscoder = build(partition)
    x = activations(partition, seed=1)
    f, _, _, x_hat = by_hand(crosscoder, x)
    torch.testing.assert_close(crosscoder.encode(x), f)
    torch.testing.assert_close(crosscoder.decode(f), x_hat)
    torch.testing.assert_close(crosscoder.reconstruct(x), x_hat)
    torch.testing.assert_close(crosscoder.reconstruct(x) + crosscoder.error(x), x)
    torch.testing.assert_close(crosscoder(x), x_hat)
    assert (f > 0).sum(-1).max() <= 5


def test_calibrated_round_trip_in_float32():
    crosscoder = build(dtype="float32")
    x = activations(seed=1, dtype=torch.float32)
    torch.testing.assert_close(crosscoder.decode(crosscoder.encode(x)) + crosscoder.error(x), x)


def test_block_reconstructions_add_up_and_exclusive_features_leave_the_other_model_at_its_bias():
    crosscoder, x = build(), activations(seed=1)
    f = crosscoder.encode(x)
    nothing = crosscoder.decode(torch.zeros_like(f))
    parts = [crosscoder.decode(f, block) - nothing for block in DFC.names]
    torch.testing.assert_close(sum(parts) + nothing, crosscoder.decode(f))
    assert torch.equal(crosscoder.decode(f, "A_exclusive")[:, 1], nothing[:, 1])
    both = crosscoder.decode(f, ["A_exclusive", "B_exclusive"])
    torch.testing.assert_close(both, parts[0] + parts[1] + nothing)


def test_decoder_rows_are_what_one_unit_of_a_feature_adds_in_raw_units():
    crosscoder = build()
    f = torch.zeros(1, 40, dtype=torch.float64)
    before = crosscoder.decode(f)
    f[0, 20] = 1.0
    added = crosscoder.decode(f) - before
    for model, name in enumerate("AB"):
        torch.testing.assert_close(crosscoder.decoder_rows(name, [20]), added[:, model])
    assert not crosscoder.decoder_rows("B", DFC.slice("A_exclusive")).any()


def test_base_only_encoding_does_not_look_at_the_other_stream():
    """A's state leaking into the code is the flaw of the published spillover measurement."""
    crosscoder, x = build(), activations(seed=1)
    at_mean = x.clone()
    at_mean[:, 0] = crosscoder.normaliser_mean[0]
    poisoned = x.clone()
    poisoned[:, 0] = float("nan")
    expected = crosscoder.encode(at_mean)
    assert torch.equal(crosscoder.encode(poisoned, streams=["B"]), expected)
    assert torch.equal(crosscoder.encode(poisoned, streams=[1]), expected)
    fill = torch.ones(2, D_MODEL, dtype=torch.float64)
    at_one = x.clone()
    at_one[:, 0] = 1.0
    assert torch.equal(crosscoder.encode(poisoned, ["B"], fill=fill), crosscoder.encode(at_one))


def test_base_only_encoding_needs_a_mean():
    crosscoder = Crosscoder.create(D_MODEL, DFC, 5)
    with pytest.raises(ValueError, match="fill="):
        crosscoder.encode(torch.randn(3, 2, D_MODEL), streams=["B"])


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 3, 6), (4, 12), (2, 6)])
def test_wrong_shapes_are_refused_with_the_expected_one(shape):
    with pytest.raises(ValueError, match=r"\(batch, 2, 6\)"):
        build().encode(torch.zeros(shape))


def test_same_seed_same_initial_weights_and_equal_rows_in_every_model_of_a_feature():
    first, second = (Crosscoder.create(D_MODEL, DFC, 5, init_seed=7) for _ in range(2))
    other = Crosscoder.create(D_MODEL, DFC, 5, init_seed=8)
    assert torch.equal(first.encoder, second.encoder)
    assert not torch.equal(first.encoder, other.encoder)
    shared = first.W_dec[DFC.slice("shared")]
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(first.encoder, first.decoder)
    torch.testing.assert_close(first.decoder.norm(dim=-1), torch.full((40,), 0.3))


def test_batchtopk_selects_over_the_batch_in_training_and_by_threshold_in_use():
    crosscoder, x = build(batchtopk=True), activations(seed=1)
    f = crosscoder.train().encode(x)
    assert (f > 0).sum() == 5 * len(x)
    assert (f > 0).sum(-1).unique().numel() > 1  # not k per sample
    forward = crosscoder.forward_sparse(x)
    crosscoder.update_threshold_(forward, rate=0.01)
    assert crosscoder.threshold == f[f > 0].min()
    crosscoder.threshold *= 0.999  # away from an activation, where rounding would decide
    one_by_one = torch.cat([crosscoder.eval().encode(row[None]) for row in x])
    pre = crosscoder.preactivations(x)
    torch.testing.assert_close(one_by_one, pre * (pre > crosscoder.threshold))


# -- loss and gradients


def published_loss(f, mse, shared_coef, exclusive_coef, n_a, n_b):
    """The formula of the paper's code, for two models."""
    a, b, shared = f[:, :n_a], f[:, n_a : n_a + n_b], f[:, n_a + n_b :]
    l1_shared = shared.abs().mean() if shared.numel() else torch.zeros(())
    in_a, in_b = torch.cat([a, shared], 1).abs().mean(), torch.cat([b, shared], 1).abs().mean()
    l1_exclusive = (in_a + in_b) / 2
    return mse + shared_coef * l1_shared + exclusive_coef * l1_exclusive, l1_shared, l1_exclusive


@pytest.mark.parametrize("partition", [DFC, PLAIN])
def test_published_loss_equals_the_papers_formula(partition):
    crosscoder, x = build(partition), activations(partition, seed=1)
    f, z, z_hat, _ = by_hand(crosscoder, x)
    n = 6 if partition is DFC else 0
    expected = published_loss(f, (z_hat - z).square().mean(), 0.3, 0.7, n, n)
    dead = torch.ones(40, dtype=torch.bool)  # must not matter: published has no auxiliary loss
    terms = losses.terms(crosscoder, crosscoder.forward_sparse(x), "published", dead)
    total = losses.weigh(terms, 0.3, 0.7, 1.0)
    assert set(terms) == {"mse", "l1_shared", "l1_exclusive", "aux", "difference"}
    torch.testing.assert_close(
        torch.stack([total, terms["l1_shared"], terms["l1_exclusive"], terms["aux"]]),
        torch.stack([*expected, torch.zeros((), dtype=torch.float64)]),
    )


def test_exclusive_only_loss_penalises_exclusive_features_by_activation_times_decoder_norm():
    crosscoder, x = build(), activations(seed=1)
    f, z, z_hat, _ = by_hand(crosscoder, x)
    weighted = f * crosscoder.W_dec.norm(dim=-1).sum(-1)
    total, terms = crosscoder.loss(x, 0.3, 0.7, "exclusive_only")
    torch.testing.assert_close(terms["l1_exclusive"], weighted[:, :12].mean())
    torch.testing.assert_close(terms["l1_shared"], weighted[:, 12:].mean())
    mse = (z_hat - z).square().mean()
    torch.testing.assert_close(total, mse + 0.3 * terms["l1_shared"] + 0.7 * terms["l1_exclusive"])


def test_scaling_the_decoder_up_and_the_code_down_does_not_dodge_the_penalty():
    crosscoder, x = build(), activations(seed=1)
    dodger = copy.deepcopy(crosscoder)
    with torch.no_grad():  # features 10 times smaller, the same reconstruction
        dodger.encoder /= 10
        dodger.b_enc /= 10
        dodger.decoder *= 10
    honest, dodged = (
        crosscoder.loss(x, 1, 1, "exclusive_only"),
        dodger.loss(x, 1, 1, "exclusive_only"),
    )
    torch.testing.assert_close(dodged[0], honest[0])
    assert dodger.loss(x, 1, 1, "published")[0] < crosscoder.loss(x, 1, 1, "published")[0]


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="exclusive_only"):
        build().loss(activations(), variant="exclusive-only")


CASES = [
    (partition, variant, batchtopk, tie)
    for partition, variant in itertools.product(
        (DFC, PLAIN, WITH_PAIR), ("published", "exclusive_only")
    )
    for batchtopk, tie in itertools.product((False, True), (False, True))
]


@pytest.mark.parametrize(("partition", "variant", "batchtopk", "tie"), CASES)
def test_sparse_gradients_equal_dense_ones(partition, variant, batchtopk, tie):
    """Into gradient buffers that there are, and into new ones, against dense autograd."""
    crosscoder = build(partition, batchtopk=batchtopk, tie_shared=tie)
    x = activations(partition, seed=1)
    dead = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.4
    crosscoder.train()  # where BatchTopK selects over the batch

    def dense():
        return dense_loss(crosscoder, x, 0.3, 0.7, variant, dead=dead, aux_coef=0.5)

    def sparse():
        terms = losses.terms(crosscoder, crosscoder.forward_sparse(x), variant, dead)
        return losses.weigh(terms, 0.3, 0.7, 0.5)

    totals, grads = [], []
    for loss, buffers in ((dense, False), (sparse, False), (sparse, True)):
        for param in crosscoder.parameters():
            param.grad = torch.zeros_like(param) if buffers else None
        total = loss()
        total.backward()
        crosscoder.constrain_grads_()
        totals.append(total.detach())
        grads.append({name: p.grad.clone() for name, p in crosscoder.named_parameters()})

    for loss, grad in zip(totals[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, totals[0])
        for name, expected in grads[0].items():
            assert expected.abs().max() > 0
            torch.testing.assert_close(grad[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sparse_gradients_equal_dense_ones_on_a_gpu():
    crosscoder, x = build().to("cuda"), activations(seed=1).to("cuda")
    dense_loss(crosscoder, x, 0, 1e-3, "exclusive_only").backward()
    crosscoder.constrain_grads_()
    expected = [p.grad.clone() for p in crosscoder.parameters()]
    crosscoder.zero_grad()
    crosscoder.loss(x, 0, 1e-3, "exclusive_only")[0].backward()
    crosscoder.constrain_grads_()
    torch.testing.assert_close([p.grad for p in crosscoder.parameters()], expected)


def test_kernels_pass_gradcheck():
    """Numerical differentiation, independent of the dense path."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, W, b, values = leaf(4, 3), leaf(7, 3), leaf(7), leaf(8)
    pattern = kernels.top_k((x @ W.T + b).detach(), 2)

    x = x.detach()

    def encode(W, b):
        return kernels.Encode.apply(x, W, b, (x @ W.T + b).detach(), pattern)

    assert torch.autograd.gradcheck(encode, (W, b))
    assert torch.autograd.gradcheck(lambda v, W: kernels.Decode.apply(v, W, pattern), (values, W))
    norms, rows = kernels.SummedRowNorms.apply, leaf(7, 4)
    assert torch.autograd.gradcheck(lambda r: norms(r, slice(2, 5), 2), (rows,))


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("spoil", ["nothing", "ties", "equal rows", "nan"])
def test_top_k_takes_the_k_largest_of_each_row_in_ascending_order_of_place(k, spoil):
    values = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    if spoil == "ties":
        values = values.round()
    elif spoil == "equal rows":
        values[3:9] = 0.5
    elif spoil == "nan":
        values[4, 2] = torch.nan
    pattern = kernels.top_k(values, k)
    feature = pattern.feature.view(20, k)
    assert pattern.starts.tolist() == list(range(0, 20 * k + 1, k))
    assert bool((feature.diff(dim=1) > 0).all())
    chosen = values.gather(1, feature).sort(descending=True).values
    assert torch.equal(chosen.nan_to_num(9), values.topk(k).values.nan_to_num(9))


def test_the_gradient_of_a_zero_decoder_row_is_zero_not_nan():
    crosscoder, x = build(), activations(seed=1)
    with torch.no_grad():
        crosscoder.decoder.zero_()
    crosscoder.loss(x, 1, 1, "exclusive_only")[0].backward()
    assert torch.isfinite(crosscoder.decoder.grad).all()


def test_the_auxiliary_loss_reaches_dead_features_and_no_others():
    crosscoder, x = build(), activations(seed=1)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[15:25] = True
    terms = losses.terms(crosscoder, crosscoder.forward_sparse(x), "exclusive_only", dead)
    terms["aux"].backward()
    touched = crosscoder.decoder.grad.abs().sum(-1) > 0
    assert touched[15:25].any()
    assert not touched[~dead].any()
    assert not (crosscoder.encoder.grad[~dead] != 0).any()


# -- forbidden weights


def forbidden_is_zero(crosscoder, tensors):
    rows = [t.unflatten(1, (crosscoder.n_models, crosscoder.d_model)) for t in tensors]
    return all(crosscoder.partition.largest_forbidden(r) == 0.0 for r in rows)


@pytest.mark.parametrize("fused", [False, True])
def test_forbidden_weights_gradients_and_moments_stay_zero(fused):
    crosscoder = build(dtype="float32")
    optimiser = torch.optim.Adam(crosscoder.parameters(), lr=0.05, fused=fused)
    for step in range(20):
        optimiser.zero_grad()
        x = activations(seed=step, dtype=torch.float32)
        crosscoder.loss(x, 0.01, 0.01, "exclusive_only")[0].backward()
        crosscoder.constrain_grads_()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), 1.0)
        optimiser.step()
    weights = [crosscoder.encoder, crosscoder.decoder]
    moments = [optimiser.state[w][m] for w in weights for m in ("exp_avg", "exp_avg_sq")]
    assert forbidden_is_zero(crosscoder, weights)
    assert forbidden_is_zero(crosscoder, [w.grad for w in weights])
    assert forbidden_is_zero(crosscoder, moments)
    assert all((m != 0).any() for m in moments)
    crosscoder.check_integrity()


# -- files


@pytest.mark.parametrize("batchtopk", [False, True])
def test_saved_crosscoder_is_read_back_by_load_and_by_saelens(tmp_path, batchtopk):
    crosscoder, x = build(batchtopk=batchtopk, tie_shared=True), activations(seed=1)
    crosscoder.threshold.fill_(0.3)
    crosscoder.eval().save(tmp_path)
    expected = crosscoder.encode(x)
    ours, theirs = load(tmp_path), SAE.load_from_disk(tmp_path)
    assert isinstance(ours, Crosscoder)
    assert isinstance(theirs, Crosscoder)
    for other in (ours, theirs, load(crosscoder.save(tmp_path / "again"))):
        assert torch.equal(other.encode(x), expected)
        assert torch.equal(other.reconstruct(x), crosscoder.reconstruct(x))
        assert other.partition == DFC
        assert other.integrity() == {"encoder": 0.0, "decoder": 0.0, "tied": 0.0}
    assert not any(p.requires_grad for p in ours.parameters())
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["cfg.json", "sae_weights.safetensors"]


def test_what_saelens_itself_saves_is_a_whole_checkpoint(tmp_path):
    crosscoder, x = build(), activations(seed=1)
    crosscoder.save_model(tmp_path)
    assert torch.equal(load(tmp_path).encode(x), crosscoder.encode(x))


def edit_weights(directory, change):
    path = directory / "sae_weights.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["normaliser_mean", "normaliser_scale"])
def test_a_checkpoint_without_a_normaliser_does_not_load(tmp_path, name):
    build().save(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop(name))
    for reader in (load, SAE.load_from_disk):
        with pytest.raises(ValueError, match=f"no {name}.*scale"):
            reader(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder"), "no decoder"),
        (lambda t: t.update(b_enc=t["b_enc"][:3].clone()), "b_enc has shape"),
        (lambda t: t["encoder"].fill_(float("nan")), "encoder contains NaN"),
        (lambda t: t["encoder"][0, D_MODEL:].fill_(1e-30), "violates the partition"),
        (lambda t: t["decoder"][8, :D_MODEL].fill_(1e-30), "violates the partition"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, change, message):
    build().save(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        load(tmp_path / "nowhere")
    build().save(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": "topk"}))
    with pytest.raises(ValueError, match="architecture is 'topk'"):
        load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="sae_weights"):
        load(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = build(seed=1)
    old.save(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build(seed=2).save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(load(tmp_path).encoder, old.encoder)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


# -- the published format


def publish(directory, n_a=3, n_b=2, masks=False, change=None, config=()):
    """Write a checkpoint as the paper's authors do."""
    d, D = 8, 24
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (2, d, D), "b_enc": (D,), "W_dec": (D, 2, d), "b_dec": (2, d)}
    state = {name: torch.randn(s, generator=generator) * 0.4 for name, s in shapes.items()}
    enc_mask, dec_mask = torch.ones(2, D), torch.ones(D, 2)
    enc_mask[1, :n_a], enc_mask[0, n_a : n_a + n_b] = 0, 0
    dec_mask[:n_a, 1], dec_mask[n_a : n_a + n_b, 0] = 0, 0
    state["W_enc"] *= enc_mask[:, None, :]
    state["W_dec"] *= dec_mask[:, :, None]
    if masks:
        state |= {"enc_mask": enc_mask, "dec_mask": dec_mask}
    if change:
        change(state)
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "model.pt")
    sizes = {"activation_dim": d, "dict_size": D, "k": 4, "n_a": n_a, "n_b": n_b}
    (directory / "config.json").write_text(json.dumps(sizes | dict(config)))
    return state


@pytest.mark.parametrize(("n_a", "n_b"), [(3, 2), (0, 0), (4, 0)])
@pytest.mark.parametrize("masks", [False, True])
def test_load_published_computes_what_the_authors_code_does(tmp_path, n_a, n_b, masks):
    state = publish(tmp_path, n_a, n_b, masks)
    crosscoder = load_published(tmp_path)
    x = torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    pre = torch.relu(torch.einsum("bmd,mdf->bf", x, state["W_enc"]) + state["b_enc"])
    values, indices = pre.topk(4, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, indices, values)
    x_hat = torch.einsum("bf,fmd->bmd", f, state["W_dec"]) + state["b_dec"]
    expected, *_ = published_loss(f, (x_hat - x).square().mean(), 1e-3, 2e-4, n_a, n_b)
    total, _ = crosscoder.loss(x, 1e-3, 2e-4, variant="published")
    for found, wanted in (
        (crosscoder.encode(x), f),
        (crosscoder.reconstruct(x), x_hat),
        (total, expected),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert crosscoder.normaliser.is_identity
    again = load(crosscoder.save(tmp_path / "ours"))  # it is an ordinary checkpoint from here on
    assert torch.equal(again.encode(x), crosscoder.encode(x))


def set_(name, value):
    return lambda state: state.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("W_dec"), {}, "lacks.*W_dec"),
        (set_("extra", torch.zeros(1)), {}, "unknown.*extra"),
        (set_("b_enc", torch.zeros(23)), {}, r"b_enc has shape \(23,\)"),
        (set_("W_enc", torch.zeros(24, 2, 8)), {}, "W_enc has shape"),
        (lambda s: s["b_dec"].fill_(float("inf")), {}, "b_dec contains NaN or inf"),
        (lambda s: s["W_enc"][1, :, 0].fill_(0.5), {}, "encoder.*order"),
        (lambda s: s["W_dec"][4, 0].fill_(0.5), {}, "decoder.*order"),
        (set_("enc_mask", torch.ones(2, 24)), {}, "enc_mask does not fit"),
        (None, {"k": 25}, "k = 25 exceeds"),
        (None, {"k": "4"}, "k is '4'"),
        (None, {"n_a": 20, "n_b": 5}, "n_a \\+ n_b = 25 exceeds"),
        (None, {"n_b": None}, "n_b is None"),
        (None, {"n_b": -1}, "n_b is -1"),
        (None, {"activation_dim": 9}, "config.json asks for"),
    ],
)
def test_a_malformed_published_checkpoint_is_refused_by_name(tmp_path, change, config, message):
    publish(tmp_path, change=change, config=config)
    with pytest.raises(ValueError, match=message) as caught:
        load_published(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_unreadable_published_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_published(tmp_path)
    publish(tmp_path)
    path = tmp_path / "model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.pt cannot be read"):
        load_published(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ValueError, match="not JSON"):
        load_published(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        load_published(tmp_path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_load_published_executes_nothing_from_the_pickle(tmp_path, capsys):
    publish(tmp_path, change=set_("payload", Payload()))
    with pytest.raises(ValueError, match="cannot be read"):
        load_published(tmp_path)
    assert "executed" not in capsys.readouterr().out
