"""A model's behaviour on prompt records: generate, score every rubric, and read the call margin.

The *margin* is the log-odds of opening an acting turn at the first generated token, log p(opener) -
log(1 - p(opener)), with the openers `<think>` and `<tool_call>`; greedy decoding acts where it
exceeds the best other token. It is continuous where the rates are binary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from dfc_lib import generation, prompts, scoring
from dfc_lib.prompts import Record

if TYPE_CHECKING:
    import pandas as pd

OPENERS = ("<think>", "<tool_call>")


def opener_ids(tokenizer) -> list[int]:
    """First token of each opener (in Qwen2.5's vocabulary `<think>` is several tokens)."""
    firsts = {tokenizer(tag, add_special_tokens=False)["input_ids"][0] for tag in OPENERS}
    return sorted(firsts)


def margin(logits: Float[Tensor, "*rows vocab"], openers: Sequence[int]) -> Float[Tensor, "*rows"]:
    """Log-odds of an opener at the first generated token, in nats."""
    log_p = logits.double().log_softmax(-1)
    log_open = log_p[..., list(openers)].logsumexp(-1)
    others = [i for i in range(logits.shape[-1]) if i not in set(openers)]
    return log_open - log_p[..., others].logsumexp(-1)


def score(record: Record, response: str) -> dict[str, float]:
    """All rubrics of one response, as 0/1 numbers (`reward` in [-3, 4])."""
    lenient = scoring.lenient(response, record.tool_names)
    strict = scoring.strict(response, record.gold)
    reward = scoring.toolrl_reward(response, record.gold)
    return {
        "format": lenient.format_accuracy,
        "lenient": lenient.tool_correctness,
        "overall": lenient.overall_score,
        "called": float(strict.called),
        "strict": float(strict.correct),
        "strict_normalised": float(strict.correct_normalised),
        "name": float(strict.name),
        "reward": sum(reward),
    }


def evaluate(
    model,
    tokenizer,
    records: Sequence[Record],
    style: str,
    *,
    prefill: str = "",
    published: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 80,
    batch_size: int = 128,
    progress: bool = False,
) -> "pd.DataFrame":
    """Greedy (or sampled) behaviour of a model on records: one row per record, in order.

    `prefill` starts the assistant's turn (it counts as part of the response); `published` feeds the
    system text alone.

    Returns:
        columns id, kind, domain, tool, held_out, response, margin, and those of `score`.
    """
    import pandas as pd

    if published:
        texts = [prompts.published_text(r, style) for r in records]
    else:
        texts = [prompts.chat_text(tokenizer, r, style, prefill) for r in records]
    ids = prompts.encode(tokenizer, texts)
    sampled, logits = generation.sample(
        model,
        ids,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    margins = margin(logits, opener_ids(tokenizer)).tolist()
    rows = []
    for record, (tokens,), m in zip(records, sampled, margins, strict=True):
        response = prefill + tokenizer.decode(tokens)
        rows.append(
            {
                "id": record.id,
                "kind": record.kind,
                "domain": record.domain,
                "tool": record.tool,
                "held_out": record.held_out,
                "response": response,
                "margin": m,
            }
            | score(record, response)
        )
    return pd.DataFrame(rows)
