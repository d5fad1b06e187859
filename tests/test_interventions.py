"""What each intervention adds to the residual stream, against formulas worked out by hand."""

import dataclasses
import importlib
import linecache
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.steering import interventions as iv
from dfc_lib.steering.interventions import Codec, Site, apply

A, B, D_MODEL = 0, 1, 6


@pytest.fixture(scope="module")
def h():
    torch.manual_seed(0)
    return torch.randn(40, 2, D_MODEL) * torch.tensor([2.0, 5.0])[:, None] + 1.0


@pytest.fixture(scope="module")
def crosscoder(h):
    """6 A-exclusive, 6 B-exclusive, 18 shared features; encoder and decoder unrelated."""
    made = Crosscoder.create(D_MODEL, Partition.dedicated(30, 0.2), 8, Normaliser.fit(h))
    made.requires_grad_(False)
    torch.manual_seed(1)
    for weights in (made.encoder, made.decoder):
        rows = torch.randn(30, 2, D_MODEL)
        weights.copy_(made.partition.zero_forbidden_(rows).flatten(1))
    made.b_enc.copy_(torch.randn(30) * 0.3)
    made.b_dec.copy_(torch.randn(2, D_MODEL) * 0.3)
    made.check_integrity()
    return made


@pytest.fixture(scope="module")
def codec(crosscoder):
    return Codec(crosscoder)


def by_hand(crosscoder, h, normaliser):
    """The code, written out: normalise, encode, ReLU, top-k."""
    z = (h - normaliser.mean) / normaliser.scale[:, None]
    pre = torch.einsum("bmd,mdf->bf", z, crosscoder.W_enc) + crosscoder.b_enc
    values, index = pre.relu().topk(crosscoder.cfg.k)
    return torch.zeros_like(pre).scatter(1, index, values)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_clean_is_exact(h):
    new, ratio = apply(iv.Clean(), h, B)
    assert torch.equal(new, h[:, B])
    assert not ratio.any()


@pytest.mark.parametrize("target", [A, B])
@pytest.mark.parametrize("protocol", ["calibrated", "published"])
def test_reconstruction_and_steering_by_formula(crosscoder, h, target, protocol):
    """The two protocols differ exactly in the normaliser; steering adds (alpha-1) f s_m W_dec."""
    codec = Codec(crosscoder, protocol)
    identity = Normaliser(torch.zeros(2, D_MODEL), torch.ones(2))
    used = crosscoder.normaliser if protocol == "calibrated" else identity
    f = by_hand(crosscoder, h, used)
    decoded = torch.einsum("bf,fd->bd", f, crosscoder.W_dec[:, target]) + crosscoder.b_dec[target]
    new, ratio = apply(iv.Reconstruction(codec), h, target)
    close(new, decoded * used.scale[target] + used.mean[target])
    close(ratio, (new - h[:, target]).norm(dim=1) / h[:, target].norm(dim=1))

    features = (0, 3, 20)
    for alpha in (0.0, 1.0, 4.0):
        delta = (
            (alpha - 1) * used.scale[target] * f[:, features] @ crosscoder.W_dec[features, target]
        )
        close(apply(iv.Steer(codec, features, alpha), h, target)[0], h[:, target] + delta)
    delta = used.scale[target] * (2.5 - f[:, features]) @ crosscoder.W_dec[features, target]
    close(apply(iv.Clamp(codec, features, 2.5), h, target)[0], h[:, target] + delta)
    close(
        apply(iv.Steer(codec, features, 0.0), h, target)[0],
        h[:, target] - used.scale[target] * f[:, features] @ crosscoder.W_dec[features, target],
    )


def test_published_shares_weights_and_leaves_the_crosscoder_alone(crosscoder):
    """A copy of a large dictionary would not fit; a changed normaliser would be worse."""
    before = crosscoder.normaliser_mean.clone()
    used = Codec(crosscoder, "published").used
    assert used.normaliser.is_identity
    assert used.decoder.data_ptr() == crosscoder.decoder.data_ptr()
    assert torch.equal(crosscoder.normaliser_mean, before)
    assert Codec(crosscoder).used is crosscoder


def test_no_op(codec, h):
    """alpha = 1 must be exact, which a reconstruction is not."""
    assert torch.equal(apply(iv.Steer(codec, (1, 2, 25), 1.0), h, A)[0], h[:, A])
    assert apply(iv.Reconstruction(codec), h, A)[1].min() > 0.1


def test_clamp_acts_where_the_feature_is_silent(codec, h):
    """Scaling cannot switch on a silent feature; clamping must."""
    f = codec.encode(h, A)
    silent = f[:, 3] == 0
    assert silent.any()
    assert not apply(iv.Steer(codec, (3,), 50.0), h, A)[1][silent].any()
    assert (apply(iv.Clamp(codec, (3,), 2.0), h, A)[1][silent] > 0).all()
    assert not apply(iv.Clamp(codec, (3,), 0.0), h, A)[1][silent].any()


def test_blocks_add_up(codec, crosscoder, h):
    """Shared-only and exclusive-only reconstructions split the full one, apart from the bias."""
    full = apply(iv.Reconstruction(codec), h, A)[0]
    bias = crosscoder.decode(torch.zeros(1, 30))[:, A]
    parts = [
        apply(iv.Reconstruction(codec, (b,)), h, A)[0] - bias for b in ("shared", "A_exclusive")
    ]
    assert all(part.norm() > 0.1 for part in parts)
    close(bias + sum(parts), full)
    only_b = apply(iv.Reconstruction(codec, ("B_exclusive",)), h, A)[0]
    close(only_b, bias.expand_as(only_b))
    with pytest.raises(KeyError, match="no block 'C_exclusive'"):
        apply(iv.Reconstruction(codec, ("C_exclusive",)), h, A)


def test_exclusive_features_are_inert_in_the_other_model_unless_rows_are_borrowed(crosscoder, h):
    """The zero-row control is zero by construction; the real one writes A's rows with B's scale."""
    codec, features = Codec(crosscoder), (0, 1, 2, 3, 4, 5)
    assert torch.equal(apply(iv.Steer(codec, features, 9.0), h, B)[0], h[:, B])
    new = apply(iv.Steer(codec, features, 9.0, rows_of="A"), h, B)[0]
    f, scale = by_hand(crosscoder, h, crosscoder.normaliser), crosscoder.normaliser.scale
    close(new - h[:, B], 8.0 * scale[B] * f[:, features] @ crosscoder.W_dec[features, A])
    assert (new - h[:, B]).norm() > 1.0
    clamped = apply(iv.Clamp(codec, (0,), 1.0, rows_of=A), h, B)[0]
    close(clamped - h[:, B], scale[B] * (1.0 - f[:, :1]) @ crosscoder.W_dec[:1, A])


@pytest.mark.parametrize("protocol", ["calibrated", "published"])
def test_own_encoding_does_not_see_the_other_model(crosscoder, h, protocol):
    """Base-only encoding must not let A's state leak in; joint encoding does, and says so."""
    changed = h.clone()
    changed[:, A] = torch.randn_like(h[:, A]) * 10
    own, joint = Codec(crosscoder, protocol, "own"), Codec(crosscoder, protocol)
    own_rec, joint_rec = iv.Reconstruction(own), iv.Reconstruction(joint)
    assert torch.equal(apply(own_rec, h, B)[0], apply(own_rec, changed, B)[0])
    assert not torch.allclose(apply(joint_rec, h, B)[0], apply(joint_rec, changed, B)[0])
    assert (own_rec.reads_others, joint_rec.reads_others) == (False, True)
    at_mean = h.clone()
    at_mean[:, A] = crosscoder.normaliser.mean[A]
    close(apply(own_rec, h, B)[0], apply(joint_rec, at_mean, B)[0])


def test_own_encoding_without_known_means(crosscoder, h):
    """An imported checkpoint knows no mean: refuse, or take the one that is given."""
    bare = Crosscoder.create(D_MODEL, crosscoder.partition, 8).requires_grad_(False)
    with pytest.raises(ValueError, match="fill="):
        apply(iv.Reconstruction(Codec(bare, encoding="own")), h, B)
    given_means = iv.Reconstruction(Codec(bare, encoding="own", fill=h.mean(0)))
    at_mean = h.clone()
    at_mean[:, A] = h.mean(0)[A]
    close(apply(given_means, h, B)[0], apply(iv.Reconstruction(Codec(bare)), at_mean, B)[0])


def test_patches(h):
    vector = torch.arange(float(D_MODEL))
    assert torch.equal(apply(iv.Patch(vector), h, A)[0], vector.expand(40, -1))
    close(apply(iv.AddVector(vector, 0.5), h, B)[0], h[:, B] + 0.5 * vector)
    assert torch.equal(apply(iv.OtherModel(A), h, B)[0], h[:, A])


def test_a_dose_has_its_length_wherever_something_changes(codec, h):
    """One that made a silent feature speak would not be that feature's."""
    of, site = iv.Steer(codec, (0,), 2.0), Site(h, A)
    change, dosed = of.delta(site), iv.Dose(of, 3.5).delta(site)
    active = change.norm(dim=1) > 0
    assert 0 < active.sum() < len(h)
    close(dosed[active].norm(dim=1), torch.full((int(active.sum()),), 3.5))
    close(dosed[active] / 3.5, change[active] / change[active].norm(dim=1, keepdim=True))
    assert not dosed[~active].any()
    assert iv.Dose(of, 3.5).reads_others
    assert not iv.Dose(iv.AddVector(torch.ones(D_MODEL)), 3.5).reads_others
    assert iv.key(iv.Dose(of, 3.5)) != iv.key(iv.Dose(of, 4.0))


@pytest.mark.parametrize("draw_with", ["isotropic", "covariance"])
def test_random_directions_match_the_norm_row_by_row(codec, h, draw_with):
    """A control of another size than the thing controlled proves nothing."""
    like = iv.Steer(codec, (0, 1, 20), 5.0)
    covariance = torch.cov(h[:, A].T) if draw_with == "covariance" else None
    draws = iv.random_directions(like, 7, D_MODEL, seed=3, covariance=covariance)
    site = Site(h, A)
    for draw in draws:
        delta = draw.delta(site)
        close(delta.norm(dim=1), like.delta(site).norm(dim=1))
        along = delta @ draw.direction
        close(along.abs(), delta.norm(dim=1))
    directions = torch.stack([draw.direction for draw in draws])
    assert (directions @ directions.T - torch.eye(7)).abs().max() < 0.999
    again = iv.random_directions(like, 3, D_MODEL, seed=3, covariance=covariance)
    assert torch.equal(directions[:3], torch.stack([draw.direction for draw in again]))


def test_covariance_matched_directions_follow_the_covariance(codec):
    like, scales = iv.Steer(codec, (0,), 2.0), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 100.0])
    for covariance, low, high in ((torch.diag(scales), 0.7, 0.8), (None, 0.14, 0.19)):
        draws = iv.random_directions(like, 400, D_MODEL, covariance=covariance)
        share = torch.stack([d.direction**2 for d in draws]).mean(0)
        assert low < share[-1] < high  # of the squared length, along the dominant axis


def test_random_features_are_active_in_the_block_and_matched(codec, h):
    """The control must use features that fire, none of those under test, at the same size."""
    like, site = iv.Steer(codec, (0, 1, 20), 5.0), Site(h, A)
    f, wanted = codec.encode(h, A), like.delta(site).norm(dim=1)
    drawn = set()
    for seed in range(20):
        control = iv.RandomFeatures(codec, "shared", like, size=1, seed=seed, exclude=(20,))
        delta = control.delta(site)
        for row in range(len(h)):
            active = [i for i in range(12, 30) if f[row, i] > 0 and i != 20]
            if not active:
                assert not delta[row].any()
                continue
            assert delta[row].norm() == pytest.approx(float(wanted[row]), rel=1e-4, abs=1e-6)
            if wanted[row] == 0:
                continue
            rows = codec.rows(active, A)
            cosine = torch.cosine_similarity(rows, delta[row][None])
            assert cosine.max() > 0.9999
            drawn.add(active[int(cosine.argmax())])
        alone = torch.stack([control.delta(Site(h[i : i + 1], A))[0] for i in range(5)])
        close(alone, delta[:5])
    assert len(drawn) > 5
    with pytest.raises(ValueError, match="only zero rows"):
        iv.RandomFeatures(codec, "B_exclusive", like).delta(site)


def test_a_code_can_be_scaled_before_the_top_k(codec, h):
    """Before the top-k a scaled feature enters and others leave; after it nothing new can enter."""
    pre = codec.preactivations(h, A)
    f = codec.encode(h, A)
    close(codec.select(pre), f)
    lost = ((f[:, :6] == 0) & (pre[:, :6] > 0)).any(1)
    assert lost.any()
    scaled = pre.clone()
    scaled[:, :6] *= 100.0
    values, index = scaled.relu().topk(8)
    close(codec.select(scaled), torch.zeros_like(pre).scatter(1, index, values))
    assert ((codec.select(scaled) > 0) != (f > 0)).any(1)[lost].all()


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(-20, 20), features=st.sets(st.integers(0, 29), min_size=1))
def test_steering_is_linear_in_alpha_and_additive_in_features(codec, h, alpha, features):
    site, features = Site(h, A), tuple(features)
    unit = sum(iv.Steer(codec, (i,), 2.0).delta(site) for i in features)
    torch.testing.assert_close(
        iv.Steer(codec, features, alpha).delta(site), (alpha - 1) * unit, rtol=1e-3, atol=1e-3
    )


def test_codes_are_computed_once_per_grid(codec, h, monkeypatch):
    """A grid of 30 cells over one crosscoder must not encode 30 times."""
    calls, encode = [], Codec.encode
    monkeypatch.setattr(Codec, "encode", lambda *a: (calls.append(1), encode(*a))[1])
    site = Site(h, A)
    for alpha in (0.0, 2.0, 4.0):
        apply(iv.Steer(codec, (0,), alpha), site)
    assert len(calls) == 1


def test_keys_name_the_content(crosscoder, h):
    """Cells of a resumed grid are found by key: equal content one key, any change another."""
    base = iv.Steer(Codec(crosscoder), (1, 2), 4.0)
    vector = torch.ones(D_MODEL)
    others = [
        iv.Steer(Codec(crosscoder), (1, 2), 5.0),
        iv.Steer(Codec(crosscoder), (1, 3), 4.0),
        iv.Steer(Codec(crosscoder), (1, 2), 4.0, rows_of="A"),
        iv.Steer(Codec(crosscoder, "published"), (1, 2), 4.0),
        iv.Steer(Codec(crosscoder, encoding="own"), (1, 2), 4.0),
        iv.Clamp(Codec(crosscoder), (1, 2), 4.0),
        iv.Patch(vector),
        iv.Patch(vector * 2),
        *iv.random_directions(base, 2, D_MODEL),
    ]
    assert iv.key(base) == iv.key(dataclasses.replace(base, codec=Codec(crosscoder)))
    assert len({iv.key(base), *map(iv.key, others)}) == len(others) + 1
    other = Crosscoder.create(D_MODEL, crosscoder.partition, 8, Normaliser.fit(h))
    assert iv.key(iv.Steer(Codec(other), (1, 2), 4.0)) != iv.key(base)


OWN = """
from dataclasses import dataclass
from dfc_lib.steering.interventions import Intervention

class Base(Intervention):
    def delta(self, site):
        return {delta}

@dataclass(frozen=True, eq=False)
class Own(Base):
    '''{doc}'''

    ratio: float
    reads_others = {reads_others}

    @property
    def twice(self):
        return {twice} * self.ratio
"""


@pytest.mark.parametrize("where", ["module", "Jupyter"])
def test_the_source_of_a_kind_from_elsewhere_is_part_of_the_key(tmp_path, monkeypatch, where):
    """A class of a notebook that was edited must not find the cells of the one before."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(
        number, ratio=0.5, delta="self.ratio * site.own", doc="Is.", twice="2", reads_others="True"
    ):
        source = OWN.format(delta=delta, doc=doc, twice=twice, reads_others=reads_others)
        name = f"own_{where}_{number}"
        if where == "module":
            (tmp_path / f"{name}.py").write_text(source)
            return importlib.import_module(name).Own(ratio)
        linecache.cache[f"<{name}>"] = (len(source), None, source.splitlines(True), f"<{name}>")
        module = types.ModuleType(name)  # without __file__, like __main__ there
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
        return module.Own(ratio)

    first = iv.key(made(0))
    assert iv.key(made(1, doc="Other words.")) == first
    others = [made(2, ratio=0.6), made(3, delta="2 * self.ratio * site.own"), made(4, twice="3")]
    others.append(made(5, reads_others="False"))
    assert len({first, *map(iv.key, others)}) == 5


def test_a_setting_of_the_crosscoder_is_part_of_the_key(crosscoder):
    """Another k gives another code from the same weights; kept cells must not be taken for it."""
    other = Crosscoder(dataclasses.replace(crosscoder.cfg, k=crosscoder.cfg.k + 1))
    other.load_state_dict(crosscoder.state_dict())
    assert iv.key(Codec(other)) != iv.key(Codec(crosscoder))


def test_any_model_in_a_kind_counts_by_its_weights():
    """A probe of one's own, say, which has no settings as a crosscoder has them."""
    one, other = (Held(torch.nn.Linear(3, 1)) for _ in range(2))
    same = Held(torch.nn.Linear(3, 1))
    same.model.load_state_dict(one.model.state_dict())
    assert iv.key(one) == iv.key(same) != iv.key(other)


@dataclasses.dataclass(frozen=True, eq=False)
class Held(iv.Intervention):
    model: torch.nn.Module


def test_a_control_reads_what_its_model_reads(crosscoder):
    """Else the engine leaves the other model out, and the control's length is not a number."""
    own, joint = Codec(crosscoder, encoding="own"), Codec(crosscoder)
    assert iv.RandomFeatures(own, "shared", iv.Steer(joint, (1,), 2.0)).reads_others
    assert iv.RandomFeatures(joint, "shared", iv.Steer(own, (1,), 2.0)).reads_others
    assert not iv.RandomFeatures(own, "shared", iv.Steer(own, (1,), 2.0)).reads_others


def test_bad_arguments_are_named(crosscoder, h):
    with pytest.raises(ValueError, match="protocol='raw'"):
        Codec(crosscoder, "raw")
    with pytest.raises(ValueError, match="encoding='base'"):
        Codec(crosscoder, encoding="base")
    with pytest.raises(ValueError, match=r"\(40, 6\)"):
        apply(iv.Reconstruction(Codec(crosscoder)), h[:, 0])
