"""The crosscoder against planted truth: does it find exclusive features, and does it invent some?

Two streams are made from known features: shared ones, which write to both streams, and exclusive
ones, which write to one. A crosscoder is trained on the streams, a rule claims that some of its
features are exclusive, and the claims are held against what was planted. A *claim* is a model and a
score for every learned feature; the rules are

- ``block_claims``: the exclusive blocks of a DFC,
- ``norm_ratio_claims``: the decoder norms of a plain crosscoder,
- ``latent_scaling_claims``: how much of a feature the other model's activations hold
  (arXiv 2504.02922).

The checks that need no truth (null pairs, mirror features, stability over seeds, what the exclusive
blocks explain) are here too, since they are read beside those that do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from dfc_lib.crosscoder.batches import ActivationSource, AnyActivations
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import iterate_batches

MIN_COSINE = 0.9  # from here on two directions count as the same
_BANK = 2**15  # samples after which the noise of a null pair repeats

Target = Literal["error", "reconstruction"]


# --------------------------------------------------------------------------------------------------
# Planted data


@dataclass(frozen=True)
class PlantedConfig:
    """Two streams, A and B, made from known features.

    Firing is a Gaussian copula: a feature fires where a standard normal variable exceeds the
    quantile of its rate. A part of that variable's variance comes from a few common factors, so
    features fire together, shared and exclusive alike. A feature that fires has one log-normal
    magnitude, the same in both streams.

    Attributes:
        d_model: dimensions of each stream.
        n_shared: features in both streams.
        exclusive_rates, n_per_rate: each stream has ``n_per_rate`` exclusive features that fire at
            each of these rates.
        max_rate, zipf_exponent: the r-th shared feature fires at ``max_rate * r**-zipf_exponent``.
        n_factors, factor_share: number of common factors; their share of the copula's variance.
        magnitude_sd: standard deviation of the logarithm of the magnitudes, whose median is 1.
        shared_cosine: cosine between a shared feature's directions in the two streams. At 1, the
            default, they are the same direction, which is what tied decoder rows take for granted.
        gain_sd: standard deviation of the logarithm of a shared feature's strength in B relative to
            A, one constant per feature: fine-tuning may amplify what it does not create.
        noise: standard deviation of the dense Gaussian noise per dimension, before ``scale``.
        offset: norm of each stream's mean vector, before ``scale``.
        scale: raw units of A and of B.
    """

    d_model: int = 64
    n_shared: int = 240
    exclusive_rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    n_per_rate: int = 5
    max_rate: float = 0.3
    zipf_exponent: float = 0.7
    n_factors: int = 4
    factor_share: float = 0.6
    magnitude_sd: float = 0.4
    shared_cosine: float = 1.0
    gain_sd: float = 0.3
    noise: float = 0.05
    offset: float = 3.0
    scale: tuple[float, float] = (1.0, 3.0)

    @property
    def n_exclusive(self) -> int:
        """Exclusive features of each stream."""
        return len(self.exclusive_rates) * self.n_per_rate

    @property
    def n_features(self) -> int:
        return 2 * self.n_exclusive + self.n_shared


@dataclass(frozen=True)
class Truth:
    """What was planted; features in the order A-exclusive, B-exclusive, shared.

    Attributes:
        directions: unit vectors; zero in a stream that the feature does not write to.
        gain: strength per stream, 0 where it does not write.
        owner: 0 (A) or 1 (B) for exclusive features, -1 for shared ones.
        rate: probability of firing.
    """

    directions: Float[Tensor, "feature model d_model"]
    gain: Float[Tensor, "feature model"]
    owner: Int64[Tensor, " feature"]
    rate: Float[Tensor, " feature"]

    def exclusive(self, model: int) -> Int64[Tensor, " exclusive"]:
        """The features that only this model has."""
        return (self.owner == model).nonzero().squeeze(-1)


class Sample(NamedTuple):
    """Planted activations, the code they were made from, and the truth."""

    x: Float[Tensor, "n model d_model"]  # float32, raw units
    codes: Float[Tensor, "n feature"]  # magnitudes, 0 where a feature is silent
    truth: Truth


def sample(config: PlantedConfig, n: int, seed: int) -> Sample:
    """Draw a truth and ``n`` samples of it; the seed decides both.

    The truth does not depend on ``n``. For samples to test on, draw more and keep some apart.
    """
    truth_rng, rng = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    truth = _plant(config, truth_rng)
    loadings = normalize(torch.randn(config.n_features, config.n_factors, generator=truth_rng))
    mean = config.offset * normalize(torch.randn(2, config.d_model, generator=truth_rng))

    common = torch.randn(n, config.n_factors, generator=rng) @ loadings.T
    own = torch.randn(n, config.n_features, generator=rng)
    normal = config.factor_share**0.5 * common + (1 - config.factor_share) ** 0.5 * own
    fires = normal > torch.special.ndtri(1 - truth.rate)
    magnitude = torch.randn(n, config.n_features, generator=rng).mul(config.magnitude_sd).exp()
    codes = magnitude * fires
    x = torch.einsum("nf,fmd->nmd", codes, truth.directions * truth.gain[:, :, None])
    x += mean + config.noise * torch.randn(x.shape, generator=rng)
    return Sample(x * torch.tensor(config.scale)[:, None], codes, truth)


def _plant(config: PlantedConfig, rng: torch.Generator) -> Truth:
    e, n_features = config.n_exclusive, config.n_features
    owner = torch.tensor([0] * e + [1] * e + [-1] * config.n_shared)
    rates = torch.tensor(config.exclusive_rates).repeat_interleave(config.n_per_rate)
    ranks = torch.arange(1, config.n_shared + 1)
    rate = torch.cat([rates, rates, config.max_rate * ranks**-config.zipf_exponent])

    first = normalize(torch.randn(n_features, config.d_model, generator=rng))
    other = torch.randn(n_features, config.d_model, generator=rng)
    other = normalize(other - (other * first).sum(-1, keepdim=True) * first)
    cosine = config.shared_cosine
    second = cosine * first + (1 - cosine**2) ** 0.5 * other
    second[owner == 1] = first[owner == 1]  # an exclusive feature has one direction
    writes = torch.stack([owner != 1, owner != 0], dim=1)  # (feature, model)
    directions = torch.stack([first, second], dim=1) * writes[:, :, None]

    log_gain = config.gain_sd * torch.randn(n_features, generator=rng)
    log_gain[owner >= 0] = 0.0
    gain = torch.stack([-log_gain / 2, log_gain / 2], dim=1).exp() * writes
    return Truth(directions, gain, owner, rate)


@dataclass(frozen=True)
class NullPair:
    """One model beside a copy of itself: whatever is exclusive here is the instrument's doing.

    A source of activations like a cache (``n`` and ``gather``), so nothing is copied.

    Attributes:
        source: activations ``(n, n_models, d_model)``: a tensor or a cache; the first model's are
            doubled.
        noise: root mean square norm of the isotropic Gaussian noise on the copy, raw units. Noise
            repeats after 2**15 samples, so that it is a function of the sample's index.
    """

    source: Float[Tensor, "n model d_model"] | ActivationSource
    noise: float = 0.0

    @property
    def n(self) -> int:
        return self.source.n if isinstance(self.source, ActivationSource) else len(self.source)

    def gather(self, indices: Int64[np.ndarray, " batch"]) -> Float[Tensor, "batch model d_model"]:
        """Samples by index, float32: the stream and its copy."""
        stream = copy = self._stream(indices)
        if self.noise:
            copy = stream + self._noise[indices % _BANK]
        return torch.stack([stream, copy], dim=1)

    def _stream(self, indices: np.ndarray) -> Float[Tensor, "batch d_model"]:
        is_source = isinstance(self.source, ActivationSource)
        rows = self.source.gather(indices) if is_source else self.source[indices]
        return rows[:, 0].float()

    @cached_property
    def _noise(self) -> Float[Tensor, "bank d_model"]:
        d_model = self._stream(np.arange(1)).shape[-1]
        draw = torch.randn(_BANK, d_model, generator=torch.Generator().manual_seed(0))
        return draw * (self.noise / d_model**0.5)


# --------------------------------------------------------------------------------------------------
# Claims: which learned features are exclusive, and to which model


class Claims(NamedTuple):
    """For every learned feature the model that it could be exclusive to, and the evidence.

    A rule with a threshold claims the features with ``score >= threshold``. A score of minus
    infinity is never claimed.
    """

    model: Int64[Tensor, " d_dict"]
    score: Float[Tensor, " d_dict"]


def block_claims(crosscoder: Crosscoder, activations: AnyActivations | None = None) -> Claims:
    """The features of a DFC's exclusive blocks, score 1; all others are never claimed.

    Needs no activations, as ``norm_ratio_claims`` does not.
    """
    model, _ = _norms(crosscoder)
    exclusive = crosscoder.partition.mask().sum(1) == 1
    return Claims(model, torch.where(exclusive, 1.0, -torch.inf))


def norm_ratio_claims(crosscoder: Crosscoder, activations: AnyActivations | None = None) -> Claims:
    """``||W_dec[i, m]|| / sum_m ||W_dec[i, m]||`` for the model with the larger norm: 0.5 to 1."""
    model, norms = _norms(crosscoder)
    return Claims(model, norms.amax(1) / norms.sum(1))


def latent_scaling_claims(
    crosscoder: Crosscoder,
    activations: AnyActivations,
    targets: tuple[Target, ...] = ("error", "reconstruction"),
) -> Claims:
    """``1 - |beta_other / beta_own|`` for the model with the larger norm, the least over targets.

    A feature that only one model holds has ``beta_other`` near 0 in both (arXiv 2504.02922, section
    3, which claims a feature below 0.2 in the error and 0.5 in the reconstruction).
    """
    model, _ = _norms(crosscoder)
    rows, betas = torch.arange(len(model)), latent_scaling(crosscoder, activations)
    beta = torch.stack([betas[target][rows, model] for target in targets])
    scores = 1 - (beta[:, rows, 1 - model] / beta[:, rows, model]).abs()
    return Claims(model, scores.nan_to_num(-torch.inf, neginf=-torch.inf).amin(0))


def _norms(crosscoder: Crosscoder) -> tuple[Int64[Tensor, " d_dict"], Float[Tensor, "d_dict 2"]]:
    norms = crosscoder.W_dec.detach().norm(dim=-1).cpu()
    return norms.argmax(1), norms


@torch.no_grad()
def _encoded(
    crosscoder: Crosscoder, activations: AnyActivations
) -> Iterator[tuple[Float[Tensor, "batch model d_model"], Float[Tensor, "batch d_dict"]]]:
    """Batches of raw activations with their codes, on the crosscoder's device."""
    for x in iterate_batches(activations):
        x = x.to(crosscoder.device)
        yield x, crosscoder.encode(x)


@torch.no_grad()
def latent_scaling(
    crosscoder: Crosscoder, activations: AnyActivations
) -> dict[Target, Float[Tensor, "d_dict row model"]]:
    """How much of a feature's direction each model's activations hold where the feature fires.

    ``beta[i, r, m]`` is the least-squares coefficient of ``f_i * W_dec[i, r]`` on a target of model
    ``m``, over all samples (arXiv 2504.02922, section 3), normalised units:

    - ``error``: what the crosscoder leaves of ``m`` without feature ``i``; the feature's own share
      gives ``beta[i, m, m]`` near 1. Shows a feature whose row in the other model shrank too much.
    - ``reconstruction``: the reconstruction of ``m`` less ``b_dec``. Shows a feature whose part in
      the other model is written by other features.

    NaN for features that never fire and rows that are zero.
    """
    W_dec = crosscoder.W_dec.detach()
    power = torch.zeros(crosscoder.d_dict, dtype=torch.float64)
    # Sums over samples of f_i times the error and the reconstruction of each model.
    error, reconstruction = torch.zeros(2, *W_dec.shape, dtype=torch.float64)
    for x, f in _encoded(crosscoder, activations):
        y = f @ W_dec.flatten(1)
        rest = crosscoder.normaliser.apply(x).flatten(1) - y - crosscoder.b_dec.flatten()
        power += f.square().sum(0).cpu().double()
        reconstruction += (f.T @ y).view(W_dec.shape).cpu().double()
        error += (f.T @ rest).view(W_dec.shape).cpu().double()
    W_dec, power = W_dec.cpu().double(), power[:, None, None]
    gram = torch.einsum("frd,fmd->frm", W_dec, W_dec)
    squares = gram.diagonal(dim1=1, dim2=2)[:, :, None]
    betas = {
        "error": torch.einsum("frd,fmd->frm", W_dec, error) / power / squares + gram / squares,
        "reconstruction": torch.einsum("frd,fmd->frm", W_dec, reconstruction) / power / squares,
    }
    defined = (power > 0) & (squares > 0)
    return {name: torch.where(defined, beta, torch.nan).float() for name, beta in betas.items()}


# --------------------------------------------------------------------------------------------------
# Recovery: claims against the truth


@torch.no_grad()
def firing_rates(crosscoder: Crosscoder, activations: AnyActivations) -> Float[Tensor, " d_dict"]:
    """Share of the samples on which each learned feature is active."""
    n, fired = 0, torch.zeros(crosscoder.d_dict, dtype=torch.float64)
    for _, f in _encoded(crosscoder, activations):
        n += len(f)
        fired += (f > 0).sum(0).cpu()
    return (fired / n).float()


def cosines(
    rows: Float[Tensor, "row d_model"], directions: Float[Tensor, "direction d_model"]
) -> Float[Tensor, "row direction"]:
    """Cosine of every row with every direction; 0 where either is zero."""
    return normalize(rows.detach()) @ normalize(directions.detach()).T


def recovery(
    W_dec: Float[Tensor, "d_dict 2 d_model"],
    claims: Claims,
    truth: Truth,
    live: Bool[Tensor, " d_dict"],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Hold claims against the truth.

    Args:
        live: the learned features that count.

    Returns:
        Two tables. Per planted exclusive feature, those of A first: ``rate``, ``learned`` (a live
        decoder row of its model has a cosine of at least ``MIN_COSINE`` with it) and ``score``, the
        largest of the live features that match it and would be claimed for its model; minus
        infinity if there is none. Per live learned feature: ``score``, ``is_true`` (its row in the
        model that it could be claimed for matches an exclusive feature of that model) and
        ``is_shared`` (its row matches a shared feature).
    """
    planted, matches = [], torch.zeros(2, len(W_dec), dtype=torch.bool)  # exclusive, shared
    for m in (0, 1):
        exclusive, mine = truth.exclusive(m), claims.model == m
        cosine = cosines(W_dec[:, m], truth.directions[exclusive, m])
        shared = cosines(W_dec[:, m], truth.directions[truth.owner < 0, m])
        matches |= mine & torch.stack([(c >= MIN_COSINE).any(1) for c in (cosine, shared)])
        near = (cosine >= MIN_COSINE) & live[:, None]
        score = claims.score[:, None].where(near & mine[:, None], -torch.inf).amax(0)
        rate = truth.rate[exclusive].double().round(decimals=6)
        planted.append(pd.DataFrame({"rate": rate, "learned": near.any(0), "score": score}))
    learned = {"score": claims.score, "is_true": matches[0], "is_shared": matches[1]}
    learned = pd.DataFrame(learned)[live.numpy()].reset_index(drop=True)
    return pd.concat(planted, ignore_index=True), learned


def rates(planted: pd.DataFrame, learned: pd.DataFrame, threshold: float) -> dict[str, float]:
    """Recall and false positives of one threshold, from the tables of ``recovery``.

    ``recall``: share of the planted exclusive features that a claimed feature matches.
    ``false_positive_rate``: share claimed of the live features that match no exclusive one.
    ``false_discovery_rate``: share of those among the claimed (0 if nothing is claimed).
    ``claimed``, ``false``, ``false_shared``: numbers; the last match a shared feature instead.
    """
    claimed = learned.score >= threshold
    false = claimed & ~learned.is_true
    n_claimed, n_false = int(claimed.sum()), int(false.sum())
    return {
        "threshold": threshold,
        "recall": float((planted.score >= threshold).mean()),
        "false_positive_rate": n_false / max(1, int((~learned.is_true).sum())),
        "false_discovery_rate": n_false / max(1, n_claimed),
        "claimed": n_claimed,
        "false": n_false,
        "false_shared": int((false & learned.is_shared).sum()),
    }


def sweep(planted: pd.DataFrame, learned: pd.DataFrame) -> pd.DataFrame:
    """``rates`` at every threshold that changes something, from strict to lax."""
    scores = np.unique(learned.score[np.isfinite(learned.score)])[::-1]
    return pd.DataFrame([rates(planted, learned, t) for t in (np.inf, *scores)])


def threshold_at(curve: pd.DataFrame, false_positive_rate: float) -> float:
    """The laxest threshold of a ``sweep`` with at most this false-positive rate."""
    return float(curve.threshold[curve.false_positive_rate <= false_positive_rate + 1e-12].min())


# --------------------------------------------------------------------------------------------------
# Checks that need no truth


@torch.no_grad()
def block_table(
    crosscoder: Crosscoder, activations: AnyActivations, min_rate: float = 0.0
) -> pd.DataFrame:
    """What each exclusive block does: live features and their share of explained variance.

    Args:
        min_rate: a feature is live if it fires, and on at least this share of the samples.

    Returns:
        One row per block that one model owns: ``block``, ``model``, ``n_features``, ``live``,
        ``fve`` of the model, and ``share``: by how much that fraction of variance explained drops
        when the block's features are left out of the reconstruction.
    """
    partition, W_dec = crosscoder.partition, crosscoder.W_dec
    owned = [
        (block, partition.slice(block.name), *block.models)
        for block in partition.blocks
        if len(block.models) == 1
    ]
    n, fired, total, squares = 0, 0, 0.0, 0.0
    error = np.zeros((len(owned), 2))  # with the block, without
    for x, f in _encoded(crosscoder, activations):
        z = crosscoder.normaliser.apply(x)
        residual = z - crosscoder.normaliser.apply(crosscoder.decode(f))
        for i, (_, features, m) in enumerate(owned):
            without = residual[:, m] + f[:, features] @ W_dec[features, m]
            error[i] += [float(left.double().square().sum()) for left in (residual[:, m], without)]
        n, fired = n + len(x), fired + (f > 0).sum(0).cpu()
        total = total + z.double().sum(0).cpu()
        squares = squares + z.double().square().sum((0, 2)).cpu()
    variance = (squares - (total / n).square().sum(-1) * n).tolist()
    live = (fired > 0) & (fired >= min_rate * n)
    rows = [
        {
            "block": block.name,
            "model": partition.model_names[m],
            "n_features": block.size,
            "live": int(live[features].sum()),
            "fve": 1 - with_block / variance[m],
            "share": (without - with_block) / variance[m],
        }
        for (block, features, m), (with_block, without) in zip(owned, error, strict=True)
    ]
    return pd.DataFrame(rows)


@torch.no_grad()
def mirrors(
    crosscoder: Crosscoder, activations: AnyActivations, min_rate: float = 0.0
) -> pd.DataFrame:
    """Pairs of an A-exclusive and a B-exclusive feature that are the same direction.

    A feature that both models have and that was written into both exclusive blocks looks like this:
    the pair's directions agree *and* the two fire together (``overlap`` near 1).

    Returns:
        One row per pair of live features with cosine of at least ``MIN_COSINE``: ``feature_A``,
        ``feature_B``, ``cosine``, ``overlap`` (samples on which both fire over samples on which
        either does).
    """
    a, b = (crosscoder.partition.slice(f"{m}_exclusive") for m in crosscoder.partition.model_names)
    n, both, fired = 0, 0.0, 0.0
    for _, f in _encoded(crosscoder, activations):
        fires = (f > 0).float().cpu()
        both, fired = both + fires[:, a].T @ fires[:, b], fired + fires.sum(0)
        n += len(f)
    live = fired >= max(1, min_rate * n)
    cosine = cosines(crosscoder.W_dec[a, 0], crosscoder.W_dec[b, 1]).cpu()
    i, j = ((cosine >= MIN_COSINE) & live[a, None] & live[b]).nonzero(as_tuple=True)
    either = fired[a][i] + fired[b][j] - both[i, j]
    columns = {"feature_A": i + a.start, "feature_B": j + b.start, "cosine": cosine[i, j]}
    return pd.DataFrame(columns | {"overlap": both[i, j] / either})


def stability(
    rows: Float[Tensor, "row d_model"], others: Sequence[Float[Tensor, "other d_model"]]
) -> float:
    """Share of decoder rows that have a partner in another run, averaged over the other runs.

    A partner is a row with a cosine of at least ``MIN_COSINE``. NaN without rows or without runs.
    """
    if len(rows) == 0 or not others:
        return float("nan")
    found = [(cosines(rows, other) >= MIN_COSINE).any(1).double().mean() for other in others]
    return float(torch.stack(found).mean())
