"""A model's behaviour on prompt records: generate, score every rubric, and read the call margin.

The *margin* is the log-odds of opening an acting turn at the first generated token, log p(opener) -
log(1 - p(opener)), with the openers `<think>`, `<tool_call>` and, of a call in bare JSON, `{"`. The
*propensity* is p(opener) itself: the rate at which the model would act when sampled at temperature
one, without sampling noise. Both are continuous where the rates are binary.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import expit
from torch import Tensor

from dfc_lib.data import prompts, scoring
from dfc_lib.data.pair import Pair
from dfc_lib.data.prompts import Record
from dfc_lib.steering import generation, sampling
from dfc_lib.steering.interventions import Intervention

OPENERS = ("<think>", "<tool_call>", '{"')
OF_RECORD = ("id", "kind", "domain", "held_out")  # what `evaluate` says of a prompt


def opener_ids(tokenizer) -> list[int]:
    """First token of each opener (in Qwen2.5's vocabulary `<think>` is several tokens)."""
    firsts = {tokenizer(tag, add_special_tokens=False)["input_ids"][0] for tag in OPENERS}
    return sorted(firsts)


def end_tokens(model, tokenizer) -> list[int]:
    """Where an answer ends: at the model's own end token, and at the one that closes the
    assistant's turn in the chat template (a base model's configuration need not name it: Qwen2.5's
    names `<|endoftext|>` alone).
    """
    own = model.generation_config.eos_token_id
    ends = set() if own is None else {own} if isinstance(own, int) else set(own)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
        closing = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        ends |= set(closing) & set(tokenizer.added_tokens_decoder)  # never a plain line end
    return sorted(ends)


def margin(logits: Float[Tensor, "*rows vocab"], openers: Sequence[int]) -> Float[Tensor, "*rows"]:
    """Log-odds of an opener at the first generated token, in nats."""
    logits = logits.double()
    others = torch.ones(logits.shape[-1], dtype=torch.bool)
    others[list(openers)] = False
    return logits[..., list(openers)].logsumexp(-1) - logits[..., others].logsumexp(-1)


def margin_of(opener_logprobs: Float[Tensor, "*rows opener"]) -> Float[Tensor, "*rows"]:
    """The same from the openers' log-probabilities alone, which must be in double precision."""
    log_open = opener_logprobs.double().logsumexp(-1)
    return log_open - (-torch.expm1(log_open.clamp(max=-1e-300))).log()


def score(record: Record, response: str) -> dict[str, float]:
    """Rubrics of one response, as 0/1 numbers."""
    lenient = scoring.lenient(response, record.tool_names)
    strict = scoring.strict(response, record.gold)
    return {
        "format": lenient.format_accuracy,
        "lenient": lenient.tool_correctness,
        "called": float(strict.called),
        "strict": float(strict.correct),
        "strict_normalised": float(strict.correct_normalised),
    }


def _outcomes(record: Record, response: str, margin: float) -> dict[str, Any]:
    """What a response is judged by: the columns that every frame of this module ends with."""
    found = {"response": response, "margin": margin, "propensity": expit(margin)}
    return found | score(record, response)


def evaluate(
    model,
    tokenizer,
    records: Sequence[Record],
    style: str,
    *,
    prefill: str = "",
    published: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Behaviour of a model on records: one row per record, in order.

    `prefill` starts the assistant's turn (it counts as part of the response); `published` feeds the
    system text alone. `options` are those of `sampling.sample`, which is greedy unless told
    otherwise.

    Returns:
        columns id, kind, domain, held_out, response, margin, propensity, and those of `score`.
    """
    if published:
        texts = [prompts.published_text(r, style) for r in records]
    else:
        texts = [prompts.chat_text(tokenizer, r, style, prefill) for r in records]
    ids = prompts.encode(tokenizer, texts)
    sampled, logits = sampling.sample(model, ids, eos=end_tokens(model, tokenizer), **options)
    margins = margin(logits, opener_ids(tokenizer)).tolist()
    rows = []
    for record, tokens, m in zip(records, sampled, margins, strict=True):
        of_record = {name: getattr(record, name) for name in OF_RECORD}
        rows.append(of_record | _outcomes(record, prefill + tokenizer.decode(tokens), m))
    return pd.DataFrame(rows)


def intervene(
    pair: Pair,
    target: str,
    records: Sequence[Record],
    interventions: Mapping[Hashable, Intervention],
    *,
    levels: Sequence[str] = ("cell",),
    style: str = prompts.FIXED_STYLE,
    **options: Any,
) -> pd.DataFrame:
    """Greedy behaviour of model `target` on records under every intervention.

    Args:
        interventions: by name: a tuple with one value a level. A shorter one (or a single value)
            leaves the levels behind it missing.
        levels: what the values of a name mean; they are columns of the result.
        options: of `generation.generate`: `position`, `batch_size`, `prefix_cache`, `out_dir`, ...

    Returns:
        one line per (record, cell), records outermost: `prompt` (index of the record), `levels`,
        `delta` (||delta|| / ||h||), `response`, `margin`, `propensity`, and the columns of `score`.

    Raises:
        ValueError: there are no records, a name has more values than there are levels, or a level
            is called as another column.
    """
    if not records:
        raise ValueError("records is empty; there is nothing to generate")
    columns = ["prompt", *levels, "delta", *_outcomes(records[0], "", 0.0)]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise ValueError(f"levels {tuple(levels)}: there would be two columns {', '.join(twice)}")
    named = {name: name if isinstance(name, tuple) else (name,) for name in interventions}
    for name in named.values():
        if len(name) > len(levels):
            raise ValueError(f"cell {name} has more values than the levels {tuple(levels)}")
    texts = [prompts.chat_text(pair.tokenizer, r, style) for r in records]
    generated = generation.generate(
        pair,
        target,
        prompts.encode(pair.tokenizer, texts),
        interventions,
        eos=end_tokens(pair.models[target], pair.tokenizer),
        readout=opener_ids(pair.tokenizer),
        **options,
    )
    margins = margin_of(torch.from_numpy(np.stack(generated.first_logprobs)))
    rows = []
    for row, m in zip(generated.itertuples(), margins.tolist(), strict=True):
        cell = dict(zip_longest(levels, named[row.cell]))
        outcomes = _outcomes(records[row.prompt], pair.tokenizer.decode(row.tokens), m)
        rows.append({"prompt": row.prompt} | cell | {"delta": row.delta} | outcomes)
    return pd.DataFrame(rows)
