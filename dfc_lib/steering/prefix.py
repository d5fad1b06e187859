"""Attention to a prompt that many rows share, and running a part of a model's blocks.

Rows of one prompt read the same keys and values, which are held once per prompt and never copied
(:class:`Prefix`, :func:`attend`); their own tokens go into Hugging Face's ``DynamicCache``. Copying
the prompt's to each row (``DynamicCache.batch_select_indices``, PyTorch's own attention) takes 1.3
times the CPU time and 9 times the memory on the grid of ``benchmarks/steer_grid.py``. The
blocks, norms and heads are Hugging Face's own modules, called in their own order; only the
attention kernel is ours, registered through ``transformers.AttentionInterface``. Prompts are padded
on the *right*: under a causal mask no token sees what follows it, so padding changes nothing and
needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dfc_lib.data.pair import Pair, PairError, depth, in_chunks

POSITIONS = ("last", "every", "every_but_first")
ATTENTION = "dfc_lib_shared_prefix"
KeysValues = dict[int, tuple[Tensor, Tensor]]  # by block, each (row, kv_head, token, head_dim)


# ---------------------------------------------------------------------------------------------
# a shared prefix


class Prefix:
    """Keys and values of prompt tokens for a range of blocks, held once per group of rows.

    The rows of a group are laid out side by side, as a (group, slot) grid.

    Args:
        kv: by block, each (group, kv_head, token, head_dim).
        lengths: (group,), how many of the tokens are real.
        group: (row,), which group each row reads.
    """

    def __init__(self, kv: KeysValues, lengths: Tensor, group: Tensor) -> None:
        # Contiguous, or every product with them copies them first.
        self.kv = {i: (k.contiguous(), v.contiguous()) for i, (k, v) in kv.items()}
        self.lengths = lengths
        self._hide_padding()
        self._lay_out(group)

    def _hide_padding(self) -> None:
        longest = max(1, int(self.lengths.max()))  # of one column that is hidden, where all are 0
        self.kv = {i: (k[:, :, :longest], v[:, :, :longest]) for i, (k, v) in self.kv.items()}
        padding = torch.arange(longest, device=self.lengths.device) >= self.lengths[:, None]
        self.padding = padding[:, None, None] if bool(padding.any()) else None

    def _lay_out(self, group: Tensor) -> None:
        counts = torch.bincount(group, minlength=len(self.lengths))
        order = torch.argsort(group, stable=True)
        rank = torch.empty_like(group)
        first = counts.cumsum(0) - counts
        rank[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        self.group, self.slots = group, int(counts.max())
        self._cell = group * self.slots + rank
        cells = torch.arange(len(counts) * self.slots, device=group.device)
        self._full = len(group) == len(cells) and bool((self._cell == cells).all())

    def spread(self, x: Tensor) -> Tensor:
        """(row, ...) -> (group, slot, ...), empty slots zero."""
        if not self._full:
            empty = x.new_zeros(len(self.lengths) * self.slots, *x.shape[1:])
            x = empty.index_copy_(0, self._cell, x)
        return x.view(len(self.lengths), self.slots, *x.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        """(group, slot, ...) -> (row, ...)."""
        x = x.flatten(0, 1)
        return x if self._full else x[self._cell]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows alone (the name is that of ``DynamicCache``)."""
        group = self.group[rows]
        alive, relabelled = torch.unique(group, return_inverse=True)
        # Dropping a finished prompt copies all others, so wait until a quarter of them are.
        if len(alive) <= 0.75 * len(self.lengths):
            self.kv = {i: (k[alive], v[alive]) for i, (k, v) in self.kv.items()}
            self.lengths, group = self.lengths[alive], relabelled
            self._hide_padding()
        self._lay_out(group)


def attend(
    module: nn.Module,
    query: Float[Tensor, "row head token head_dim"],
    key: Float[Tensor, "row kv_head own_token head_dim"],
    value: Float[Tensor, "row kv_head own_token head_dim"],
    attention_mask: Tensor | None,
    scaling: float,
    prefixes: dict[int, Prefix] | None = None,
    **_: object,
) -> tuple[Float[Tensor, "row token head head_dim"], None]:
    """Attention of one new token per row over its group's shared prefix and its own suffix.

    One softmax over both parts, computed from a common maximum. Without prefixes: causal attention.
    """
    if prefixes is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)

    rows, heads, _one, size = query.shape
    kv_heads = key.shape[1]
    query = query.view(rows, kv_heads, heads // kv_heads, size) * scaling
    own = (query @ key.transpose(2, 3)).float()  # (row, kv_head, head per kv_head, own_token)
    prefix = prefixes[module.layer_idx]
    shared_key, shared_value = prefix.kv[module.layer_idx]

    # Rows of a group side by side: one matrix product per group and head reads its keys once.
    per_kv = heads // kv_heads
    grid = prefix.spread(query).transpose(1, 2)  # (group, kv_head, slot, head per kv_head, size)
    stacked = grid.reshape(len(grid), kv_heads, prefix.slots * per_kv, size)
    shared = (stacked @ shared_key.transpose(2, 3)).float()
    if prefix.padding is not None:
        shared.masked_fill_(prefix.padding, -torch.inf)

    def back(x: Tensor) -> Tensor:  # (group, kv_head, slot * head per kv_head, n) -> rows
        x = x.view(len(x), kv_heads, prefix.slots, per_kv, x.shape[-1])
        return prefix.collect(x.transpose(1, 2))

    top = back(shared.amax(-1, keepdim=True)).maximum(own.amax(-1, keepdim=True))
    own = own.sub_(top).exp_()
    top = prefix.spread(top).transpose(1, 2).reshape(*shared.shape[:3], 1)
    shared = shared.sub_(top).exp_()
    total = back(shared.sum(-1, keepdim=True)) + own.sum(-1, keepdim=True)
    out = back(shared.to(value.dtype) @ shared_value) + own.to(value.dtype) @ value
    return (out / total).to(query.dtype).reshape(rows, 1, heads, size), None


@contextmanager
def shared_prefix_attention(models: Sequence[nn.Module]) -> Iterator[None]:
    AttentionInterface.register(ATTENTION, attend)
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.config._attn_implementation = ATTENTION
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.config._attn_implementation = name


# ---------------------------------------------------------------------------------------------
# running some of the blocks


class Stream:
    """One model, run in parts: ``lower`` are its blocks up to the site, ``upper`` those above."""

    def __init__(self, model: nn.Module, site: int | None = None) -> None:
        windowed = ["sliding_attention"] if getattr(model.config, "sliding_window", None) else None
        kinds = set(getattr(model.config, "layer_types", windowed) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise PairError(
                f"{type(model).__name__}: only full attention is supported, not {kinds}."
            )
        self.model, self.body, self.dtype = model, model.model, model.dtype
        self.device = next(model.parameters()).device
        site = depth(model) - 1 if site is None else site
        self.lower, self.upper = range(site + 1), range(site + 1, depth(model))

    def embed(self, tokens: Int[Tensor, "row token"]) -> Float[Tensor, "row token d_model"]:
        return self.body.embed_tokens(tokens)

    def blocks(
        self,
        which: range,
        hidden: Float[Tensor, "row token d_model"],
        positions: Int[Tensor, "row token"],
        cache: DynamicCache | None,
        prefixes: dict[int, Prefix] | None = None,
    ) -> Float[Tensor, "row token d_model"]:
        rotary = self.body.rotary_emb(hidden, positions)
        for i in which:
            hidden = self.body.layers[i](
                hidden, position_embeddings=rotary, past_key_values=cache, prefixes=prefixes
            )
        return hidden

    def logits(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        return self.model.lm_head(self.body.norm(hidden)).float()


# ---------------------------------------------------------------------------------------------
# reading prompts


def longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The prompts' indices from the longest to the shortest.

    Like lengths together waste least on padding; the longest first fail first if memory is short.

    Raises:
        ValueError: a prompt is empty.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token.")
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token"], Int[Tensor, " prompt"]]:
    """Token ids padded on the right with 0, their positions, and the prompts' lengths."""
    ids = pad_sequence([torch.as_tensor(prompt) for prompt in prompts], batch_first=True)
    at = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return ids.to(device), at, torch.tensor([len(prompt) for prompt in prompts], device=device)


def acted_on(at: Tensor, lengths: Tensor, position: str) -> Bool[Tensor, "prompt token"]:
    """Where an intervention at more than the last token acts: not on padding."""
    return (at < lengths[:, None]) & (at >= (1 if position == "every_but_first" else 0))


def to_site(
    streams: Sequence[Stream], runs: Sequence[bool], ids: Tensor, at: Tensor
) -> tuple[Float[Tensor, "prompt token model d_model"], list[KeysValues]]:
    """Residuals at the site, and each model's keys and values up to it.

    A model that no cell reads (``runs`` is false) stands as NaN, so that a misuse shows.
    """
    caches = [DynamicCache() for _ in streams]
    hidden = [
        stream.blocks(stream.lower, stream.embed(ids), at, cache) if run else None
        for stream, run, cache in zip(streams, runs, caches, strict=True)
    ]
    nan = torch.full_like(next(h for h in hidden if h is not None), torch.nan)
    return torch.stack([nan if h is None else h for h in hidden], 2), list(map(keys_values, caches))


def keys_values(cache: DynamicCache) -> KeysValues:
    """What blocks have handed over, by block."""
    filled = {i: layer for i, layer in enumerate(cache.layers) if layer.is_initialized}
    return {i: (layer.keys, layer.values) for i, layer in filled.items()}


class Read(NamedTuple):
    """A batch of prompts, read: residuals at the site at their last tokens, ``hidden`` (prompt,
    model, d_model); the target's keys and values up to the site, and above it, where the last token
    is left out; ``lengths`` (prompt,).
    """

    hidden: Tensor
    lower: KeysValues
    upper: KeysValues
    lengths: Tensor


def read(
    streams: Sequence[Stream], runs: Sequence[bool], target: int, prompts: Sequence[Sequence[int]]
) -> Read:
    """Run prompts through the blocks up to the site, and the target's earlier tokens above it."""
    stream, upper = streams[target], DynamicCache()
    ids, at, lengths = padded(prompts, stream.device)
    hidden, lower = to_site(streams, runs, ids, at)
    # Above the site, earlier tokens are the same in every cell. Prompts of one token have none; the
    # one column kept for them is hidden by its length of 0.
    earlier = hidden[:, : max(1, ids.shape[1] - 1), target]
    stream.blocks(stream.upper, earlier, at[:, : earlier.shape[1]], upper)
    last = torch.arange(len(prompts), device=stream.device), lengths - 1
    return Read(hidden[last], lower[target], keys_values(upper), lengths)


class PrefixCache:
    """Prompts that the models of a pair have read once, for many calls of ``generation.generate``.

    Where a call has few cells, reading the prompts is most of its work. Kept are the residuals at
    the site, ``h`` (prompt, model, d_model) at the last tokens, and, in main memory, all keys and
    values: for each model 2 x blocks x kv_heads x head_dim numbers a token (``tools.budget``).

    Args:
        prompts: token ids, one list each, of any lengths.
        batch_size: prompts read at once, halved when memory runs out.
    """

    @torch.no_grad()
    def __init__(self, pair: Pair, prompts: Sequence[Sequence[int]], batch_size: int = 32) -> None:
        models = list(pair.models.values())
        streams = [Stream(model, pair.layer) for model in models]
        self.pair, self._streams = pair, streams
        self._row = {tuple(p): i for i, p in enumerate(prompts)}
        self.h = torch.empty(len(prompts), len(models), pair.d_model, device=streams[0].device)
        # Per model and prompt, without padding: up to the site and above.
        self._kv: list[list[KeysValues]] = [[{} for _ in prompts] for _ in models]

        def work(t: int, items: list[int], _size: int) -> None:
            only = [m == t for m in range(len(models))]
            found = read(streams, only, t, [prompts[i] for i in items])
            self.h[items, t] = found.hidden[:, t].float()
            for block, both in (found.lower | found.upper).items():
                keys, values = (x.cpu() for x in both)
                for row, i in enumerate(items):
                    n = len(prompts[i])
                    self._kv[t][i][block] = keys[row, :, :n].clone(), values[row, :, :n].clone()

        order = longest_first(prompts)
        with shared_prefix_attention(models):
            for t in range(len(models)):
                for _ in in_chunks(order, lambda _: 1, batch_size, partial(work, t)):
                    pass

    def check(self, pair: Pair, prompts: Sequence[Sequence[int]]) -> None:
        """
        Raises:
            ValueError: it was read by another pair, or without some of these prompts.
        """
        if pair is not self.pair:
            raise ValueError("prefix_cache: read by another pair; make one of this pair.")
        if new := [i for i, prompt in enumerate(prompts) if tuple(prompt) not in self._row]:
            raise ValueError(f"prefix_cache: prompts[{new[0]}] is not among those it has read.")

    def of(self, prompts: Sequence[Sequence[int]], target: int) -> Read:
        """What reading just these prompts would have given."""
        rows = [self._row[tuple(prompt)] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.h.device)

        def together(block: int, which: int) -> Tensor:
            parts = [self._kv[target][row][block][which].transpose(0, 1) for row in rows]
            return pad_sequence(parts, batch_first=True).transpose(1, 2).to(self.h.device)

        def of_blocks(blocks: range) -> KeysValues:
            return {block: (together(block, 0), together(block, 1)) for block in blocks}

        stream = self._streams[target]
        return Read(self.h[rows], of_blocks(stream.lower), of_blocks(stream.upper), lengths)
