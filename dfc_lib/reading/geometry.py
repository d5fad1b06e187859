"""Decoder geometry: do the blocks of a partition form clusters, or is it the zeros?

A feature's vector is its decoder row, all models side by side: ``(d_dict, n_models * d_model)``. An
exclusive row is zero in one half *by construction*, which alone can separate the blocks; so
everything is also done on one model's half, without the rows that have none there (``half``), and
on dictionaries that have nothing but the zeros: random rows under the same mask
(``masked_random``), and a plain crosscoder's rows with random halves blanked (``masked``). Three
measures, all 0 at chance and 1 at best: whose block a row's nearest neighbours are of (``purity``),
whether planes separate the blocks (``separability``), and how clusters agree with them
(``recovery``), in the original space and on the UMAP plane. ``planted`` gives rows whose blocks lie
apart, on which a measure must succeed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dfc_lib.crosscoder.model import Crosscoder

METHODS = ("k-means", "HDBSCAN")


class Rows(NamedTuple):
    """Feature vectors and the block that each belongs to."""

    vectors: Float[np.ndarray, "feature width"]
    labels: Int[np.ndarray, " feature"]
    names: tuple[str, ...]  # of the labels


def decoder_rows(crosscoder: Crosscoder, alive: Sequence[int] | None = None) -> Rows:
    """The decoder rows of the features in ``alive`` (default: all), unit length, and their blocks.

    Rows of length zero are left out.
    """
    vectors = crosscoder.W_dec.detach().double().flatten(1).cpu().numpy()
    blocks = crosscoder.partition.blocks
    labels = np.repeat(np.arange(len(blocks)), [block.size for block in blocks])
    keep = slice(None) if alive is None else alive
    return _unit(Rows(vectors[keep], labels[keep], crosscoder.partition.names))


def half(rows: Rows) -> Rows:
    """The first model's part of every vector (two models); features that have none are dropped."""
    width = rows.vectors.shape[1] // 2
    return _unit(Rows(rows.vectors[:, :width], rows.labels, rows.names))


def masked_random(like: Mapping[str, int], d_model: int, seed: int = 0) -> Rows:
    """Initial weights under the partition's mask (two models): one Gaussian direction per feature,
    the same in every model that the feature belongs to; blocks of the sizes in ``like``.
    """
    direction = np.random.default_rng(seed).standard_normal((sum(like.values()), d_model))
    return masked(Rows(np.tile(direction, 2), np.zeros(len(direction), int), ("all",)), like, seed)


def matched_random(rows: Rows, like: Mapping[str, int], seed: int = 0) -> Rows:
    """The same vectors with random blocks of the sizes in ``like`` (the last block takes what is
    left).

    Raises:
        ValueError: the sizes exceed the number of features.
    """
    labels = _labels(np.random.default_rng(seed).permutation(len(rows.vectors)), like)
    return Rows(rows.vectors, labels, tuple(like))


def masked(rows: Rows, like: Mapping[str, int], seed: int = 0) -> Rows:
    """Random blocks as in ``matched_random``, with the B half blanked in the first block and the A
    half in the second: real geometry, arbitrary zeros (two models).
    """
    blocks = matched_random(rows, like, seed)
    vectors, width = blocks.vectors.copy(), blocks.vectors.shape[1] // 2
    vectors[blocks.labels == 0, width:] = 0
    vectors[blocks.labels == 1, :width] = 0
    return _unit(Rows(vectors, blocks.labels, blocks.names))


def matched_norm_ratio(rows: Rows, like: Mapping[str, int]) -> Rows:
    """The same vectors with blocks by r = ||A half|| / (||A half|| + ||B half||): the largest r are
    the first block, the smallest the second, the rest the last (two models, three blocks).

    Raises:
        ValueError: the sizes exceed the features.
    """
    norms = np.linalg.norm(rows.vectors.reshape(len(rows.vectors), 2, -1), axis=2)
    order = np.argsort(-norms[:, 0] / norms.sum(1), kind="stable")
    n_a, n_b, _ = like.values()
    a, rest, b = np.split(order, [n_a, len(order) - n_b])
    return Rows(rows.vectors, _labels(np.concatenate([a, b, rest]), like), tuple(like))


def _labels(order: np.ndarray, like: Mapping[str, int]) -> np.ndarray:
    edges = np.cumsum(list(like.values())[:-1])
    if edges[-1] >= len(order):
        raise ValueError(f"blocks of sizes {like} do not fit into {len(order)} features")
    labels = np.empty(len(order), dtype=np.int64)
    labels[order] = np.searchsorted(edges, np.arange(len(order)), side="right")
    return labels


def _unit(rows: Rows) -> Rows:
    norms = np.linalg.norm(rows.vectors, axis=1)
    keep = norms > 0
    return Rows(rows.vectors[keep] / norms[keep, None], rows.labels[keep], rows.names)


def planted(rows: Rows, seed: int = 0) -> Rows:
    """The same vectors and sizes of blocks with islands in them: blocks are dealt anew at random,
    and each block is moved by a vector's length in a random direction of its own.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(rows.labels)
    directions = rng.standard_normal((len(rows.names), rows.vectors.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return _unit(Rows(rows.vectors + directions[labels], labels, rows.names))


def purity(
    rows: Rows,
    blocks: Sequence[str],
    k: int = 10,
    n_permutations: int = 1_000,
    seed: int = 0,
) -> dict[str, float]:
    """Whose block the nearest neighbours of a block's rows are of, by cosine.

    The share of a row's ``k`` nearest neighbours (fewer where its block is smaller) in its own
    block, less that of permuted labels, which is (block - 1) / (all - 1), and divided by one less
    the same: 0 at chance, 1 where all are. Mean over the rows of a block, then over ``blocks``;
    asked of small blocks, for the neighbours of a large one are of it wherever they lie.

    Returns:
        ``purity`` and ``chance``, shares; ``above``, rescaled; of permuted labels ``above_null``
        (mean), ``above_null_low`` and ``above_null_high`` (2.5 and 97.5 %); all NaN without a block
        of two rows.
    """
    names = ("purity", "chance", "above", "above_null", "above_null_low", "above_null_high")
    sizes = np.bincount(rows.labels, minlength=len(rows.names))
    asked = [i for i, name in enumerate(rows.names) if name in blocks and sizes[i] > 1]
    if not asked:
        return dict.fromkeys(names, np.nan)
    cosine = rows.vectors @ rows.vectors.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : min(k, sizes[asked].max() - 1)]
    chance = (sizes[asked] - 1) / (len(rows.labels) - 1)

    def shares(labels: np.ndarray) -> np.ndarray:
        of = [nearest[labels == i, : min(k, sizes[i] - 1)] for i in asked]
        return np.array([(labels[n] == i).mean() for i, n in zip(asked, of, strict=True)])

    def above(shares: np.ndarray) -> float:
        return float(((shares - chance) / (1 - chance)).mean())

    rng, own = np.random.default_rng(seed), shares(rows.labels)
    null = [above(shares(rng.permutation(rows.labels))) for _ in range(n_permutations)]
    low, high = np.percentile(null, [2.5, 97.5]).tolist()
    values = (float(own.mean()), float(chance.mean()), above(own), float(np.mean(null)), low, high)
    return dict(zip(names, values, strict=True))


def separability(rows: Rows, seed: int = 0) -> float:
    """How well planes tell the blocks apart on rows that they were not fitted to.

    Balanced accuracy of a ridge classifier in five stratified folds, less 1 / blocks, and divided
    by one less the same: 0 at chance, 1 where all are told. NaN unless two blocks have two rows or
    more; smaller ones are left out.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    kept = np.bincount(rows.labels)[rows.labels] > 1
    vectors, labels = rows.vectors[kept], rows.labels[kept]
    _, sizes = np.unique(labels, return_counts=True)
    if len(sizes) < 2:
        return np.nan
    split = StratifiedKFold(min(5, int(sizes.min())), shuffle=True, random_state=seed)
    model = RidgeClassifier(class_weight="balanced")
    told = cross_val_predict(model, vectors, labels, cv=split)
    return balanced_accuracy_score(labels, told, adjusted=True)


def plane(
    vectors: Float[np.ndarray, "feature width"], seed: int = 0
) -> Float[np.ndarray, "feature 2"]:
    """UMAP on the cosine metric (arXiv 1802.03426): a picture, not a measurement."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, and that a seed means one thread
        import umap

        # init: the spectral start depends on an eigensolver's last bits
        options = {"metric": "cosine", "init": "pca", "random_state": seed, "n_jobs": 1}
        mapper = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), **options)
        return np.asarray(mapper.fit_transform(vectors), dtype=np.float64)


def cluster(
    points: Float[np.ndarray, "feature width"], method: str, n_clusters: int, seed: int = 0
) -> Int[np.ndarray, " feature"]:
    """Cluster labels; HDBSCAN's noise is -1, a label of its own.

    Raises:
        ValueError: an unknown method.
    """
    from sklearn.cluster import HDBSCAN, KMeans

    if method == "k-means":
        return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(points)
    if method == "HDBSCAN":
        size = max(5, len(points) // 50)
        return HDBSCAN(min_cluster_size=size, copy=True).fit_predict(points)
    raise ValueError(f"method={method!r}: one of {METHODS}")


def agreement(
    found: Int[np.ndarray, " feature"],
    blocks: Int[np.ndarray, " feature"],
    n_permutations: int = 1_000,
    seed: int = 0,
) -> dict[str, float]:
    """ARI and NMI of clusters and blocks, and of clusters and permuted blocks.

    Permuting labels is drawing contingency tables with both margins fixed (Patefield 1981), which
    is fast; the scores are scikit-learn's, written for many tables at once.

    Returns:
        ``clusters`` and ``noise`` (share of points in none); for ``ari`` and ``nmi`` the value,
        ``_null`` (mean), ``_null_low`` and ``_null_high`` (2.5 and 97.5 % of the permutations) and
        ``_p``, (1 + b) / (1 + m) with b permutations at least as large.
    """
    from scipy.stats import random_table
    from scipy.stats.contingency import crosstab

    table = crosstab(blocks, found).count
    drawn = np.repeat(table[None], n_permutations, axis=0)
    if 1 not in table.shape:  # with one cluster, or one block, permuting changes nothing
        drawn = random_table(table.sum(1), table.sum(0), seed=seed).rvs(n_permutations)
    row = {"clusters": float(len(set(found.tolist()) - {-1})), "noise": float((found == -1).mean())}
    for name, score in {"ari": _ari, "nmi": _nmi}.items():
        value, null = float(score(table)), score(drawn)
        low, high = np.percentile(null, [2.5, 97.5]).tolist()
        row |= {name: value, f"{name}_null": float(null.mean())}
        row |= {f"{name}_null_low": low, f"{name}_null_high": high}
        row[f"{name}_p"] = (1 + int((null >= value - 1e-12).sum())) / (1 + n_permutations)
    return row


def _ari(tables: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of contingency tables (..., block, cluster); Hubert and Arabie 1985."""

    def pairs(counts: np.ndarray) -> np.ndarray:
        return (counts * (counts - 1.0) / 2).sum(-1)

    flat = tables.reshape(*tables.shape[:-2], -1)
    together, rows, columns = pairs(flat), pairs(tables.sum(-1)), pairs(tables.sum(-2))
    expected = rows * columns / pairs(flat.sum(-1, keepdims=True))
    most = (rows + columns) / 2
    same = most == expected  # one cluster and one block
    return np.where(same, 1.0, (together - expected) / np.where(same, 1.0, most - expected))


def _nmi(tables: np.ndarray) -> np.ndarray:
    """Normalised mutual information, arithmetic mean of the entropies."""
    from scipy.stats import entropy

    blocks, clusters = entropy(tables.sum(-1), axis=-1), entropy(tables.sum(-2), axis=-1)
    joint = entropy(tables.reshape(*tables.shape[:-2], -1), axis=-1)
    mean = (blocks + clusters) / 2
    return np.where(mean == 0, 1.0, (blocks + clusters - joint) / np.where(mean == 0, 1.0, mean))


def recovery(rows: Rows, seed: int = 0, n_permutations: int = 1_000) -> pd.DataFrame:
    """How well clusters recover the blocks (two or more), in the original space and on the plane.

    Returns:
        one line per (space, method) with ``silhouette`` (of the blocks, not of the clusters) and
        the columns of ``agreement``.
    """
    from sklearn.metrics import silhouette_score

    spaces, lines = {"original": rows.vectors, "plane": plane(rows.vectors, seed)}, []
    n_blocks = len(np.unique(rows.labels))
    for space, points in spaces.items():
        silhouette = float(silhouette_score(points, rows.labels))
        for method in METHODS:
            found = cluster(points, method, n_blocks, seed)
            line = {"space": space, "method": method, "n": len(points), "silhouette": silhouette}
            lines.append(line | agreement(found, rows.labels, n_permutations, seed))
    return pd.DataFrame(lines)
