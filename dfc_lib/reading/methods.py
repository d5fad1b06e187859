"""Ways to find what sets two models apart, in one form: directions, the likeliest first.

A :class:`Method` trains a crosscoder and ranks its features by a rule, or needs no crosscoder and
works on the activations themselves:

- the mean of A - B, its principal directions, and a linear probe for A's own calls;
- an SAE on A - B, trained by SAELens' own trainer (:func:`difference_sae`);
- plain crosscoders by norm ratio or latent scaling (top-k, BatchTopK, L1), and dedicated feature
  crosscoders by their blocks (untied, tied, anchored).

What a direction is worth is asked of the model: :class:`Span` puts the other model's component in
the place of the model's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from dfc_lib import provenance, store
from dfc_lib.crosscoder import recipes
from dfc_lib.crosscoder.batches import AnyActivations, Batches
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Partition, iterate_batches
from dfc_lib.crosscoder.training import Job, TrainConfig
from dfc_lib.reading import groundtruth, specificity
from dfc_lib.reading.groundtruth import MIN_COSINE, Claims, Truth
from dfc_lib.reading.switches import LIVE
from dfc_lib.steering.interventions import Intervention, Site

Streams = Float[Tensor, "n model d_model"]  # A and B on the same texts, raw units
Directions = Float[Tensor, "direction d_model"]
Rule = Callable[[Crosscoder, AnyActivations], Claims]


# --------------------------------------------------------------------------------------------------
# Crosscoders


@dataclass(frozen=True)
class Method:
    """A way that trains a crosscoder.

    Attributes:
        name: what tables call it.
        config: of its crosscoder, for seed 0.
        rule: which features it claims to be one model's alone, and how surely.
        threshold: the score from which it claims; None: a free choice, to be made at a
            false-positive rate.
    """

    name: str
    config: TrainConfig
    rule: Rule
    threshold: float | None = None

    def job(self, seed: int, activations: AnyActivations, data_key: str) -> Job:
        """What ``Study.train`` trains, or finds trained."""
        return Job(replace(self.config, seed=seed), activations, data_key)


def by_strength(crosscoder: Crosscoder, activations: AnyActivations) -> Claims:
    """The exclusive features of a DFC, by how much they write: a block with a threshold.

    The score is the root mean square over samples of ``f_i ||W_dec[i, m]||``, normalised units.
    """
    claims, total, n = groundtruth.block_claims(crosscoder), 0.0, 0
    for x in iterate_batches(activations):
        total, n = total + crosscoder.encode(x).square().sum(0), n + len(x)
    length = crosscoder.W_dec.detach().norm(dim=-1)[torch.arange(len(claims.model)), claims.model]
    strength = (total / n).sqrt() * length
    return Claims(claims.model, torch.where(claims.score > 0, strength.cpu(), -torch.inf))


def crosscoders(untied: TrainConfig, d_model: int) -> dict[str, Method]:
    """The ways that train a crosscoder, all with the size and the budget of one untied DFC.

    - top-k with one block, by norm ratio (Lindsey et al., "Sparse Crosscoders", 2024) or by latent
      scaling (arXiv 2504.02922), and BatchTopK by latent scaling, as the latter advises;
    - ReLU and a norm-weighted L1 by norm ratio, as in ``specificity`` (arXiv 2604.25011);
    - the DFC by its blocks: untied, tied and anchored (``recipes.Recipe``).
    """
    plain = replace(untied, partition=Partition.plain(untied.partition.dict_size))
    budget = {name: getattr(untied, name) for name in ("batch_size", "lr", "device")}
    l1 = specificity.weighted_l1(
        untied.partition.model_names,
        untied.partition.dict_size,
        d_model,
        k=min(4 * untied.k, untied.partition.dict_size),
        steps=max(1, untied.steps // 2),  # each takes about twice as long as the others'
        **budget,
    )
    by_norms, by_blocks = groundtruth.norm_ratio_claims, groundtruth.block_claims
    by_scaling, anchored = groundtruth.latent_scaling_claims, recipes.anchored(untied.steps)
    ways = [
        Method("plain, norm ratio", plain, by_norms),
        Method("plain, latent scaling", plain, by_scaling),
        Method("BatchTopK, latent scaling", replace(plain, batchtopk=True), by_scaling),
        Method("L1, norm ratio", l1, by_norms),
        Method("DFC untied", untied, by_blocks, 1.0),
        Method("DFC tied", replace(untied, tie_shared=True), by_blocks, 1.0),
        Method("DFC anchored", replace(untied, **anchored), by_blocks, 1.0),
    ]
    return {way.name: way for way in ways}


@torch.no_grad()
def candidates(crosscoder: Crosscoder, claims: Claims, seen: Streams, n: int) -> Directions:
    """What the features that a rule puts first write into the model that they are claimed for.

    Only features that fire on at least ``switches.LIVE`` of ``seen`` count. Equal scores, such as
    those of a block, are ordered by how much the features write.

    Returns:
        at most ``n`` decoder rows, raw units; none where no feature is live.
    """
    f, features = crosscoder.encode(seen).cpu(), torch.arange(crosscoder.d_dict)
    scale = crosscoder.normaliser.scale.cpu()[:, None]
    rows = (crosscoder.W_dec.detach().cpu() * scale)[features, claims.model]
    writes = f.square().mean(0).sqrt() * rows.norm(dim=-1)
    counts = ((f > 0).float().mean(0) >= LIVE) & claims.score.isfinite() & (writes > 0)
    order = np.lexsort((-writes[counts], -claims.score[counts]))
    return rows[counts][order[:n]]


# --------------------------------------------------------------------------------------------------
# Without a crosscoder


def mean_difference(x: Streams) -> Directions:
    """The mean of A - B: one direction."""
    return (x[:, 0] - x[:, 1]).mean(0, keepdim=True)


def principal(x: Streams, n: int, centred: bool = True) -> Directions:
    """The ``n`` leading right singular vectors of A - B, with or without its mean taken out."""
    gaps = (x[:, 0] - x[:, 1]).double()
    gaps = gaps - gaps.mean(0) if centred else gaps
    return torch.linalg.svd(gaps, full_matrices=False).Vh[:n].float()


def probe(h: Float[Tensor, "n d_model"], positive: Bool[Tensor, " n"]) -> Directions:
    """The normal of a logistic regression (scikit-learn's), pointing to the positives; unit length.

    One scalar scales all dimensions, so that the geometry of the residual stream stays.

    Raises:
        ValueError: all texts are positive, or none is: there is nothing to tell apart.
    """
    from sklearn.linear_model import LogisticRegression

    z = (h - h.mean(0)) / h.var(0).mean().sqrt()
    fitted = LogisticRegression(max_iter=1000).fit(z.double().numpy(), positive.numpy())
    normal = torch.from_numpy(fitted.coef_).float()
    return normal / normal.norm()


def claimed_mean(x: Streams) -> Directions:
    """The mean of A - B if it is longer than under 99 draws of random signs of A - B, else none."""
    gaps = x[:, 0] - x[:, 1]
    signs = torch.randn(99, len(x), generator=torch.Generator().manual_seed(0)).sign()
    by_chance = (signs @ gaps / len(x)).norm(dim=-1).max()
    mean = mean_difference(x)
    return mean[mean.norm(dim=-1) > by_chance]


def claimed_principal(x: Streams, centred: bool = True) -> Directions:
    """The principal directions with more variance than isotropic noise of the same total has.

    Of noise the largest is about ``(1 + sqrt(d / n))**2`` times the mean (Marchenko and Pastur);
    its own fluctuation is covered by a further tenth.
    """
    gaps = (x[:, 0] - x[:, 1]).double()
    gaps = gaps - gaps.mean(0) if centred else gaps
    _, s, directions = torch.linalg.svd(gaps, full_matrices=False)
    n, d = gaps.shape
    edge = 1.1 * (1 + (d / n) ** 0.5) ** 2 * s.square().sum() / d
    return directions[(s.square() > edge) & (s > 0)].float()


# --------------------------------------------------------------------------------------------------
# An SAE on the difference, by SAELens


def train_sae(gaps: Float[Tensor, "n d_model"], config: TrainConfig, d_sae: int) -> TopKTrainingSAE:
    """A top-k SAE on differences, trained by SAELens' ``SAETrainer``.

    SAELens scales the differences by one scalar and folds it into the weights, so that the SAE
    takes and gives raw ones.

    Args:
        config: its k, steps, batch size, learning rate, seed and order of the data.
    """
    one_stream = replace(config, partition=Partition.plain(d_sae, 1))
    batches = Batches(one_stream, gaps[:, None], None)
    data = (batches.batch(step)[:, 0] for step in count())
    shape = {"d_in": gaps.shape[1], "d_sae": d_sae, "k": config.k, "device": config.device}
    scale = "expected_average_only_in"
    training = SAETrainerConfig(
        total_training_samples=config.steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=config.lr,
        lr_end=config.lr,
        device=config.device,
        n_batches_for_norm_estimate=-(-len(gaps) // config.batch_size),
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(config.seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, normalize_activations=scale))
        return SAETrainer(training, sae, data).fit()


def difference_sae(
    x: AnyActivations, config: TrainConfig, d_sae: int, build_dir: str | Path, data_key: str
) -> SAE:
    """``train_sae`` on A - B, or found trained: kept on disk and read back by SAELens.

    Args:
        x: raw activations of A and B, a tensor or a cache.
        build_dir: SAEs live in ``<build_dir>/saes/<key>``.
        data_key: identifies ``x``.
    """
    settings = {"d_sae": d_sae, "sae_lens": version("sae-lens")} | config.to_dict()
    name = store.key(provenance.code_hash(__name__), settings, data_key)
    folder = Path(build_dir) / "saes" / name
    with store.lock(folder.with_name(f".{name}.lock")):
        if not (folder / "cfg.json").is_file():  # SAELens writes it last
            whole = torch.cat(list(iterate_batches(x)))
            train_sae(whole[:, 0] - whole[:, 1], config, d_sae).save_inference_model(folder)
    return SAE.load_from_disk(folder, device=config.device)


@torch.no_grad()
def of_sae(sae: SAE, seen: Streams, n: int, min_rate: float = LIVE) -> Directions:
    """As ``candidates``, for an SAE on the difference: by how much its features write."""
    f = sae.encode((seen[:, 0] - seen[:, 1]).to(sae.device)).cpu()
    rows = sae.W_dec.detach().cpu()
    writes = f.square().mean(0).sqrt() * rows.norm(dim=-1)
    live = (f > 0).float().mean(0) >= min_rate
    order = torch.where(live, writes, -1.0).argsort(descending=True, stable=True)
    return rows[order[: min(n, int(live.sum()))]]


# --------------------------------------------------------------------------------------------------
# What a direction is worth


@dataclass(frozen=True, eq=False)
class Span(Intervention):
    """The other model's component in a subspace, in the place of the target's own (two models).

    Attributes:
        basis: orthonormal rows; see :func:`orthonormal`.
    """

    basis: Directions

    def delta(self, site: Site) -> Float[Tensor, "batch d_model"]:
        basis = self.basis.to(site.h)
        return (site.h[:, 1 - site.target] - site.own) @ basis.T @ basis


def orthonormal(directions: Directions) -> Directions:
    """An orthonormal basis of what the directions span; at most as many rows as directions."""
    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    _, s, basis = torch.linalg.svd(unit, full_matrices=False)
    return basis[s > 1e-6].float()


def oriented(directions: Directions, x: Streams) -> Directions:
    """Unit vectors along which A lies further than B on average: what RL added, by convention."""
    unit = torch.nn.functional.normalize(directions, dim=-1)
    along = unit @ mean_difference(x)[0]
    return torch.where(along[:, None] < 0, -unit, unit)


def resampled(n: int, seed: int) -> Tensor:
    """Indices of a bootstrap sample: the seed of a way that has none of its own."""
    return torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))


def stability(chosen: Sequence[Float[Tensor, " d_model"]]) -> float:
    """Mean absolute cosine of pairs of directions; NaN for fewer than two."""
    if len(chosen) < 2:
        return float("nan")
    cosines = groundtruth.cosines(torch.stack(list(chosen)), torch.stack(list(chosen))).abs()
    n = len(chosen)
    return float((cosines.sum() - n) / (n * (n - 1)))


def recovered(directions: Directions, truth: Truth) -> tuple[pd.DataFrame, dict[str, float]]:
    """Directions against planted truth, of either sign: a difference does not say whose it is.

    Returns:
        one line per planted exclusive feature: ``rate``, ``found``; and ``claimed``,
        ``recall`` and ``false_discovery_rate`` (share of the directions that are no exclusive
        feature's; 0 if there are none).
    """
    parts, right = [], torch.zeros(len(directions), dtype=torch.bool)
    for m in (0, 1):
        mine = truth.exclusive(m)
        near = groundtruth.cosines(directions, truth.directions[mine, m]).abs() >= MIN_COSINE
        right |= near.any(1)
        rate = truth.rate[mine].double().round(decimals=6)
        parts.append(pd.DataFrame({"rate": rate, "found": near.any(0)}))
    planted = pd.concat(parts, ignore_index=True)
    rates = {"claimed": len(directions), "recall": float(planted.found.mean())}
    wrong = int((~right).sum()) / max(1, len(directions))
    return planted, rates | {"false_discovery_rate": wrong}


def needed(shares: Mapping[int, float], of: float = 0.9) -> float:
    """The least number of directions with at least this share of the whole; NaN: none has it."""
    return min((n for n, share in shares.items() if share >= of), default=float("nan"))
