"""Residual-stream activations of all models of a pair on the same tokens: cached, read, linted.

The forward pass stops at the site, so no block above it is computed. Sequences are bucketed by
length and padded on the *right*: under a causal mask no token sees what follows it, so the values
are those of the unpadded sequence and attention needs no mask. Vectors go to sharded safetensors,
one series of shards per model; a killed run goes on after its last finished shard.

A cache directory holds::

    manifest.json        what is cached (key, models, layer, code, ...); each shard's rows, SHA-256
    rows.parquet         one line per vector: sequence, position, token, and what ``meta`` says
    tokens.safetensors   the token ids themselves
    A-00000.safetensors  "h": (rows of this shard, d_model)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from dfc_lib.data.pair import Pair, fingerprint, in_chunks, width
from dfc_lib.provenance import code_hash
import pandas as pd
from dfc_lib.store import damage, key, save_tensors, sha256, write_atomically


MANIFEST, ROWS, TOKENS = "manifest.json", "rows.parquet", "tokens.safetensors"
_SAMPLE = 32  # rows that linting recomputes
_ROWS_PER_SHARD = 65_536


class CacheError(RuntimeError):
    """A cache is missing, unfinished, damaged or not the one meant; says which file, what to do."""


class _SiteReached(Exception):
    """Raised by the hook at the site to leave the forward pass."""


@torch.no_grad()
def last_token_by_layer(
    model: nn.Module, ids: Int[Tensor, "sequence token"]
) -> Float[Tensor, "layer sequence d_model"]:
    """Residual stream at the last position after every block, the model's dtype."""
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    below = out.hidden_states[1:-1]  # the last entry is normalised
    return torch.stack([h[:, -1] for h in (*below, residual(model, len(below), ids))])


@torch.no_grad()
def residual(
    model: nn.Module,
    layer: int,
    ids: Int[Tensor, "sequence token"],
    attention_mask: Int[Tensor, "sequence token"] | None = None,
) -> Float[Tensor, "sequence token d_model"]:
    """Residual stream after block ``layer`` (from 0), the model's dtype; nothing above it is run.

    Equal, bit for bit, to ``model(ids, output_hidden_states=True).hidden_states[layer + 1]`` (below
    the last block, whose entry there is normalised).
    """
    found: list[Tensor] = []

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _SiteReached

    with model.model.layers[layer].register_forward_hook(leave), suppress(_SiteReached):
        model.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    return found[0]


# ---------------------------------------------------------------------------------------------
# writing


def cache(
    pair: Pair,
    sequences: Sequence[Sequence[int]],
    out_dir: str | Path,
    positions: Literal["last", "all"] = "last",
    batch_size: int = 32,
    meta: pd.DataFrame | Mapping[str, Sequence[Any]] | None = None,
    *,
    progress: bool = True,
) -> Activations:
    """Cache the residual at ``pair.layer`` of every model on every sequence, and open the result.

    Args:
        sequences: token ids, one list each; the same ids go through every model.
        positions: ``"last"`` token of each sequence, or ``"all"`` tokens but the first (whose
            residual is an attention sink, the same for any text).
        batch_size: sequences per forward pass; halved by itself when memory runs out.
        meta: one entry per sequence and column, e.g. ``split``, ``label``; copied to each row.

    A killed run is taken up by the same call: finished shards whose checksum holds are kept, unless
    the code that makes them has changed. Raises :class:`CacheError` where ``out_dir`` holds another
    cache.
    """
    if positions not in ("last", "all"):
        raise ValueError(f'positions={positions!r}: must be "last" or "all".')
    out_dir, tokens = Path(out_dir), Tokens.of(sequences, at_least=1 if positions == "last" else 2)
    rows = _row_table(tokens, positions, meta)
    arrays = {"ids": torch.from_numpy(tokens.ids), "offsets": torch.from_numpy(tokens.offsets)}
    content = {TOKENS: save(arrays), ROWS: rows.to_parquet(index=False)}
    manifest = {
        "models": {name: fingerprint(model) for name, model in pair.models.items()},
        "layer": pair.layer,
        "d_model": pair.d_model,
        "positions": positions,
        "content": {name: hashlib.sha256(file).hexdigest() for name, file in content.items()},
        "code": code_hash(__name__),
    }
    manifest["key"] = key(manifest)
    manifest["shards"] = [
        {"file": f"{name}-{i:05d}.safetensors", "model": name, "rows": bounds, "sha256": None}
        for name in pair.models
        for i, bounds in enumerate(_shard_bounds(rows))
    ]
    _take_over_finished(manifest, out_dir)
    for name, file in content.items():
        write_atomically(out_dir / name, file)
    write_atomically(out_dir / MANIFEST, json.dumps(manifest, indent=1))
    total = len(rows) * len(pair.models)
    with tqdm(total=total, unit=" vectors", disable=not progress, dynamic_ncols=True) as bar:
        for shard in manifest["shards"]:
            part, model = rows.iloc[slice(*shard["rows"])], pair.models[shard["model"]]
            if shard["sha256"] is not None:
                bar.update(len(part))
                continue
            h = _vectors(model, pair.layer, tokens, part, batch_size, bar)
            save_tensors({"h": h}, out_dir / shard["file"])
            shard["sha256"] = sha256(out_dir / shard["file"])
            write_atomically(out_dir / MANIFEST, json.dumps(manifest, indent=1))
    return Activations.open(out_dir)


@dataclass(frozen=True)
class Tokens:
    """Token ids of many sequences, one after the other, as ``tokens.safetensors`` holds them."""

    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (sequences + 1,) int64

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], at_least: int = 0) -> Tokens:
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        if len(lengths) == 0:
            raise ValueError("sequences: empty, there is nothing to cache.")
        if lengths.min() < at_least:
            i = int(lengths.argmin())
            raise ValueError(f"sequences[{i}] has {lengths[i]} tokens; at least {at_least} needed.")
        ids = np.concatenate([np.asarray(s, dtype=np.int32) for s in sequences])
        return Tokens(ids, np.concatenate([[0], lengths.cumsum()]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def prefix_hashes(self) -> np.ndarray:
        """(tokens,) uint64: equal where two tokens end the same prefix, that is, where a causal
        model must give both the same vector. Multilinear in the ids, modulo 2**64."""
        odd = (
            np.random.default_rng(0).integers(0, 2**63, self.lengths.max(), dtype=np.uint64) * 2 + 1
        )
        position = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.lengths)
        running = np.cumsum((self.ids.astype(np.uint64) + 1) * odd[position], dtype=np.uint64)
        before = np.concatenate([[np.uint64(0)], running])[self.offsets[:-1]]
        return running - np.repeat(before, self.lengths)


def _row_table(tokens: Tokens, positions: str, meta: Any) -> pd.DataFrame:
    """One line per vector: sequence, position in it, token id, meta."""
    n = tokens.lengths
    if positions == "last":
        sequence, position = np.arange(len(tokens)), n - 1
    else:
        sequence = np.repeat(np.arange(len(tokens)), n - 1)
        position = np.concatenate([np.arange(1, length) for length in n])
    token = tokens.ids[tokens.offsets[sequence] + position]
    table = pd.DataFrame({"sequence": sequence, "position": position, "token": token})
    if meta is None:
        return table
    meta = pd.DataFrame(meta).reset_index(drop=True)
    if len(meta) != len(tokens):
        raise ValueError(f"meta has {len(meta)} entries for {len(tokens)} sequences.")
    return table.join(meta.iloc[sequence].reset_index(drop=True))  # no column may be there already


def _shard_bounds(rows: pd.DataFrame) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``_ROWS_PER_SHARD`` rows that split no sequence."""
    start, ends = 0, np.bincount(rows["sequence"]).cumsum()
    while start < len(rows):
        ahead = ends[ends > start]
        stop = int(ahead[ahead <= start + _ROWS_PER_SHARD].max(initial=ahead[0]))
        yield start, stop
        start = stop


def _vectors(
    model: nn.Module,
    layer: int,
    tokens: Tokens,
    rows: pd.DataFrame,
    batch_size: int,
    bar: Any,
) -> Float[Tensor, "row d_model"]:
    """One model's vectors for ``rows`` (whole sequences), in their order, on the CPU."""
    parameter = next(model.parameters())
    out = torch.empty(len(rows), width(model), dtype=parameter.dtype)
    sequence, first = np.unique(rows["sequence"].to_numpy(), return_index=True)
    spans = [slice(a, b) for a, b in zip(first, [*first[1:], len(rows)], strict=True)]
    position = torch.from_numpy(rows["position"].to_numpy(copy=True))

    def run(items: Sequence[int], _size: int) -> None:
        texts = [torch.from_numpy(tokens[sequence[i]]).long() for i in items]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        h = residual(model, layer, ids.to(parameter.device))
        for vectors, i in zip(h, items, strict=True):
            out[spans[i]] = vectors[position[spans[i]].to(h.device)].to("cpu")
            bar.update(spans[i].stop - spans[i].start)

    # Like lengths together; the longest first, so that memory runs short early or never.
    order = sorted(range(len(spans)), key=lambda i: -len(tokens[sequence[i]]))
    for _ in in_chunks(order, lambda _: 1, batch_size, run):
        pass
    return out


def _take_over_finished(manifest: dict, out_dir: Path) -> None:
    """Mark as done what an earlier run of the same cache has finished, after checking it."""
    if not (out_dir / MANIFEST).exists():
        return
    earlier = _read_manifest(out_dir)
    different = [
        k for k in manifest if k not in ("key", "shards") and earlier.get(k) != manifest[k]
    ]
    if "code" in different:
        return  # made by other code, which may describe the same request otherwise: make it anew
    if different:
        raise CacheError(
            f"{out_dir}: holds another cache (it differs in {', '.join(different)}). Give another "
            "folder, or delete this one."
        )
    finished = {shard["file"]: shard["sha256"] for shard in earlier["shards"]}
    for shard in manifest["shards"]:
        digest = finished[shard["file"]]
        if digest and not damage(out_dir / shard["file"], digest):
            shard["sha256"] = digest


def _read_manifest(out_dir: Path) -> dict:
    path = out_dir / MANIFEST
    if not path.is_file():
        raise CacheError(
            f"{path}: missing, so this is no cache. Make it with activations.cache(...)."
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CacheError(f"{path}: damaged ({error}). Delete {out_dir} and cache again.") from error


# ---------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Activations:
    """A finished cache, memory-mapped: opening reads no vector until one is asked for.

    ``rows`` is a DataFrame with one line per vector; ``tokens[i]`` the ids of sequence ``i``;
    ``key`` 16 hex digits that name the content (models, layer, tokens, meta, code).
    """

    directory: Path
    key: str
    names: tuple[str, ...]
    layer: int
    d_model: int
    positions: str
    rows: pd.DataFrame
    tokens: Tokens
    _shards: list[list[Tensor]]  # [model][shard], memory-mapped

    @staticmethod
    def open(directory: str | Path) -> Activations:
        """Open a cache, after comparing every file with its SHA-256 (about 1 s per GB).

        Raises :class:`CacheError` naming the file and the remedy.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        redo = "Run the same activations.cache(...) again: it redoes this and keeps the rest."
        digests = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        for name, digest in (digests | manifest["content"]).items():
            if digest is None:
                why = "not finished, its run was interrupted"
            else:
                why = damage(directory / name, digest)
            if why:
                raise CacheError(f"{directory / name}: {why}. {redo}")
        rows, arrays = pd.read_parquet(directory / ROWS), load_file(directory / TOKENS)
        tokens = Tokens(arrays["ids"].numpy(), arrays["offsets"].numpy())
        shards: dict[str, list[Tensor]] = {name: [] for name in manifest["models"]}
        for shard in manifest["shards"]:
            shards[shard["model"]].append(load_file(directory / shard["file"])["h"])
        return Activations(
            directory,
            names=tuple(shards),
            rows=rows,
            tokens=tokens,
            **{name: manifest[name] for name in ("key", "layer", "d_model", "positions")},
            _shards=list(shards.values()),
        )

    @property
    def n(self) -> int:
        """Number of vectors (per model)."""
        return len(self.rows)

    def where(self, **conditions: Any) -> Int[Tensor, " row"]:
        """Indices of the rows whose columns equal the given values: ``where(split="ranking")``."""
        if unknown := conditions.keys() - self.rows:
            raise ValueError(f"no column {unknown.pop()!r}; there are {', '.join(self.rows)}.")
        same = self.rows[list(conditions)] == pd.Series(conditions)
        return torch.from_numpy(np.flatnonzero(same.all(axis=1)))

    def gather(
        self, indices: Int[Tensor, " row"] | Sequence[int]
    ) -> Float[Tensor, "row model d_model"]:
        """The vectors at ``indices``, of all models, in that order; float32."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.n:
            raise IndexError(f"indices must lie in 0..{self.n - 1}.")
        out = torch.empty(len(indices), len(self.names), self.d_model)
        starts = torch.tensor([0, *map(len, self._shards[0])]).cumsum(0)
        shard = torch.searchsorted(starts, indices, right=True) - 1
        for s in shard.unique().tolist():
            here = (shard == s).nonzero()[:, 0]
            local = indices[here] - starts[s]
            for m, of_model in enumerate(self._shards):
                out[here, m] = of_model[s][local].float()
        return out

    def to_tensor(self) -> Float[Tensor, "row model d_model"]:
        """All vectors, in memory; float32."""
        return torch.stack([torch.cat(s).float() for s in self._shards], dim=1)


# ---------------------------------------------------------------------------------------------
# linting


def lint(
    acts: Activations,
    pair: Pair,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What a cache should be checked for before anything is trained on it.

    Returns one line per check: ``check``, ``passed``, ``value``, ``limit``, ``meaning``.

    - *last token*: every row of a ``"last"`` cache stands on its sequence's last token.
    - *token ids*: each row's token id is the one at that position.
    - *from scratch*: 32 rows (drawn with ``seed``) recomputed one sequence at a
      time, without batch or padding, from the last (or stated) token; largest ||difference|| /
      ||vector||. The limit is 0.1 %, and 5 % in 16 bits, where batches of another size round
      otherwise.
    - *non-finite*: vectors with NaN or infinity.
    - *duplicate vectors*: share of rows that repeat another's token prefix, and so its vector (not
      counted on the vectors, which rounding makes differ between batches). The limit is 1 % for
      ``"last"``, 50 % for ``"all"``, where texts share their first tokens.
    - *duplicate sequences*: sequences that occur more than once.
    - *split overlap*: sequences that occur in more than one value of the column ``split``.
    - *passes* (needs ``steps`` and ``batch_size``): how often training sees each unique vector, at
      most 20; S1's 9,000 steps of 1,024 on 80,000 vectors are 115.
    """
    last = acts.positions == "last"
    rows, tokens = acts.rows, acts.tokens
    sequence, position = rows["sequence"].to_numpy(), rows["position"].to_numpy()
    at = tokens.offsets[sequence] + position
    hashes = tokens.prefix_hashes()
    whole = hashes[tokens.offsets[1:] - 1]  # one per sequence
    unique = len(np.unique(hashes[at]))
    out: list[dict[str, Any]] = []

    def check(name: str, value: float, limit: float, meaning: str) -> None:
        line = {"check": name, "passed": bool(value <= limit), "value": value, "limit": limit}
        out.append(line | {"meaning": meaning})

    if last:
        wrong = int((position != tokens.lengths[sequence] - 1).sum())
        check("last token", wrong, 0, "rows that do not stand on the last prompt token")
    wrong = int((tokens.ids[at] != rows["token"].to_numpy()).sum())
    check("token ids", wrong, 0, "rows on padding or on another token")
    rounds = any(h.element_size() < 4 for shards in acts._shards for h in shards)
    meaning = f"largest relative error of {_SAMPLE} recomputed rows"
    check("from scratch", _from_scratch(acts, pair, seed), 5e-2 if rounds else 1e-3, meaning)
    bad = sum(int((~torch.isfinite(h)).any(1).sum()) for shards in acts._shards for h in shards)
    check("non-finite", bad, 0, "vectors with NaN or infinity")
    limit = 0.01 if last else 0.5
    check("duplicate vectors", 1 - unique / acts.n, limit, "share of rows that repeat another")
    repeated = (len(whole) - len(np.unique(whole))) / len(whole)
    check("duplicate sequences", repeated, limit, "share of sequences that repeat another")
    if "split" in rows:
        pairs = pd.DataFrame({"text": whole[sequence], "split": rows["split"].to_numpy()})
        splits = pairs.drop_duplicates().groupby("text").size()
        check("split overlap", int((splits > 1).sum()), 0, "sequences that are in several splits")
    if steps is not None and batch_size is not None:
        passes = steps * batch_size / unique
        check("passes", passes, 20.0, "times that training sees each unique vector")
    return pd.DataFrame(out)


def _from_scratch(acts: Activations, pair: Pair, seed: int) -> float:
    """Largest ||cached - recomputed|| / ||recomputed|| over sampled rows and all models.

    For a "last" cache the recomputed vector is the *last* token's, whatever the row table says.
    """
    index = np.random.default_rng(seed).choice(acts.n, min(_SAMPLE, acts.n), replace=False)
    cached, worst = acts.gather(index), 0.0
    for vectors, i in zip(cached, index, strict=True):
        row = acts.rows.iloc[i]
        ids = torch.from_numpy(acts.tokens[row["sequence"]]).long()[None]
        at = -1 if acts.positions == "last" else row["position"]
        for vector, model in zip(vectors, pair.models.values(), strict=True):
            h = residual(model, acts.layer, ids.to(next(model.parameters()).device))[0, at]
            h = h.float().cpu()
            worst = max(worst, float((vector - h).norm() / h.norm()))
    return worst
