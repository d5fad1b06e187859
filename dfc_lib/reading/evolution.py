"""What RL and SFT from one base change: specific features, their evolution, and the compact set.

After arXiv 2604.25011. One crosscoder reads the same tokens in several models: the base and the
tuned ones, or all checkpoints of a run. A feature's decoder norms say in which of them it lives;
its code from one model alone says how strongly that model has it on a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dfc_lib import store
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data import activations
from dfc_lib.data.activations import Activations
from dfc_lib.data.pair import Pair, load_model
from dfc_lib.steering.prefix import padded

_BATCH = 64  # texts in one forward pass

Features = Int64[Tensor, " features"]  # indices, ascending


# --------------------------------------------------------------------------------------------------
# The same tokens through many models


def cache_models(
    sources: Mapping[str, str | Path],
    sequences: Sequence[Sequence[int]],
    layer: int,
    folder: str | Path,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Activations]:
    """Cache every token but the first of ``sequences`` through each model, one folder per model.

    One model is in memory at a time; what an earlier call has finished is kept.

    Args:
        sources: name -> folder or hub name.
        options: for ``activations.cache`` (``batch_size``, ``meta``, ``progress``).
    """
    caches = {}
    for name, source in sources.items():
        alone = Pair({name: load_model(source, device=device)}, None, layer)
        place = Path(folder) / name.replace(" ", "_")
        caches[name] = activations.cache(alone, sequences, place, positions="all", **options)
    return caches


@dataclass(frozen=True, eq=False)
class Streams:
    """Single-model caches of the same tokens, side by side: a source of activations to train on.

    With ``noise`` it is a null: what is specific to a noisy copy is the instrument's doing.

    Attributes:
        caches: of one model each, one per stream, in the order of the model axis; a cache may occur
            more than once.
        noise: per stream, the root mean square norm of isotropic Gaussian noise, raw units; none if
            empty. It repeats after 2**15 samples, so that it is a function of the index.
        seed: of the noise.

    Raises:
        ValueError: the caches are not of the same tokens.
    """

    caches: tuple[Activations, ...]
    noise: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        first, *others = self.caches
        for cache in others:
            if cache.layer != first.layer or not np.array_equal(cache.tokens.ids, first.tokens.ids):
                raise ValueError(
                    f"{cache.directory} and {first.directory} are not of the same tokens at one "
                    "layer; make both with one call of evolution.cache_models"
                )

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.caches[0].n

    @property
    def key(self) -> str:
        """16 hex digits that name the content."""
        noise = (self.noise, self.seed) if self.noise else ()
        return store.key([cache.key for cache in self.caches], noise)

    def gather(self, indices: Int64[np.ndarray, " batch"]) -> Float[Tensor, "batch model d_model"]:
        """The activations of all streams at some tokens, float32, raw units."""
        x = torch.cat([cache.gather(indices) for cache in self.caches], dim=1)
        return x + self._noise[np.asarray(indices) % len(self._noise)] if self.noise else x

    @cached_property
    def _noise(self) -> Float[Tensor, "bank model d_model"]:
        shape = (2**15, len(self.caches), self.caches[0].d_model)
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return draw * (torch.tensor(self.noise) / shape[2] ** 0.5)[:, None]


# --------------------------------------------------------------------------------------------------
# Specific features and their evolution


def nrn(crosscoder: Crosscoder, tuned: str, base: str) -> Float[Tensor, " d_dict"]:
    """Normalised relative norm ||W_dec[tuned]||_1 / (||W_dec[base]||_1 + ||W_dec[tuned]||_1).

    1: the tuned model's alone; 0.5: shared; 0: the base's alone; NaN: it writes to neither. Other
    models are not looked at. In normalised units, so that a model with longer activations has no
    advantage.
    """
    index = [crosscoder.partition.model(name) for name in (tuned, base)]
    norms = crosscoder.W_dec.detach()[:, index].abs().sum(-1)
    return norms[:, 0] / norms.sum(1)


def top_specific(
    score: Float[Tensor, " d_dict"], n: int, live: Bool[Tensor, " d_dict"]
) -> Features:
    """The ``n`` features of the highest ``score`` among the ``live`` ones; ties by index."""
    ranked = torch.where(live & score.isfinite(), score, -torch.inf)
    return ranked.argsort(descending=True, stable=True)[:n].sort().values


def overlap(a: Features, b: Features) -> float:
    """The share of the smaller set that is in the other one too; 0 if one of them is empty."""
    return len(set(a.tolist()) & set(b.tolist())) / max(1, min(len(a), len(b)))


# --------------------------------------------------------------------------------------------------
# The compact set


@torch.no_grad()
def own_code(
    crosscoder: Crosscoder, h: Float[Tensor, "batch d_model"], model: str | int
) -> Float[Tensor, "batch d_dict"]:
    """f(m): the code of one model's raw activations, every other stream at its mean."""
    return crosscoder.encode(h[:, None].expand(-1, crosscoder.n_models, -1), streams=[model])


def answer_codes(
    crosscoder: Crosscoder,
    pair: Pair,
    model: str,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    slot: str | None = None,
) -> Float[Tensor, "text d_dict"]:
    """Per text, the mean of f(m) over the tokens at which the answer is decided.

    These are the last token of the prompt and all tokens of the answer but its last. ``model`` is
    a name in the pair and in the crosscoder, ``texts`` token ids of prompt and answer, ``starts``
    the length of each prompt. ``slot``: read the model with another model's encoder (the *swap
    readout* of arXiv 2609.35210; default: its own).
    """
    rows, device = [], next(pair.models[model].parameters()).device
    for ids, start in zip(texts, starts, strict=True):
        h = activations.residual(pair.models[model], pair.layer, torch.tensor([ids], device=device))
        rows.append(own_code(crosscoder, h[0, start - 1 : -1].float(), slot or model).mean(0))
    return torch.stack(rows)


def select(scores: Float[Tensor, " d_dict"], share: float = 0.2) -> Features:
    """Features whose score is at least ``share`` of the largest; none if no score is positive."""
    return ((scores >= share * scores.max()) & (scores > 0)).nonzero()[:, 0]


def select_by_family(
    gain: Float[Tensor, "sample d_dict"], families: Sequence[str], share: float = 0.2
) -> tuple[dict[str, Features], Features]:
    """The set that ``select`` takes on each task family, and what is in all of these sets.

    ``gain`` is f(RL) - f(base), one row per sample that RL gets right and the base wrong; a
    feature's score is its mean over the family's samples.
    """
    labels = np.asarray(families)
    means = {name: gain[np.flatnonzero(labels == name)].mean(0) for name in np.unique(labels)}
    sets = {str(name): select(mean, share) for name, mean in means.items()}
    common = set.intersection(*(set(chosen.tolist()) for chosen in sets.values()))
    return sets, torch.tensor(sorted(common), dtype=torch.int64)


def half_overlaps(
    gain: Float[Tensor, "sample d_dict"],
    families: Sequence[str],
    rng: np.random.Generator,
    contrast: tuple[Float[Tensor, "other d_dict"], Sequence[str]],
    share: float = 0.2,
    resample: bool = False,
) -> dict[str, float]:
    """Overlap of the sets that ``select`` takes on halves of families, from one random split.

    All sets come from half a family's samples, so that the numbers can be compared.

    Args:
        contrast: other samples and their families, of which each has two or more; their sets are
            held against those of ``gain``.
        resample: draw each half's samples anew, with replacement, for a bootstrap. The halves of a
            family stay disjoint.

    Returns:
        ``within``, both halves of one family; ``between``, halves of two families; ``contrast``, a
        half of ``gain`` and a half of another family of the contrast; ``size``, mean features in a
        set. Means over families, over ordered pairs of families.
    """
    first, second = _halves(gain, families, rng, share, resample)
    others = _halves(*contrast, rng, share, resample)[1]
    within = float(np.mean([overlap(first[name], second[name]) for name in first]))
    size = float(np.mean([len(kept) for half in (first, second) for kept in half.values()]))
    across = {"between": _across(first, second), "contrast": _across(first, others)}
    return {"within": within} | across | {"size": size}


def _halves(
    gain: Tensor, families: Sequence[str], rng: np.random.Generator, share: float, resample: bool
) -> tuple[dict[str, Features], dict[str, Features]]:
    """The sets of the first and of the second half of each family's samples."""
    labels, halves = np.asarray(families), ({}, {})
    for name in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == name))
        for sets, samples in zip(halves, np.array_split(order, 2), strict=True):
            drawn = rng.choice(samples, len(samples)) if resample else samples
            sets[str(name)] = select(gain[drawn].mean(0), share)
    return halves


def _across(first: Mapping[str, Features], second: Mapping[str, Features]) -> float:
    """Mean overlap of a family's set in ``first`` with another family's in ``second``."""
    both = [(a, b) for x, a in first.items() for y, b in second.items() if x != y]
    return float(np.mean([overlap(a, b) for a, b in both]))


def matched_sets(
    chosen: Features,
    activation: Float[Tensor, " d_dict"],
    allowed: Bool[Tensor, " d_dict"],
    n_draws: int,
    seed: int = 0,
    nearest: int | None = 5,
) -> list[tuple[int, ...]]:
    """Random sets as large as ``chosen``, of other ``allowed`` features of like ``activation``.

    In random order, each feature is replaced by one of the ``nearest`` in mean activation that are
    not used yet; ``None`` draws from all. ``ValueError`` where too few others are allowed.
    """
    rng, level = np.random.default_rng(seed), activation.double().cpu().numpy()
    free = np.setdiff1d(np.flatnonzero(allowed.cpu().numpy()), chosen.numpy())
    if len(free) < len(chosen):
        raise ValueError(f"{len(free)} other features are allowed for {len(chosen)} chosen")
    draws = []
    for _ in range(n_draws):
        left, picked = free, []
        for feature in rng.permutation(chosen.numpy()):
            distance = np.abs(level[left] - level[feature])
            at = rng.choice(distance.argsort(kind="stable")[:nearest])
            picked.append(int(left[at]))
            left = np.delete(left, at)
        draws.append(tuple(sorted(picked)))
    return draws


@torch.no_grad()
def on_text(models: Mapping[str, Any], texts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """How models predict given texts (token ids), and how far that is from the first model's.

    Texts have two tokens or more. Returns one line per (text, model): ``text`` (index), ``model``,
    ``n`` tokens predicted (all but the first), ``nll`` (mean negative log-likelihood, nats), ``kl``
    (mean KL(first || model)).
    """
    order, rows = sorted(range(len(texts)), key=lambda i: len(texts[i])), []
    for items in (order[i : i + _BATCH] for i in range(0, len(order), _BATCH)):
        ids, at, lengths = padded([texts[i] for i in items], torch.device("cpu"))
        n, first = lengths - 1, None
        real = at[:, :-1] < n[:, None]  # the models are causal: they need no mask
        for name, model in models.items():
            on_device = ids.to(next(model.parameters()).device)
            logp = model(input_ids=on_device).logits[:, :-1].float().log_softmax(-1).cpu()
            first = logp if first is None else first
            kl = (first.exp() * (first - logp)).sum(-1)
            nll = -logp.gather(2, ids[:, 1:, None])[..., 0]
            row = {"text": items, "model": name, "n": n}
            for measure, x in (("nll", nll), ("kl", kl)):
                row[measure] = (torch.where(real, x, 0.0).sum(1) / n).tolist()
            rows.append(pd.DataFrame(row))
    return pd.concat(rows).sort_values("text", kind="stable", ignore_index=True)
