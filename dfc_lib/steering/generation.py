"""Generation under interventions: a whole grid of variants from one prefill.

A prompt under an intervention at its last token shares nearly everything with the same prompt under
any other one: all keys and values of the earlier tokens, and all blocks up to the site. So each
prompt is run once; per variant only its *last token* is redone, through the blocks above the site;
then all (prompt, variant) rows decode together, reading their prompt's keys and values from one
place (:mod:`~dfc_lib.steering.prefix`). With ``position="every"`` the blocks above the site are
rerun on the whole prompt per variant, and the intervention is applied again at each new token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from dfc_lib import provenance, store
from dfc_lib.data.pair import Pair, fingerprint, in_chunks
from dfc_lib.steering import prefix
from dfc_lib.steering.interventions import Intervention, Site, apply, apply_where, key
from dfc_lib.steering.prefix import KeysValues, Prefix, PrefixCache, Stream
from dfc_lib.steering.sampling import Rows, rollout

Pairs = Int[Tensor, " pair"]  # of (prompt, cell) pairs the indices of one of the two
# Rows that are ready to decode, ||delta|| / ||h|| of each pair, and which row is each pair's.
Started = tuple[Rows, Tensor, Sequence[int]]


class GenerationError(RuntimeError):
    """A file of finished generations is damaged; says what to do."""


@torch.no_grad()
def generate(
    pair: Pair,
    target: str,
    prompts: Sequence[Sequence[int]],
    interventions: Mapping[Hashable, Intervention],
    *,
    eos: Sequence[int],
    readout: Sequence[int],
    position: str = "last",
    max_new_tokens: int = 80,
    batch_size: int = 512,
    prefix_cache: PrefixCache | None = None,
    out_dir: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Greedy continuations of every prompt by model ``target`` under every intervention.

    Args:
        prompts: token ids, one list each, of any lengths.
        interventions: the grid: a name for each cell, and what is done in it at ``pair.layer``.
        eos: end tokens. Left out of the returned tokens.
        readout: token ids whose log-probability at the first generated token is kept (for the
            call-vs-hedge margin).
        position: ``"last"`` prompt token at the prefill; ``"every"`` prompt and generated token; or
            ``"every_but_first"``, which spares the first prompt token (an attention sink, on which
            no crosscoder of ours is trained).
        batch_size: (prompt, cell) rows decoded at once; bounds the memory, and is halved when that
            runs out. Results do not depend on it beyond rounding.
        prefix_cache: the pair's :class:`PrefixCache` of (at least) these prompts, if they were read
            before; only with ``position="last"``.
        out_dir: keep finished (prompt, cell) pairs below this folder, in one named by what they
            depend on: models, settings, code. Calls and processes may share it. The same call after
            a kill, or one with more prompts or cells, does only what is missing; what it finds was
            computed in other batches, and so is the same up to rounding.

    Returns:
        One line per (prompt, cell), prompts outermost: ``prompt`` (index), ``cell`` (name),
        ``tokens`` (list of ids), ``delta`` (mean ||delta|| / ||h|| over the prompt positions acted
        on), ``first_logprobs`` (float64 array, as ``readout``).

    Raises:
        ValueError: an argument is unusable; the message names it.
        GenerationError: a file below ``out_dir`` is damaged.
    """
    if position not in prefix.POSITIONS:
        raise ValueError(f"position={position!r}: one of {', '.join(prefix.POSITIONS)}.")
    if not interventions:
        raise ValueError("interventions: empty; give at least {'clean': Clean()}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError("batch_size and max_new_tokens must be at least 1.")
    if prefix_cache is not None:
        if position != "last":
            raise ValueError(f"prefix_cache: only with position='last', not {position!r}.")
        prefix_cache.check(pair, prompts)
    order, cells = prefix.longest_first(prompts), list(interventions.values())
    grid = _Grid(
        pair, pair.index(target), cells, position, eos, max_new_tokens, readout, prefix_cache
    )

    done: dict[str, dict] = {}
    if out_dir is not None:
        settings = {
            "code": provenance.code_hash(__name__, "dfc_lib.crosscoder.model"),
            "models": {name: fingerprint(model) for name, model in pair.models.items()},
            "target": target,
            "layer": pair.layer,
            "position": position,
            "max_new_tokens": max_new_tokens,
            "eos": list(eos),
            "readout": list(readout),
        }
        folder = Path(out_dir).resolve() / store.key(settings)
        done = _finished(folder)
    seen: dict[int, str] = {}
    cell_keys = [key(cell, seen) for cell in cells]
    keys = [
        [f"{store.key(list(map(int, p)))}-{cell_key}" for cell_key in cell_keys] for p in prompts
    ]
    todo = {i: [c for c, k in enumerate(keys[i]) if k not in done] for i in order}
    order = [i for i in order if todo[i]]

    def work(items: list[int], batch_size: int) -> dict[str, dict]:
        found = grid([prompts[i] for i in items], [todo[i] for i in items], batch_size)
        return {keys[items[p]][c]: record for (p, c), record in found.items()}

    total, left = len(prompts) * len(cells), sum(map(len, todo.values()))
    bar = tqdm(total=total, initial=total - left, unit=" generations", disable=not progress)
    with prefix.shared_prefix_attention(list(pair.models.values())), bar:
        for found in in_chunks(order, lambda i: len(todo[i]), batch_size, work):
            if out_dir is not None:
                _keep(folder, found)
            done |= found
            bar.update(len(found))
    return pd.DataFrame(
        {"prompt": i, "cell": name, **done[k]}
        for i in range(len(prompts))
        for name, k in zip(interventions, keys[i], strict=True)
    )


# ---------------------------------------------------------------------------------------------
# finished cells


@cache
def _finished(folder: Path) -> dict[str, dict]:
    """What a folder holds, by key: read once in a process, whose own finds are then added."""
    done = {}
    for shard in sorted(folder.glob("*.parquet")):
        try:
            records = pd.read_parquet(shard).to_dict("records")
        except Exception as error:  # pyarrow raises many kinds
            raise GenerationError(
                f"{shard}: damaged ({error}). Delete this file; its cells are then redone."
            ) from error
        for record in records:
            record["tokens"] = record["tokens"].tolist()
            done[record.pop("key")] = record
    return done


def _keep(folder: Path, found: dict[str, dict]) -> None:
    """Write one chunk as one file, whole or not at all, named by the keys in it."""
    table = pd.DataFrame([{"key": k, **record} for k, record in found.items()])
    store.write_atomically(folder / f"{store.key(*found)}.parquet", table.to_parquet(index=False))


# ---------------------------------------------------------------------------------------------
# the engine


@dataclass
class _Grid:
    """What stays the same for all chunks of one :func:`generate` call."""

    pair: Pair
    target: int
    cells: list[Intervention]
    position: str
    eos: Sequence[int]
    max_new_tokens: int
    readout: Sequence[int]
    prefix_cache: PrefixCache | None

    def __post_init__(self) -> None:
        self.streams = [Stream(model, self.pair.layer) for model in self.pair.models.values()]
        self.stream = self.streams[self.target]
        others = any(cell.reads_others for cell in self.cells)
        self.runs = [others or stream is self.stream for stream in self.streams]

    def __call__(self, prompts: list, wanted: list[list[int]], batch_size: int) -> dict:
        """Records of the (prompt, cell) pairs ``wanted``: one prefill, then batches of rows."""
        if self.position == "last":
            if self.prefix_cache is None:
                found = prefix.read(self.streams, self.runs, self.target, prompts)
            else:
                found = self.prefix_cache.of(prompts, self.target)
            start = partial(self._from_last_token, found)
        else:
            ids, at, lengths = prefix.padded(prompts, self.stream.device)
            hidden, lower = prefix.to_site(self.streams, self.runs, ids, at)
            acted = prefix.acted_on(at, lengths, self.position)
            site = Site(hidden.flatten(0, 1).float(), self.target)
            start = partial(self._from_every_token, site, acted, lower, lengths)
        pairs = [(p, c) for p, cells in enumerate(wanted) for c in cells]
        out: dict[tuple[int, int], dict] = {}
        for i in range(0, len(pairs), batch_size):
            batch = pairs[i : i + batch_size]
            rows, ratios, row_of = start(*torch.tensor(batch, device=self.stream.device).T)
            tokens = rollout(self.stream, rows, self.eos, self.max_new_tokens)
            # In double, so that 1 - p of a likely token keeps its digits.
            logprobs = rows.logits.double().log_softmax(-1)[:, list(self.readout)].cpu().numpy()
            for pair, ratio, row in zip(batch, ratios.tolist(), row_of, strict=True):
                record = {"tokens": tokens[row], "delta": ratio, "first_logprobs": logprobs[row]}
                out[pair] = record
        return out

    def _from_last_token(self, found: prefix.Read, prompt: Pairs, cell: Pairs) -> Started:
        stream, lengths = self.stream, found.lengths
        site = Site(found.hidden.float(), self.target)
        patched, ratios = self._apply(cell, prompt, partial(apply, h=site))
        # Cells that give a prompt the same vector (alpha = 1, a silent feature) decode alike: once.
        labelled = torch.cat([prompt[:, None].to(patched.dtype), patched], 1)
        distinct, row_of = torch.unique(labelled, dim=0, return_inverse=True)  # sorted by prompt
        group, patched = distinct[:, 0].long(), distinct[:, 1:].to(stream.dtype).contiguous()

        prefixes = dict.fromkeys(stream.lower, Prefix(found.lower, lengths, group))
        prefixes |= dict.fromkeys(stream.upper, Prefix(found.upper, lengths - 1, group))
        suffix, positions = DynamicCache(), (lengths[group] - 1)[:, None]
        hidden = stream.blocks(stream.upper, patched[:, None], positions, suffix, prefixes)
        rows = Rows(stream.logits(hidden[:, 0]), lengths[group], suffix, prefixes)
        return rows, ratios, row_of.tolist()

    def _from_every_token(
        self,
        site: Site,
        acted: Bool[Tensor, "prompt token"],
        lower: list[KeysValues],
        lengths: Int[Tensor, " prompt"],
        prompt: Pairs,
        cell: Pairs,
    ) -> Started:
        stream = self.stream
        patched, ratios = self._apply(cell, prompt, partial(apply_where, acted, site=site))

        # Above the site a row now has keys and values of its own for the whole prompt.
        upper, at = DynamicCache(), torch.arange(acted.shape[1], device=stream.device)
        at = at.expand(len(prompt), -1)
        hidden = stream.blocks(stream.upper, patched.to(stream.dtype), at, upper)
        own = torch.arange(len(prompt), device=stream.device)
        prefixes = dict.fromkeys(stream.lower, Prefix(lower[self.target], lengths, prompt))
        prefixes |= dict.fromkeys(
            stream.upper, Prefix(prefix.keys_values(upper), lengths[prompt], own)
        )
        others = {
            m: (DynamicCache(), Prefix(lower[m], lengths, prompt))
            for m, run in enumerate(self.runs)
            if run and m != self.target
        }

        def patch(hidden: Tensor, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
            h = torch.full_like(hidden, torch.nan).repeat(1, len(self.streams), 1)
            h[:, self.target] = hidden[:, 0]
            for m, (suffix, read_before) in others.items():
                other = self.streams[m]
                shared = dict.fromkeys(other.lower, read_before)
                embedded = other.embed(tokens[:, None])
                h[:, m] = other.blocks(other.lower, embedded, positions, suffix, shared)[:, 0]
            new = torch.empty_like(hidden)
            for c in cell[rows].unique().tolist():
                here = cell[rows] == c
                new[here, 0] = apply(self.cells[c], h[here], self.target)[0].to(new.dtype)
            return new

        logits = stream.logits(hidden[own, lengths[prompt] - 1])
        followers = [cache for both in others.values() for cache in both]
        rows = Rows(logits, lengths[prompt], DynamicCache(), prefixes, patch, followers)
        return rows, ratios, range(len(prompt))

    def _apply(
        self, cell: Pairs, prompt: Pairs, change: Callable[[Intervention], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Of each pair, the new activations and ||delta|| / ||h||, given what ``change`` makes of
        every prompt.
        """
        out: tuple[Tensor, Tensor] | None = None
        for c in cell.unique().tolist():
            rows = (cell == c).nonzero()[:, 0]
            changed = change(self.cells[c])
            out = out or tuple(x.new_empty(len(cell), *x.shape[1:]) for x in changed)
            for all_of, of_cell in zip(out, changed, strict=True):
                all_of[rows] = of_cell[prompt[rows]]
        return out
