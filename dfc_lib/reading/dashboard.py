"""Features to look at: examples as a table in a notebook, and a page per feature."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from jinja2 import Template
from torch import Tensor, nn

from dfc_lib.reading.windows import Corpus, Example, visible


@torch.no_grad()
def logit_effect(
    model: nn.Module, direction: Float[Tensor, " d_model"], tokenizer: Any, n: int = 8
) -> pd.DataFrame:
    """Tokens that a direction promotes most and least, through the final norm and the unembedding.

    A direct reading that leaves out all blocks above the site. Columns ``side`` (promoted or
    suppressed), ``token`` and ``effect``, the logit less its mean over the vocabulary.
    """
    head = model.get_output_embeddings()
    logits = head(model.model.norm(direction.to(head.weight)[None]))[0].float().cpu()
    effect, order = logits - logits.mean(), logits.argsort(descending=True, stable=True)
    top = torch.cat([order[:n], order.flip(0)[:n]])
    tokens = [visible(tokenizer.decode([i])) for i in top.tolist()]
    sides = np.repeat(["promoted", "suppressed"], n)
    return pd.DataFrame({"side": sides, "token": tokens, "effect": effect[top].tolist()})


def example_table(features: Mapping[str, Sequence[Example]]) -> str:
    """Examples of several features as an HTML table that survives GitHub's sanitiser.

    Active tokens are bold, those above half of the feature's largest activation marked too: by
    tags, since style attributes are stripped.

    Args:
        features: a heading per feature, plain text, and the examples shown below it.
    """
    left = 'align="left" style="text-align:left"'  # the style for JupyterLab, which aligns right
    rows = []
    for heading, shown in features.items():
        rows.append(f"<tr><th {left} colspan=2>{html.escape(heading)}</th></tr>")
        largest = max((max(e.activations) for e in shown), default=0.0) or 1.0
        for e in shown:
            pairs = zip(e.tokens, e.activations, strict=True)
            text = "".join(_dressed(token, a / largest) for token, a in pairs)
            rows.append(f"<tr><td>{max(e.activations):.2f}</td><td {left}>{text}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _dressed(token: str, share: float) -> str:
    """A token as HTML, by its share of the feature's largest activation."""
    text = html.escape(token.replace("\n", "↵"))
    text = f"<b>{text}</b>" if share > 0 else text
    return f"<mark>{text}</mark>" if share > 0.5 else text


def dashboard(
    title: str,
    corpus: Corpus,
    activation: Float[np.ndarray, " row"],
    shown: Sequence[Example],
    scores: Mapping[str, Any],
    effect: pd.DataFrame,
) -> str:
    """One feature on a page that needs nothing else: no script, font or picture from outside.

    Args:
        title: plain text.
        activation: the feature at every row of the corpus (the first position is not among them);
            it fires somewhere.
        shown: examples, in the order given.
        scores: a row of ``autointerp.interpret``.
        effect: what ``logit_effect`` gives.
    """
    on = activation[activation > 0]
    largest = float(on.max())
    rate = f"Active at {len(on):,} of {len(activation):,} tokens ({len(on) / len(activation):.2%})."
    charts = [("Activations", np.histogram(on, 24, (0, largest))[0], "0", f"{largest:.2f}", rate)]
    from_end = corpus.position - np.bincount(corpus.text)[corpus.text]  # 0 at the last token
    for heading, where, *ends in (
        ("Firing by position", corpus.position - 1, "2nd token", "65th"),
        ("Firing by distance from the end", from_end + 63, "64th from the end", "last"),
    ):
        inside = (where >= 0) & (where < 64)
        total = np.bincount(where[inside], minlength=64)
        share = np.bincount(where[inside], activation[inside] > 0, 64) / np.maximum(total, 1)
        charts.append((heading, share, *ends, f"Highest bar: {share.max():.0%} of the texts."))
    template = Path(__file__).with_name("dashboard.j2").read_text(encoding="utf-8")
    return Template(template, autoescape=True, keep_trailing_newline=True).render(
        title=title,
        scores=scores,
        shown=shown,
        largest=largest,
        charts=charts,
        effects=effect.groupby("side", sort=False),
    )
