"""The site scan: where patching one model with the other's residual moves whether it acts.

Before anything is steered, it has to be known that something *can* move there: for every layer, at
the last prompt token or at every position, the tuned model's residual is written into the base
(``A->B``) and the base's into the tuned model (``B->A``). This is the ceiling of every intervention
at that site, and its positive control.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.special import expit
from torch import Tensor
from tqdm.auto import tqdm

from dfc_lib.data import prompts
from dfc_lib.data.pair import depth
from dfc_lib.data.prompts import Record
from dfc_lib.steering.evaluation import margin, opener_ids
from dfc_lib.steering.prefix import Stream, longest_first, padded, shared_prefix_attention

Hidden = Float[Tensor, "prompt token d_model"]  # residuals after one layer


@torch.no_grad()
def scan(
    tuned: Mapping[str, Any],
    base: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    styles: Sequence[str],
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Patch every tuned model and the base with each other, layer by layer.

    Each model reads each prompt once and keeps its residuals after every layer; a patch redoes the
    blocks above its layer. Nothing is generated.

    Args:
        tuned: models by name, each of which is an A beside the base.
        records: prompts whose gold is a call.
        styles: prompt styles.
        layers: blocks counted from 0; default: all.
        batch_size: prompts read at once.

    Returns:
        one line per (model, style, direction, layer, position, prompt): ``propensity``, the
        probability of an opener at the first generated token, and ``acts``, whether the likeliest
        token there is one; and both of the same model left alone, ``clean_propensity`` and
        ``clean_acts``.
    """
    layers = range(depth(base)) if layers is None else layers
    openers = opener_ids(tokenizer)
    parts = []
    bar = tqdm(total=len(styles) * len(records) * len(tuned), desc="site scan")
    with shared_prefix_attention([base, *tuned.values()]), bar:
        for style in styles:
            texts = [prompts.chat_text(tokenizer, r, style) for r in records]
            ids = prompts.encode(tokenizer, texts)
            order = longest_first(ids)
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                tokens = [ids[i] for i in chunk]
                of_base = _residuals(base, tokens)
                for name, model in tuned.items():
                    of_tuned = _residuals(model, tokens)
                    lengths = torch.tensor([len(prompt) for prompt in tokens])
                    ways = {"A->B": (base, of_base, of_tuned), "B->A": (model, of_tuned, of_base)}
                    for direction, (target, own, other) in ways.items():
                        where = {"model": name, "style": style, "direction": direction}
                        clean = _outcomes(target, own[-1], depth(target) - 1, lengths, openers)
                        clean = clean.add_prefix("clean_").assign(prompt=chunk)
                        for layer, position in product(layers, ("last", "every")):
                            h = _patched(own[layer], other[layer], lengths, position)
                            found = _outcomes(target, h, layer, lengths, openers).join(clean)
                            parts.append(found.assign(**where, layer=layer, position=position))
                    bar.update(len(chunk))
    levels = ["model", "style", "direction", "layer", "position", "prompt"]
    return pd.concat(parts, ignore_index=True).sort_values(levels, ignore_index=True)


def _residuals(model: Any, tokens: Sequence[Sequence[int]]) -> list[Hidden]:
    """A model's residuals after every layer; behind a prompt's end they mean nothing."""
    stream = Stream(model)
    ids, at, _ = padded(tokens, stream.device)
    hidden, out = stream.embed(ids), []
    for layer in stream.lower:
        hidden = stream.blocks(range(layer, layer + 1), hidden, at, None)
        out.append(hidden)
    return out


def _patched(own: Hidden, other: Hidden, lengths: Int[Tensor, " prompt"], position: str) -> Hidden:
    if position == "every":
        return other.to(own)
    patched, last = own.clone(), (torch.arange(len(own)), lengths - 1)
    patched[last] = other[last].to(own)
    return patched


def _outcomes(
    model: Any, hidden: Hidden, layer: int, lengths: Int[Tensor, " prompt"], openers: Sequence[int]
) -> pd.DataFrame:
    """What a model does that goes on from these residuals after ``layer``."""
    stream = Stream(model, layer)
    at = torch.arange(hidden.shape[1], device=stream.device).expand(hidden.shape[:2])
    hidden = stream.blocks(stream.upper, hidden.to(stream.device, stream.dtype), at, None)
    logits = stream.logits(hidden[torch.arange(len(hidden)), lengths - 1]).cpu()
    acts = torch.isin(logits.argmax(-1), torch.tensor(list(openers)))
    propensity = expit(margin(logits, openers).numpy())
    return pd.DataFrame({"propensity": propensity, "acts": acts.double().numpy()})
