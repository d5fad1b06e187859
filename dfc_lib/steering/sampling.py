"""Decoding, what a model says when it is left alone, and how it predicts given text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from dfc_lib.data.pair import Pair, in_chunks
from dfc_lib.steering import prefix
from dfc_lib.steering.interventions import Clean, Intervention, Site, apply_where
from dfc_lib.steering.prefix import Prefix, Stream


@dataclass
class Rows:
    """Rows about to decode, and what reading their prompts left behind.

    Attributes:
        logits: of the first new tokens.
        lengths: of the prompts.
        suffix: keys and values of the rows' own tokens.
        prefixes: by block, those of the prompts.
        patch: ``patch(hidden, tokens, positions, rows)`` changes the residual at the site at each
            step.
        followers: further caches that ended rows must leave.
    """

    logits: Float[Tensor, "row vocab"]
    lengths: Int[Tensor, " row"]
    suffix: DynamicCache
    prefixes: dict[int, Prefix]
    patch: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    followers: Sequence[DynamicCache | Prefix] = ()


def greedy(logits: Tensor, _rows: Tensor, _step: int) -> Tensor:
    return logits.argmax(-1)


def rollout(
    stream: Stream,
    start: Rows,
    ends: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[Tensor, Tensor, int], Tensor] = greedy,
) -> list[list[int]]:
    """Decode all rows; per row its tokens, without the end token.

    ``choose(logits, rows, step)`` picks tokens. A row that has ended leaves the batch.
    """
    logits, lengths, suffix, prefixes = start.logits, start.lengths, start.suffix, start.prefixes
    caches = [suffix, *set(prefixes.values()), *start.followers]
    rows = torch.arange(len(logits), device=logits.device)
    end = torch.tensor(list(ends), dtype=torch.long, device=logits.device)
    tokens_of: list[list[int]] = [[] for _ in rows]
    for step in range(max_new_tokens):
        tokens = choose(logits, rows, step)
        kept = (~torch.isin(tokens, end)).nonzero()[:, 0]
        for row, token in zip(rows[kept].tolist(), tokens[kept].tolist(), strict=True):
            tokens_of[row].append(token)
        if step == max_new_tokens - 1 or len(kept) == 0:
            break
        if len(kept) < len(rows):
            rows, tokens, lengths = rows[kept], tokens[kept], lengths[kept]
            for cache in caches:
                cache.batch_select_indices(kept)
        positions = (lengths + step)[:, None]
        hidden = stream.embed(tokens[:, None])
        hidden = stream.blocks(stream.lower, hidden, positions, suffix, prefixes)
        if start.patch is not None:
            hidden = start.patch(hidden, tokens, positions, rows)
        hidden = stream.blocks(stream.upper, hidden, positions, suffix, prefixes)
        logits = stream.logits(hidden[:, 0])
    return tokens_of


# ---------------------------------------------------------------------------------------------
# plain sampling, for measuring models


class Samples(NamedTuple):
    """Of each prompt its continuation without the end token, and what the first token was drawn
    from, float32 on the CPU.
    """

    tokens: list[list[int]]
    first_logits: Float[Tensor, "prompt vocab"]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 80,
    eos: Sequence[int] = (),
    batch_size: int = 128,
) -> Samples:
    """A continuation of each prompt (token ids), up to an end token ``eos``, if one comes.

    ``temperature=0`` is greedy. A sample depends on ``seed`` and on its place in the list, not on
    ``batch_size``: each token inverts the cumulative distribution at a uniform number drawn
    beforehand.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or above.")
    stream, draws = Stream(model), torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts), max_new_tokens, generator=draws, dtype=torch.float64)
    out: list[list[int]] = [[] for _ in prompts]
    first = torch.empty(len(prompts), model.lm_head.weight.shape[0])

    def work(items: list[int], _size: int) -> None:
        ids, at, lengths = prefix.padded([prompts[i] for i in items], stream.device)
        read = DynamicCache()
        hidden = stream.blocks(stream.lower, stream.embed(ids), at, read)
        row = torch.arange(len(items), device=stream.device)
        logits, u = stream.logits(hidden[row, lengths - 1]), uniform[items].to(stream.device)
        first[items] = logits.cpu()
        prefixes = dict.fromkeys(stream.lower, Prefix(prefix.keys_values(read), lengths, row))

        def draw(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
            point = u[rows, step, None] * cumulative[:, -1:]
            return torch.searchsorted(cumulative, point, right=True)[:, 0]

        start = Rows(logits, lengths, DynamicCache(), prefixes)
        rolled = rollout(stream, start, eos, max_new_tokens, draw if temperature else greedy)
        for i, tokens in zip(items, rolled, strict=True):
            out[i] = tokens

    with prefix.shared_prefix_attention([model]):
        for _ in in_chunks(prefix.longest_first(prompts), lambda _: 1, batch_size, work):
            pass
    return Samples(out, first)


# ---------------------------------------------------------------------------------------------
# given text


@torch.no_grad()
def score(
    pair: Pair,
    target: str,
    texts: Sequence[Sequence[int]],
    interventions: Mapping[str, Intervention],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """What interventions do to the prediction of given texts (token ids), at every token of them
    but the first.

    Returns one line per (text, cell): ``text`` (index), ``cell`` and ``kl``, the mean over its
    tokens of KL(clean || cell) in nats.
    """
    for i, text in enumerate(texts):
        if len(text) < 2:
            raise ValueError(f"texts[{i}] has {len(text)} tokens; scoring needs at least 2.")
    t, models = pair.index(target), list(pair.models.values())
    others = any(cell.reads_others for cell in interventions.values())
    streams = [Stream(model, pair.layer) for model in models]
    runs = [m == t or others for m in range(len(models))]
    order, stream, found = prefix.longest_first(texts), streams[t], {}

    def work(items: list[int], _size: int) -> int:
        ids, at, lengths = prefix.padded([texts[i] for i in items], stream.device)
        hidden, _ = prefix.to_site(streams, runs, ids, at)
        site = Site(hidden.flatten(0, 1).float(), t)
        acted = prefix.acted_on(at, lengths, "every_but_first")
        real, n = at[:, 1:] < lengths[:, None], lengths - 1

        def logprobs(cell: Intervention) -> Float[Tensor, "text token vocab"]:
            new, _ = apply_where(acted, cell, site)
            last = stream.blocks(stream.upper, new.to(stream.dtype), at, None)
            return stream.logits(last[:, :-1]).log_softmax(-1)

        clean = logprobs(Clean())
        for name, cell in interventions.items():
            kl = (clean.exp() * (clean - logprobs(cell))).sum(-1)
            means = (torch.where(real, kl, 0.0).sum(1) / n).tolist()
            found.update({(i, name): mean for i, mean in zip(items, means, strict=True)})
        return len(items)

    bar = tqdm(total=len(texts), unit=" texts", disable=not progress)
    with prefix.shared_prefix_attention(models), bar:
        # Few at once, for each comes with the logits of all of its tokens.
        for done in in_chunks(order, lambda _: 1, 16, work):
            bar.update(done)
    return pd.DataFrame(
        {"text": i, "cell": name, "kl": found[i, name]}
        for i in range(len(texts))
        for name in interventions
    )
