"""Generation under interventions: a whole grid of variants from one prefill.

A prompt under an intervention at its last token shares nearly everything with the same prompt under
any other one: all keys and values of the earlier tokens, and all blocks up to the site. So each
prompt is run once; per variant only its *last token* is redone, through the blocks above the site;
then all (prompt, variant) rows decode together. Rows of one prompt read the same keys and values,
which are held once per prompt, never copied (``_attend``); a row that has emitted the end token
leaves the batch. With ``position="every"`` the blocks above the site are rerun on the whole prompt
per variant, and the intervention is applied again at each generated token.

The blocks, norms and heads are Hugging Face's own modules, called in their own order; only the
attention kernel is ours, registered through ``transformers.AttentionInterface``. Prompts are padded
on the *right*: under a causal mask no token sees what follows it, so padding changes nothing and
needs no mask. :func:`generate_reference` is the plain loop that all this must equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dfc_lib.data.activations import residual
from dfc_lib.data.pair import Pair, PairError, depth, fingerprint, in_chunks
from dfc_lib.steering.interventions import Clean, Intervention, Site, apply, key
from dfc_lib.store import write_atomically

if TYPE_CHECKING:
    import pandas as pd

Position = Literal["last", "every", "every_but_first"]
POSITIONS = ("last", "every", "every_but_first")
GENERATION_VERSION = 1  # raise it when the same cell would give other tokens: kept ones are redone


class GenerationError(RuntimeError):
    """A folder of finished generations is damaged or belongs to another run; says what to do."""


ATTENTION = "dfc_lib_shared_prefix"


# ---------------------------------------------------------------------------------------------
# keys and values


class _Record:
    """Stands in for a KV cache during the prefill: keeps what each block hands over."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object):
        self.kv[layer] = keys, values
        return keys, values


class _Suffix:
    """Keys and values of the tokens after the shared prefix, one buffer per block and row.

    The buffers double when full; ``torch.cat`` at each step would copy them every time.
    """

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.length: dict[int, int] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object):
        n = self.length.get(layer, 0)
        if layer not in self.kv or n == self.kv[layer][0].shape[2]:
            rows, heads, _, size = keys.shape
            grown = [keys.new_empty(rows, heads, max(16, 2 * n), size) for _ in range(2)]
            for new, old in zip(grown, self.kv.get(layer, ()), strict=False):
                new[:, :, :n] = old
            self.kv[layer] = grown[0], grown[1]
        buffers = self.kv[layer]
        buffers[0][:, :, n] = keys[:, :, 0]
        buffers[1][:, :, n] = values[:, :, 0]
        self.length[layer] = n + 1
        return buffers[0][:, :, : n + 1], buffers[1][:, :, : n + 1]

    def keep(self, rows: Tensor) -> None:
        self.kv = {i: (k[rows], v[rows]) for i, (k, v) in self.kv.items()}


class _Layout:
    """Which group (prompt) each row reads from, and its slot there: rows <-> (group, slot) grid."""

    def __init__(self, group: Tensor, groups: int) -> None:
        counts = torch.bincount(group, minlength=groups)
        order = torch.argsort(group, stable=True)
        rank = torch.empty_like(group)
        first = counts.cumsum(0) - counts
        rank[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        self.group, self.groups, self.slots = group, groups, int(counts.max())
        self.flat = group * self.slots + rank
        cells = torch.arange(groups * self.slots, device=group.device)
        self.full = len(group) == len(cells) and bool((self.flat == cells).all())

    def spread(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (group, slot, ...), empty slots zero."""
        if not self.full:
            x = x.new_zeros(self.groups * self.slots, *x.shape[1:]).index_copy_(0, self.flat, x)
        return x.view(self.groups, self.slots, *x.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        """(group, slot, ...) -> (rows, ...)."""
        x = x.reshape(self.groups * self.slots, *x.shape[2:])
        return x if self.full else x[self.flat]


class _Prefix:
    """Keys and values of prompt tokens for a range of blocks, held once per group of rows.

    ``kv``: block -> two tensors (group, kv_head, token, head_dim); ``lengths``: (group,) how many
    tokens are real; ``group``: (rows,) which group each row reads.
    """

    def __init__(
        self, kv: dict[int, tuple[Tensor, Tensor]], lengths: Tensor, group: Tensor
    ) -> None:
        # Contiguous, or every product with them copies them first.
        self.kv = {i: (k.contiguous(), v.contiguous()) for i, (k, v) in kv.items()}
        self.lengths, self.layout = lengths, _Layout(group, len(lengths))
        self._mask()

    def _mask(self) -> None:
        longest = int(self.lengths.max())
        self.kv = {i: (k[:, :, :longest], v[:, :, :longest]) for i, (k, v) in self.kv.items()}
        padding = torch.arange(longest, device=self.lengths.device) >= self.lengths[:, None]
        self.padding = padding[:, None, None] if bool(padding.any()) else None

    def keep(self, rows: Tensor) -> None:
        group = self.layout.group[rows]
        alive, relabelled = torch.unique(group, return_inverse=True)
        # Dropping a finished prompt copies all others, so wait until a quarter of them are.
        if len(alive) <= 0.75 * len(self.lengths):
            self.kv = {i: (k[alive], v[alive]) for i, (k, v) in self.kv.items()}
            self.lengths, group = self.lengths[alive], relabelled
            self._mask()
        self.layout = _Layout(group, len(self.lengths))


def _attend(
    module: nn.Module,
    query: Float[Tensor, "row head token head_dim"],
    key: Float[Tensor, "row kv_head own_token head_dim"],
    value: Float[Tensor, "row kv_head own_token head_dim"],
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    prefixes: dict[int, _Prefix] | None = None,
    **_: object,
) -> tuple[Float[Tensor, "row token head head_dim"], None]:
    """Attention of one new token per row over its group's shared prefix and its own suffix.

    One softmax over both parts, computed from a common maximum. Without prefixes: causal attention.
    """
    if prefixes is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=query.shape[2] > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous(), None

    rows, heads, _one, size = query.shape
    kv_heads = key.shape[1]
    query = query.view(rows, kv_heads, heads // kv_heads, size) * scaling
    own = (query @ key.transpose(2, 3)).float()  # (row, kv_head, head per kv_head, own_token)
    prefix = prefixes[module.layer_idx]
    shared_key, shared_value = prefix.kv[module.layer_idx]
    if shared_key.shape[2] == 0:
        out = own.softmax(-1).to(value.dtype) @ value
        return out.reshape(rows, 1, heads, size), None

    # Rows of a group side by side: one matrix product per group and head reads its keys once.
    layout, per_kv = prefix.layout, heads // kv_heads
    grid = layout.spread(query).transpose(1, 2)  # (group, kv_head, slot, head per kv_head, size)
    stacked = grid.reshape(len(grid), kv_heads, layout.slots * per_kv, size)
    shared = (stacked @ shared_key.transpose(2, 3)).float()
    if prefix.padding is not None:
        shared.masked_fill_(prefix.padding, -torch.inf)

    def back(x: Tensor) -> Tensor:  # (group, kv_head, slot * head per kv_head, n) -> rows
        x = x.view(len(x), kv_heads, layout.slots, per_kv, x.shape[-1])
        return layout.collect(x.transpose(1, 2))

    top = back(shared.amax(-1, keepdim=True)).maximum(own.amax(-1, keepdim=True))
    own = own.sub_(top).exp_()
    top = layout.spread(top).transpose(1, 2).reshape(*shared.shape[:3], 1)
    shared = shared.sub_(top).exp_()
    total = back(shared.sum(-1, keepdim=True)) + own.sum(-1, keepdim=True)
    out = back(shared.to(value.dtype) @ shared_value) + own.to(value.dtype) @ value
    return (out / total).to(query.dtype).reshape(rows, 1, heads, size), None


@contextmanager
def _shared_prefix_attention(models: Sequence[nn.Module]) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
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


class _Stream:
    """One model inside the engine: its blocks up to the site, and (for the target) those above."""

    def __init__(self, model: nn.Module, site: int) -> None:
        windowed = ["sliding_attention"] if getattr(model.config, "sliding_window", None) else None
        kinds = set(getattr(model.config, "layer_types", windowed) or ["full_attention"])
        if not hasattr(model, "model") or not hasattr(model.model, "rotary_emb"):
            raise PairError(
                f"{type(model).__name__}: not a decoder with model.layers and rotary_emb."
            )
        if kinds != {"full_attention"}:
            raise PairError(
                f"{type(model).__name__}: only full attention is supported, not {kinds}."
            )
        self.model, self.body, self.dtype = model, model.model, model.dtype
        self.lower, self.upper = range(site + 1), range(site + 1, depth(model))

    def embed(self, tokens: Int[Tensor, "row token"]) -> Float[Tensor, "row token d_model"]:
        return self.body.embed_tokens(tokens)

    def blocks(
        self,
        which: range,
        hidden: Float[Tensor, "row token d_model"],
        positions: Int[Tensor, "row token"],
        cache: _Record | _Suffix | None,
        prefixes: dict[int, _Prefix] | None = None,
    ) -> Float[Tensor, "row token d_model"]:
        rotary = self.body.rotary_emb(hidden, positions)
        for i in which:
            hidden = self.body.layers[i](
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=cache is not None,
                prefixes=prefixes,
            )
        return hidden

    def logits(
        self, hidden: Float[Tensor, "row token d_model"], every: bool = False
    ) -> Float[Tensor, "row vocab"]:
        """Of the last token, or of ``every`` one: (row, token, vocab)."""
        hidden = self.body.norm(hidden if every else hidden[:, -1])
        return self.model.lm_head(hidden).float()


def _pad_right(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, token) ids padded on the right with 0, and (prompt,) lengths."""
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.as_tensor(prompt)
    return ids.to(device), lengths.to(device)


def _prompt_key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(map(int, prompt))).encode()).hexdigest()[:16]


def _check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token.")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompts[{i}] holds a token id outside 0..{vocab - 1}.")


def _end_tokens(model: nn.Module, eos: int | Sequence[int] | None) -> list[int]:
    if eos is None:
        eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _rollout(
    stream: _Stream,
    logits: Float[Tensor, "row vocab"],
    lengths: Int[Tensor, " row"],
    suffix: _Suffix,
    prefixes: dict[int, _Prefix],
    choose: Callable[[Tensor, Tensor, int], Tensor],
    ends: Sequence[int],
    max_new_tokens: int,
    patch: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    followers: Sequence[_Suffix | _Prefix] = (),
) -> list[tuple[list[int], bool]]:
    """Decode all rows from their first logits; per row its tokens and whether it reached an end.

    ``choose(logits, rows, step)`` picks tokens; ``patch(hidden, tokens, positions, rows)`` changes
    the residual at the site at each step. Ended rows leave every cache, ``followers`` too.
    """
    device = logits.device
    caches = [suffix, *set(prefixes.values()), *followers]
    rows = torch.arange(len(logits), device=device)
    end = torch.tensor(list(ends), dtype=torch.long, device=device)
    tokens_of: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    for step in range(max_new_tokens):
        tokens = choose(logits, rows, step)
        ended = torch.isin(tokens, end)
        for row, token, last in zip(rows.tolist(), tokens.tolist(), ended.tolist(), strict=True):
            if last:
                finished[row] = True
            else:
                tokens_of[row].append(token)
        kept = (~ended).nonzero()[:, 0]
        if step == max_new_tokens - 1 or len(kept) == 0:
            break
        if len(kept) < len(rows):
            rows, tokens, lengths = rows[kept], tokens[kept], lengths[kept]
            for cache in caches:
                cache.keep(kept)
        positions = (lengths + step)[:, None]
        hidden = stream.embed(tokens[:, None])
        hidden = stream.blocks(stream.lower, hidden, positions, suffix, prefixes)
        if patch is not None:
            hidden = patch(hidden, tokens, positions, rows)
        hidden = stream.blocks(stream.upper, hidden, positions, suffix, prefixes)
        logits = stream.logits(hidden)
    return list(zip(tokens_of, finished, strict=True))


def _greedy(logits: Tensor, _rows: Tensor, _step: int) -> Tensor:
    return logits.argmax(-1)


# ---------------------------------------------------------------------------------------------
# plain sampling, for measuring models


@torch.no_grad()
def first_token_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "prompt vocab"]:
    """Logits of the first generated token for each prompt (token ids), float32 on the CPU."""
    device, order = _prepared(model, prompts)
    target = _Stream(model, depth(model) - 1)
    out = torch.empty(len(prompts), model.lm_head.weight.shape[0])

    def work(items: list[int], _size: int) -> list[int]:
        ids, lengths = _pad_right([prompts[i] for i in items], device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        hidden = target.blocks(target.lower, target.embed(ids), positions, None)
        last = hidden[torch.arange(len(items), device=device), lengths - 1]
        out[items] = target.logits(last[:, None]).cpu()
        return items

    with _shared_prefix_attention([model]), _bar(len(prompts), "prompts", progress) as bar:
        for items in in_chunks(order, lambda _: 1, batch_size, work):
            bar.update(len(items))
    return out


class Samples(NamedTuple):
    """Continuations without the end token, ``tokens[prompt][sample]``, and what the first tokens
    were drawn from, float32 on the CPU.
    """

    tokens: list[list[list[int]]]
    first_logits: Float[Tensor, "prompt vocab"]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    temperature: float = 1.0,
    n: int = 1,
    seed: int = 0,
    max_new_tokens: int = 128,
    eos: int | Sequence[int] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Samples:
    """``n`` continuations of each prompt (token ids).

    ``temperature=0`` is greedy (then ``n`` must be 1). ``eos`` defaults to the model's own end
    tokens. A sample depends on ``seed`` and on its place in the list, not on ``batch_size``: each
    token inverts the cumulative distribution at a uniform number drawn beforehand.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or above.")
    if n < 1 or (temperature == 0 and n != 1):
        raise ValueError(f"n={n}: must be 1 or above, and 1 where temperature=0 (greedy).")
    device, order = _prepared(model, prompts)
    target, ends = _Stream(model, depth(model) - 1), _end_tokens(model, eos)
    draws = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts), n, max_new_tokens, generator=draws, dtype=torch.float64)
    out: list[list[list[int]]] = [[] for _ in prompts]
    first = torch.empty(len(prompts), model.lm_head.weight.shape[0])

    def work(items: list[int], _size: int) -> list[int]:
        ids, lengths = _pad_right([prompts[i] for i in items], device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        record = _Record()
        hidden = target.blocks(target.lower, target.embed(ids), positions, record)
        last = hidden[torch.arange(len(items), device=device), lengths - 1]
        group = torch.arange(len(items), device=device).repeat_interleave(n)
        prefixes = dict.fromkeys(target.lower, _Prefix(record.kv, lengths, group))
        u = uniform[items].flatten(0, 1).to(device)  # (row, step)
        logits = target.logits(last[:, None])
        first[items] = logits.cpu()

        def draw(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
            point = u[rows, step, None] * cumulative[:, -1:]
            return torch.searchsorted(cumulative, point, right=True)[:, 0]

        rolled = _rollout(
            target,
            logits.repeat_interleave(n, 0),
            lengths[group],
            _Suffix(),
            prefixes,
            draw if temperature else _greedy,
            ends,
            max_new_tokens,
        )
        for i, (tokens, _finished) in zip(
            [i for i in items for _ in range(n)], rolled, strict=True
        ):
            out[i].append(tokens)
        return items

    with _shared_prefix_attention([model]), _bar(len(prompts), "prompts", progress) as bar:
        for items in in_chunks(order, lambda _: n, batch_size, work):
            bar.update(len(items))
    return Samples(out, first)


def _prepared(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[torch.device, list[int]]:
    """The model's device, and the prompts' indices from the longest to the shortest.

    Like lengths together waste least on padding; the longest first fail first if memory is short.
    """
    _check_prompts(prompts, model.get_input_embeddings().weight.shape[0])
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return next(model.parameters()).device, order


def _bar(total: int, unit: str, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, unit=" " + unit, disable=not progress, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------
# the engine


@torch.no_grad()
def generate(
    pair: Pair,
    target: str,
    prompts: Sequence[Sequence[int]],
    interventions: Mapping[str, Intervention],
    *,
    position: Position = "last",
    max_new_tokens: int = 128,
    eos: int | Sequence[int] | None = None,
    batch_size: int = 256,
    readout: Sequence[int] | None = None,
    prefix_cache: PrefixCache | None = None,
    out_dir: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Greedy continuations of every prompt by model ``target`` under every intervention.

    Args:
        prompts: token ids, one list each, of any lengths.
        interventions: the grid: a name for each cell, and what is done in it at ``pair.layer``.
        position: ``"last"`` prompt token at the prefill; ``"every"`` prompt and generated token; or
            ``"every_but_first"``, which spares the first prompt token (an attention sink, on which
            no crosscoder of ours is trained).
        eos: end token(s); default: the model's own. Left out of the returned tokens.
        batch_size: (prompt, cell) rows decoded at once; bounds the memory, and is halved when that
            runs out. Results do not depend on it beyond rounding.
        readout: token ids whose log-probability at the first generated token is kept (for the
            call-vs-hedge margin); default: the whole vocabulary.
        prefix_cache: the pair's :class:`PrefixCache` of (at least) these prompts, if they were read
            before; only with ``position="last"``.
        out_dir: keep finished (prompt, cell) pairs here. The same call after a kill, or one with
            more prompts or cells, does only what is missing.

    Returns:
        One line per (prompt, cell), prompts outermost: ``prompt`` (index), ``cell`` (name),
        ``tokens`` (list of ids), ``finished`` (an end token came), ``delta`` (mean ||delta||/||h||
        over the prompt positions acted on), ``first_logprobs`` (float64 array, as ``readout``).

    Raises:
        ValueError: an argument is unusable; the message names it.
        GenerationError: ``out_dir`` belongs to another model or setting, or is damaged.
    """
    import pandas as pd

    if position not in POSITIONS:
        raise ValueError(f"position={position!r}: one of {', '.join(POSITIONS)}.")
    if not interventions:
        raise ValueError("interventions: empty; give at least {'clean': Clean()}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError("batch_size and max_new_tokens must be at least 1.")
    if prefix_cache is not None:
        if position != "last":
            raise ValueError(f"prefix_cache: only with position='last', not {position!r}.")
        prefix_cache.check(pair, prompts)
    t, models = pair.index(target), list(pair.models.values())
    device, order = _prepared(models[t], prompts)
    vocab = models[t].lm_head.weight.shape[0]
    kept = torch.arange(vocab) if readout is None else torch.as_tensor(list(readout))
    if readout is not None and not bool(((kept >= 0) & (kept < vocab)).all()):
        raise ValueError(f"readout holds a token id outside 0..{vocab - 1}.")
    ends = _end_tokens(models[t], eos)
    cells = list(interventions.values())
    grid = _Grid(
        streams=[_Stream(model, pair.layer) for model in models],
        runs=[m == t or any(c.reads_others for c in cells) for m in range(len(models))],
        target=t,
        cells=cells,
        position=position,
        ends=ends,
        max_new_tokens=max_new_tokens,
        readout=kept.to(device),
        prefix_cache=prefix_cache,
    )
    settings = {
        "models": {name: fingerprint(model) for name, model in pair.models.items()},
        "target": target,
        "layer": pair.layer,
        "position": position,
        "max_new_tokens": max_new_tokens,
        "eos": ends,
        "readout": None if readout is None else kept.tolist(),
    }
    store = _Store(out_dir, settings)
    seen: dict[int, str] = {}
    cell_keys = [f"{key(cell, seen)}-{GENERATION_VERSION}" for cell in cells]
    keys = [[f"{_prompt_key(p)}-{cell_key}" for cell_key in cell_keys] for p in prompts]
    todo = {i: [c for c, k in enumerate(keys[i]) if k not in store.done] for i in order}
    order = [i for i in order if todo[i]]

    def work(items: list[int], batch_size: int) -> dict[str, dict]:
        found = grid([prompts[i] for i in items], [todo[i] for i in items], batch_size)
        return {keys[items[p]][c]: record for (p, c), record in found.items()}

    with (
        _shared_prefix_attention(models),
        _bar(len(prompts) * len(cells), "generations", progress) as bar,
    ):
        bar.update(len(prompts) * len(cells) - sum(map(len, todo.values())))
        for found in in_chunks(order, lambda i: len(todo[i]), batch_size, work):
            store.add(found)
            bar.update(len(found))
    names = list(interventions)
    return pd.DataFrame(
        {"prompt": i, "cell": name, **store.done[k]}
        for i in range(len(prompts))
        for name, k in zip(names, keys[i], strict=True)
    )


@dataclass
class _Grid:
    """What stays the same for all chunks of one :func:`generate` call."""

    streams: list[_Stream]
    runs: list[bool]  # which models are needed at all
    target: int
    cells: list[Intervention]
    position: str
    ends: list[int]
    max_new_tokens: int
    readout: Int[Tensor, " kept"]
    prefix_cache: PrefixCache | None

    def __call__(self, prompts: list, wanted: list[list[int]], batch_size: int) -> dict:
        """Records of the (prompt, cell) pairs ``wanted``: one prefill, then batches of rows."""
        pairs = [(p, c) for p, cells in enumerate(wanted) for c in cells]
        if self.position == "last":
            if self.prefix_cache is None:
                read = _read(self.streams, self.runs, self.target, prompts, self.readout.device)
            else:
                read = self.prefix_cache.of(prompts, self.target)
            start = partial(self._from_last_token, read)
        else:
            ids, lengths = _pad_right(prompts, self.readout.device)
            at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            hidden, lower = _to_site(self.streams, self.runs, self.target, ids, at)
            acted = _acted(at, lengths, self.position)
            site = Site(hidden.flatten(0, 1).float(), self.target)
            start = partial(self._from_every_token, site, acted, lower, lengths)
        out: dict[tuple[int, int], dict] = {}
        for i in range(0, len(pairs), batch_size):
            out |= start(pairs[i : i + batch_size])
        return out

    def _from_last_token(self, read: _Read, pairs: list[tuple[int, int]]) -> dict:
        stream, lengths = self.streams[self.target], read.lengths
        site = Site(read.hidden.float(), self.target)
        changed = {c: apply(self.cells[c], site) for c in {c for _, c in pairs}}
        patched = torch.stack([changed[c][0][p] for p, c in pairs])
        # Cells that give a prompt the same vector (alpha = 1, a silent feature) decode alike: once.
        prompt = torch.tensor([p for p, _ in pairs], device=patched.device)
        labelled = torch.cat([prompt[:, None].to(patched.dtype), patched], 1)
        _, row_of = torch.unique(labelled, dim=0, return_inverse=True)  # sorted by prompt
        first_of = torch.empty(int(row_of.max()) + 1, dtype=torch.long, device=prompt.device)
        first_of[row_of.flip(0)] = torch.arange(len(pairs), device=prompt.device).flip(0)
        group, patched = prompt[first_of], patched[first_of].to(stream.dtype)

        prefixes = dict.fromkeys(stream.lower, _Prefix(read.lower, lengths, group))
        prefixes |= dict.fromkeys(stream.upper, _Prefix(read.upper, lengths - 1, group))
        suffix, positions = _Suffix(), (lengths[group] - 1)[:, None]
        hidden = stream.blocks(stream.upper, patched[:, None], positions, suffix, prefixes)
        logits = stream.logits(hidden)
        rolled = _rollout(
            stream,
            logits,
            lengths[group],
            suffix,
            prefixes,
            _greedy,
            self.ends,
            self.max_new_tokens,
        )
        ratios = torch.stack([changed[c][1][p] for p, c in pairs])
        return self._records(pairs, rolled, logits, ratios, row_of.tolist())

    def _from_every_token(
        self, site: Site, acted: Tensor, lower: list, lengths: Tensor, pairs: list[tuple[int, int]]
    ) -> dict:
        stream, device = self.streams[self.target], lengths.device
        group = torch.tensor([p for p, _ in pairs], device=device)
        cell = torch.tensor([c for _, c in pairs], device=device)
        patched = site.own.new_empty(len(pairs), acted.shape[1], site.own.shape[-1])
        ratios = torch.empty(len(pairs), device=device)
        for c in cell.unique().tolist():
            new, ratio = _apply_where(acted, self.cells[c], site)
            rows = (cell == c).nonzero()[:, 0]
            patched[rows], ratios[rows] = new[group[rows]], ratio[group[rows]]

        # Above the site a row now has keys and values of its own for the whole prompt.
        upper, at = _Record(), torch.arange(acted.shape[1], device=device)
        hidden = stream.blocks(
            stream.upper, patched.to(stream.dtype), at.expand(len(pairs), -1), upper
        )
        own = torch.arange(len(pairs), device=device)
        logits = stream.logits(hidden[own, lengths[group] - 1][:, None])
        prefixes = dict.fromkeys(stream.lower, _Prefix(lower[self.target], lengths, group))
        prefixes |= dict.fromkeys(stream.upper, _Prefix(upper.kv, lengths[group], own))
        others = {
            m: (_Suffix(), _Prefix(lower[m], lengths, group))
            for m, run in enumerate(self.runs)
            if run and m != self.target
        }

        def patch(hidden: Tensor, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
            h = torch.full_like(hidden, torch.nan).repeat(1, len(self.streams), 1)
            h[:, self.target] = hidden[:, 0]
            for m, (suffix, prefix) in others.items():
                other = self.streams[m]
                shared = dict.fromkeys(other.lower, prefix)
                embedded = other.embed(tokens[:, None])
                h[:, m] = other.blocks(other.lower, embedded, positions, suffix, shared)[:, 0]
            new = torch.empty_like(hidden)
            for c in cell[rows].unique().tolist():
                here = cell[rows] == c
                new[here, 0] = apply(self.cells[c], h[here], self.target)[0].to(new.dtype)
            return new

        rolled = _rollout(
            stream,
            logits,
            lengths[group],
            _Suffix(),
            prefixes,
            _greedy,
            self.ends,
            self.max_new_tokens,
            patch,
            followers=[cache for pair in others.values() for cache in pair],
        )
        return self._records(pairs, rolled, logits, ratios, range(len(pairs)))

    def _records(
        self, pairs: list, rolled: list, logits: Tensor, ratios: Tensor, row_of: Sequence[int]
    ) -> dict[tuple[int, int], dict]:
        # In double, so that 1 - p of a likely token keeps its digits.
        logprobs = logits.double().log_softmax(-1)[:, self.readout].cpu().numpy()
        return {
            pair: {
                "tokens": rolled[row][0],
                "finished": rolled[row][1],
                "delta": ratio,
                "first_logprobs": logprobs[row],
            }
            for pair, ratio, row in zip(pairs, ratios.tolist(), row_of, strict=True)
        }


def _to_site(
    streams: Sequence[_Stream], runs: Sequence[bool], target: int, ids: Tensor, at: Tensor
) -> tuple[Float[Tensor, "prompt token model d_model"], list[dict]]:
    """Residuals at the site, and each model's keys and values up to it.

    A model that no cell reads (``runs`` is false) stands as NaN, so that a misuse shows.
    """
    hidden, lower = [], []
    for stream, run in zip(streams, runs, strict=True):
        record = _Record()
        hidden.append(stream.blocks(stream.lower, stream.embed(ids), at, record) if run else None)
        lower.append(record.kv)
    nan = torch.full_like(hidden[target], torch.nan)
    return torch.stack([nan if h is None else h for h in hidden], 2), lower


class _Read(NamedTuple):
    """A batch of prompts, read: residuals at the site at their last tokens, ``hidden`` (prompt,
    model, d_model); the target's keys and values up to the site, and above it, where the last token
    is left out; ``lengths`` (prompt,).
    """

    hidden: Tensor
    lower: dict[int, tuple[Tensor, Tensor]]
    upper: dict[int, tuple[Tensor, Tensor]]
    lengths: Tensor


def _read(
    streams: Sequence[_Stream],
    runs: Sequence[bool],
    target: int,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
) -> _Read:
    ids, lengths = _pad_right(prompts, device)
    at = torch.arange(ids.shape[1], device=device).expand_as(ids)
    hidden, lower = _to_site(streams, runs, target, ids, at)
    # Above the site, earlier tokens are the same in every cell. Prompts of one token have none; the
    # one column kept for them is hidden by its length of 0.
    stream, upper = streams[target], _Record()
    earlier = hidden[:, : max(1, ids.shape[1] - 1), target]
    stream.blocks(stream.upper, earlier, at[:, : earlier.shape[1]], upper)
    last = torch.arange(len(prompts), device=device), lengths - 1
    return _Read(hidden[last], lower[target], upper.kv, lengths)


class PrefixCache:
    """Prompts that the models of a pair have read once, for many calls of :func:`generate`.

    Where a call has few cells, reading the prompts is most of its work. Kept are the residuals at
    the site, ``h`` (prompt, model, d_model) at the last tokens, and, in main memory, all keys and
    values: for each model 2 x blocks x kv_heads x head_dim numbers a token (``tools.budget``).

    Args:
        prompts: token ids, one list each, of any lengths.
        batch_size: prompts read at once, halved when memory runs out.
    """

    @torch.no_grad()
    def __init__(self, pair: Pair, prompts: Sequence[Sequence[int]], batch_size: int = 128) -> None:
        models = list(pair.models.values())
        self.pair, self._row = pair, {tuple(p): i for i, p in enumerate(prompts)}
        device = next(models[0].parameters()).device
        self.h = torch.empty(len(prompts), len(models), pair.d_model, device=device)
        # Per model and prompt, without padding: block -> keys and values, up to the site and above.
        self._kv: list[list[dict[int, tuple[Tensor, Tensor]]]] = []
        streams = [_Stream(model, pair.layer) for model in models]
        for t, model in enumerate(models):
            _, order = _prepared(model, prompts)
            kv: list[dict] = [{} for _ in prompts]

            def work(items: list[int], _size: int, t: int = t, kv: list[dict] = kv) -> None:
                only = [m == t for m in range(len(models))]
                read = _read(streams, only, t, [prompts[i] for i in items], device)
                self.h[items, t] = read.hidden[:, t].float()
                for block, both in (read.lower | read.upper).items():
                    keys, values = (x.cpu() for x in both)
                    for row, i in enumerate(items):
                        n = len(prompts[i])
                        kv[i][block] = keys[row, :, :n].clone(), values[row, :, :n].clone()

            with _shared_prefix_attention(models):
                for _ in in_chunks(order, lambda _: 1, batch_size, work):
                    pass
            self._kv.append(kv)

    def check(self, pair: Pair, prompts: Sequence[Sequence[int]]) -> None:
        """
        Raises:
            ValueError: it was read by another pair, or without some of these prompts.
        """
        if pair is not self.pair:
            raise ValueError("prefix_cache: read by another pair; make one of this pair.")
        for i, prompt in enumerate(prompts):
            if tuple(prompt) not in self._row:
                raise ValueError(
                    f"prefix_cache: prompts[{i}] is not among the prompts it has read."
                )

    def of(self, prompts: Sequence[Sequence[int]], target: int) -> _Read:
        """What reading just these prompts would have given."""
        rows = [self._row[tuple(prompt)] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.h.device)

        def padded(block: int, which: int) -> Tensor:
            parts = [self._kv[target][row][block][which].transpose(0, 1) for row in rows]
            return pad_sequence(parts, batch_first=True).transpose(1, 2).to(self.h.device)

        kv = {block: (padded(block, 0), padded(block, 1)) for block in self._kv[target][rows[0]]}
        lower = {block: both for block, both in kv.items() if block <= self.pair.layer}
        upper = {block: both for block, both in kv.items() if block > self.pair.layer}
        return _Read(self.h[rows], lower, upper, lengths)


def _acted(at: Tensor, lengths: Tensor, position: str) -> Bool[Tensor, "prompt token"]:
    """Where an intervention at more than the last token acts: not on padding."""
    return (at < lengths[:, None]) & (at >= (1 if position == "every_but_first" else 0))


def _apply_where(
    acted: Bool[Tensor, "prompt token"], cell: Intervention, site: Site
) -> tuple[Float[Tensor, "prompt token d_model"], Float[Tensor, " prompt"]]:
    """The target's new residual (the old one where not ``acted``), mean ||delta|| / ||h|| there."""
    new, ratio = apply(cell, site)
    new = torch.where(acted.reshape(-1, 1), new, site.own).view(*acted.shape, -1)
    ratio = torch.where(acted, ratio.view(acted.shape), 0.0).sum(1)
    return new, ratio / acted.sum(1).clamp_min(1)


class _Store:
    """Finished (prompt, cell) records, in memory and, given a folder, on disk."""

    def __init__(self, folder: str | Path | None, settings: dict) -> None:
        import pandas as pd

        self.done: dict[str, dict] = {}
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "settings.json", json.dumps(settings, indent=1)
        if path.is_file():
            earlier = json.loads(path.read_text())
            other = [k for k, v in json.loads(text).items() if earlier.get(k) != v]
            if other:
                raise GenerationError(
                    f"{self.folder}: holds generations with another {', '.join(other)}. Give "
                    "another out_dir, or delete this one."
                )
        else:
            write_atomically(path, text)
        for shard in sorted(self.folder.glob("*.parquet")):
            try:
                records = pd.read_parquet(shard).to_dict("records")
            except Exception as error:  # pyarrow raises many kinds
                raise GenerationError(
                    f"{shard}: damaged ({error}). Delete this file; its cells are then redone."
                ) from error
            for record in records:
                record["tokens"] = record["tokens"].tolist()
                self.done[record.pop("key")] = record

    def add(self, found: dict[str, dict]) -> None:
        """Take in one chunk; on disk as one file, written whole or not at all."""
        import pandas as pd

        self.done |= found
        if self.folder is not None:
            name = hashlib.sha256("".join(found).encode()).hexdigest()[:16] + ".parquet"
            table = pd.DataFrame([{"key": k, **record} for k, record in found.items()])
            write_atomically(self.folder / name, table.to_parquet(index=False))


# ---------------------------------------------------------------------------------------------
# given text


@torch.no_grad()
def score(
    pair: Pair,
    target: str,
    texts: Sequence[Sequence[int]],
    interventions: Mapping[str, Intervention],
    *,
    position: Literal["every", "every_but_first"] = "every_but_first",
    batch_size: int = 16,
    progress: bool = True,
) -> pd.DataFrame:
    """What interventions do to the prediction of given texts (token ids), at every token of them.

    Returns one line per (text, cell): ``text`` (index), ``cell``, ``n`` tokens predicted (all but
    the first), ``nll`` (mean negative log-likelihood in nats, so perplexity is its exponential over
    all tokens), ``kl`` (mean KL(clean || cell) in nats), ``delta`` (mean ||delta|| / ||h||).
    """
    import pandas as pd

    if position not in POSITIONS[1:]:
        raise ValueError(f"position={position!r}: one of {', '.join(POSITIONS[1:])}.")
    for i, text in enumerate(texts):
        if len(text) < 2:
            raise ValueError(f"texts[{i}] has {len(text)} tokens; scoring needs at least 2.")
    t, models = pair.index(target), list(pair.models.values())
    device, order = _prepared(models[t], texts)
    cells = list(interventions.values())
    runs = [m == t or any(c.reads_others for c in cells) for m in range(len(models))]
    streams = [_Stream(model, pair.layer) for model in models]
    stream, rows = streams[t], {}

    def work(items: list[int], _size: int) -> int:
        ids, lengths = _pad_right([texts[i] for i in items], device)
        at = torch.arange(ids.shape[1], device=device).expand_as(ids)
        hidden, _ = _to_site(streams, runs, t, ids, at)
        site, acted = Site(hidden.flatten(0, 1).float(), t), _acted(at, lengths, position)
        real, n = at[:, 1:] < lengths[:, None], lengths - 1

        def logprobs(cell: Intervention) -> tuple[Tensor, Tensor]:
            new, ratio = _apply_where(acted, cell, site)
            last = stream.blocks(stream.upper, new.to(stream.dtype), at, None)
            return stream.logits(last[:, :-1], every=True).log_softmax(-1), ratio

        clean, _ = logprobs(Clean())
        for name, cell in interventions.items():
            found, ratio = logprobs(cell)
            nll = -found.gather(2, ids[:, 1:, None])[..., 0]
            kl = (clean.exp() * (clean - found)).sum(-1)
            means = [(torch.where(real, x, 0.0).sum(1) / n).tolist() for x in (nll, kl)]
            for i, *values in zip(items, n.tolist(), *means, ratio.tolist(), strict=True):
                columns = ("n", "nll", "kl", "delta")
                rows[i, name] = dict(zip(columns, values, strict=True))
        return len(items)

    with _shared_prefix_attention(models), _bar(len(texts), "texts", progress) as bar:
        for n in in_chunks(order, lambda _: 1, batch_size, work):
            bar.update(n)
    return pd.DataFrame(
        {"text": i, "cell": name, **rows[i, name]}
        for i in range(len(texts))
        for name in interventions
    )


# ---------------------------------------------------------------------------------------------
# the plain loop


@torch.no_grad()
def generate_reference(
    pair: Pair,
    target: str,
    prompt: Sequence[int],
    intervention: Intervention,
    *,
    position: Position = "last",
    max_new_tokens: int = 128,
    eos: int | Sequence[int] | None = None,
    hidden: Float[Tensor, "token model d_model"] | None = None,
) -> tuple[list[int], Float[Tensor, " vocab"]]:
    """One prompt, one intervention, one token at a time: what :func:`generate` must equal.

    Hugging Face's own forward pass and KV cache, with a forward hook on block ``pair.layer``; the
    other models are run up to the site on the tokens so far. ``hidden`` spares that for the
    prompt, where it is known (only with ``position="last"``). Returns the tokens without the end
    token, and the logits of the first one.
    """
    from transformers import DynamicCache

    t, models = pair.index(target), list(pair.models.values())
    model, device = models[t], next(models[t].parameters()).device
    ends, past = _end_tokens(model, eos), DynamicCache(config=model.config)
    text, tokens, first = list(prompt), [], None

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        start = len(text) - output.shape[1]  # position of the first token in this call
        if position == "last":
            start = len(text) - 1
        elif position == "every_but_first":
            start = max(start, 1)
        n = len(text) - start
        if n == 0:
            return output
        if hidden is not None:
            h = hidden[-n:]
        else:
            ids = torch.tensor([text], device=device)
            h = torch.stack(
                [
                    output[0, -n:] if m == t else residual(other, pair.layer, ids)[0, -n:]
                    for m, other in enumerate(models)
                    if m == t or intervention.reads_others
                ],
                1,
            )
        alone = not intervention.reads_others and hidden is None
        h = h.expand(-1, len(models), -1) if alone else h
        output[0, -n:] = apply(intervention, h, t)[0].to(output.dtype)
        return output

    handle = model.model.layers[pair.layer].register_forward_hook(hook)
    try:
        ids = torch.tensor([text], device=device)
        while len(tokens) < max_new_tokens:
            logits = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[
                0, -1
            ]
            first = logits.float() if first is None else first
            if position == "last":
                handle.remove()
            token = int(logits.argmax())
            if token in ends:
                break
            tokens.append(token)
            text.append(token)
            ids = torch.tensor([[token]], device=device)
    finally:
        handle.remove()
    return tokens, first
