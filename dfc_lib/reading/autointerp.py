"""What a feature detects: explained on some texts, and the explanation scored on other ones.

Two tasks score an explanation (Paulo et al. 2024, arXiv 2410.13928): *detection* asks whether the
feature is active anywhere in a window, *fuzzing* whether the highlighted token is one that the
feature fires on. Both are balanced accuracies over held-out examples, so guessing gives 0.5. What
an explainer does not answer is counted and left out.

Two explainers: ``PredicateExplainer`` chooses from a library of readable predicates, offline;
``OpenAIExplainer`` asks any endpoint that speaks OpenAI's chat completions.
"""

import copy
import hashlib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import nn
from tqdm.auto import tqdm

from dfc_lib.reading.windows import MARKS, Corpus, Example, Examples, visible
from dfc_lib.results import statistics
from dfc_lib.store import write_atomically

if TYPE_CHECKING:
    from openai import OpenAI

Kind = Literal["structural", "mixed", "content", "unknown"]


# --------------------------------------------------------------------------------------------------
# Explainers


@dataclass(frozen=True)
class Predicate:
    """A statement about a token: a mark, or that it (or the one before) is one of some tokens."""

    words: str
    structural: bool
    column: int = -1
    tokens: tuple[int, ...] = ()
    previous: bool = False

    def holds(self, corpus: Corpus, rows: np.ndarray) -> Bool[np.ndarray, " row"]:
        if self.column >= 0:
            return corpus.marks[rows, self.column]
        return np.isin((corpus.before if self.previous else corpus.token)[rows], self.tokens)


@dataclass(frozen=True)
class Explanation:
    """What a feature is said to detect.

    Attributes:
        text: in words; empty where the explainer gave no answer that could be read.
        kind: ``structural`` if it speaks of the template alone (tags, role markers, positions,
            punctuation of JSON), ``content`` if of other things alone, else ``mixed``.
        rule: the predicates that must all hold, for an explanation made of predicates.
    """

    text: str
    kind: Kind
    rule: tuple[Predicate, ...] = ()


@dataclass(frozen=True)
class PredicateExplainer:
    """The predicate, or the conjunction of two, that best tells the examples apart.

    Best is the mean of the two balanced accuracies that score it later, here on the explained
    texts: per window (does it hold anywhere?) and per token, inactive tokens counted half from
    active and half from inactive windows. Two predicates must beat one by 0.02.

    Candidates are the marks; the tokens that the feature fires on in the examples (twice or more,
    and in three of ten occurrences), alone and in sets; and likewise the tokens before those. A set
    is structural if nine in ten of its tokens' occurrences belong to the template itself.
    """

    corpus: Corpus

    def explain(self, examples: Sequence[Example]) -> Explanation:
        """What separates the active examples from the others."""
        rows = np.concatenate([np.arange(e.start, e.stop) for e in examples])
        sizes = [e.stop - e.start for e in examples]
        window = np.repeat(np.arange(len(examples)), sizes)
        fires = np.concatenate([e.activations for e in examples]) > 0
        active = np.array([e.active for e in examples])
        library = [Predicate(*mark, column=i) for i, mark in enumerate(MARKS.values())]
        library += self._token_predicates(rows, fires)
        holds = np.stack([p.holds(self.corpus, rows) for p in library], axis=1).astype(np.float32)
        kept = np.flatnonzero(holds[fires].any(axis=0))
        library, holds = [library[i] for i in kept], holds[:, kept]

        def share(of: np.ndarray) -> Float[np.ndarray, "p q"]:
            return holds[of].T @ holds[of] / max(1, of.sum())  # [p, q]: both hold

        false = (share(~fires & active[window]) + share(~fires & ~active[window])) / 2
        padded = np.zeros((len(examples), max(sizes), len(library)), dtype=np.float32)
        padded[window, np.concatenate([np.arange(size) for size in sizes])] = holds
        anywhere = padded.transpose(0, 2, 1) @ padded > 0
        per_window = (anywhere[active].mean(0) + 1 - anywhere[~active].mean(0)) / 2
        merit = ((share(fires) + 1 - false) / 2 + per_window) / 2
        single = int(merit.diagonal().argmax())
        pair = np.unravel_index(int(np.triu(merit, 1).argmax()), merit.shape)
        better = merit[pair] > merit[single, single] + 0.02
        rule = tuple(library[i] for i in (pair if better else (single,)))
        structural = {p.structural for p in rule}
        kind = {(True,): "structural", (False,): "content"}.get(tuple(structural), "mixed")
        return Explanation("the token " + " and ".join(p.words for p in rule), kind, rule)

    def _token_predicates(self, rows: np.ndarray, fires: np.ndarray) -> list[Predicate]:
        made = []
        for previous, ids in ((False, self.corpus.token[rows]), (True, self.corpus.before[rows])):
            values, inverse, count = np.unique(ids, return_inverse=True, return_counts=True)
            on = np.bincount(inverse, weights=fires)
            order = np.argsort(-on, kind="stable")
            best = values[order[((on > 1) & (on > 0.3 * count))[order]]].tolist()
            sets = [(t,) for t in best[:4]] + [tuple(best[:k]) for k in (2, 3, 4, 6, 8) if best]
            for tokens in dict.fromkeys(sets):
                shown = " or ".join(f"‘{visible(self.corpus.strings[t])}’" for t in tokens)
                words = f"{'follows' if previous else 'is'} {shown}"
                template, total = self.corpus.occurrences[:, list(tokens)].sum(axis=1)
                structural = bool(template >= 0.9 * max(total, 1))
                made.append(Predicate(words, structural, tokens=tokens, previous=previous))
        return made

    def judge(self, explanation: Explanation, examples: Sequence[Example]) -> list[bool]:
        """On which examples a feature of that explanation should be active."""
        answers = []
        for e in examples:
            rows = np.array([e.centre]) if e.highlight else np.arange(e.start, e.stop)
            holds = [p.holds(self.corpus, rows) for p in explanation.rule]
            answers.append(bool(np.all(holds, axis=0).any()))
        return answers


class ExplainerError(RuntimeError):
    """The endpoint cannot be used; says why and what to set, and never shows the key."""


_EXPLAIN = """You explain what a feature of a language model detects. Below are snippets; tokens on
which the feature fires stand in «» and are listed with their strength from 1 to 10. The feature
stays silent in the snippets of the second list. Answer with JSON alone: {"explanation": "<what it
fires on, one sentence>", "structural": <true if it is about the chat template, tags, role markers,
positions or JSON punctuation and not about what is said, else false>}"""
_JUDGE = """A feature of a language model fires on: {explanation}
For each numbered snippet: {question} Answer with JSON alone: {{"answers": [true or false, one for
each of the {n} snippets, in order]}}"""


@dataclass(frozen=True)
class OpenAIExplainer:
    """Asks any endpoint that speaks OpenAI's chat completions.

    Answers are kept in ``cache_dir``, one JSON file per request under its hash, so a run that was
    killed goes on and a rerun asks nothing. The client waits and tries again after rate limits (as
    long as ``retry-after`` says), timeouts and server errors. The key goes into the client alone.

    Attributes:
        model: the model's name at the endpoint.
        cache_dir: where answers are kept.
        client: of the endpoint; neither its address nor its key is written anywhere.
        batch: snippets judged in one request.
    """

    model: str
    cache_dir: Path
    client: "OpenAI" = field(repr=False)
    batch: int = 10

    @classmethod
    def from_environment(cls, cache_dir: str | Path) -> "OpenAIExplainer":
        """Endpoint, model and key from ``DFC_OPENAI_BASE_URL`` (default: OpenAI's own),
        ``DFC_OPENAI_MODEL`` and ``OPENAI_API_KEY`` (a local server may need none).

        An attempt counts as failed after a minute; five more follow.

        Raises:
            ExplainerError: no model is named.
        """
        from openai import OpenAI

        if not (model := os.environ.get("DFC_OPENAI_MODEL")):
            raise ExplainerError("set DFC_OPENAI_MODEL to the model's name at the endpoint")
        base_url = os.environ.get("DFC_OPENAI_BASE_URL") or "https://api.openai.com/v1"
        key = os.environ.get("OPENAI_API_KEY") or "none"
        client = OpenAI(api_key=key, base_url=base_url, timeout=60.0, max_retries=5)
        return cls(model, Path(cache_dir), client)

    def explain(self, examples: Sequence[Example]) -> Explanation:
        """What the model says that the active examples have in common."""
        largest, shown = max(max(e.activations) for e in examples), []
        for e in (e for e in examples if e.active):
            on = [(t, a) for t, a in zip(e.tokens, e.activations, strict=True) if a > 0]
            strengths = ", ".join(f"{t!r} {max(1, round(10 * a / largest))}" for t, a in on)
            shown.append(f"{_quoted(e, [a > 0 for a in e.activations])}\n  {strengths}")
        silent = ["".join(e.tokens) for e in examples if not e.active]
        answer = self._ask(_EXPLAIN, f"FIRES\n{_numbered(shown)}\n\nSILENT\n{_numbered(silent)}")
        said, structural = answer.get("explanation"), answer.get("structural")
        if not isinstance(said, str) or not said.strip():
            return Explanation("", "unknown")
        kind = "structural" if structural else "content"
        return Explanation(said.strip(), kind if isinstance(structural, bool) else "unknown")

    def judge(self, explanation: Explanation, examples: Sequence[Example]) -> list[bool | None]:
        """As :meth:`PredicateExplainer.judge`; None where no answer could be read."""
        if not explanation.text:
            return [None] * len(examples)
        answers: list[bool | None] = []
        for i in range(0, len(examples), self.batch):
            part = examples[i : i + self.batch]
            token = "the token that stands in «»" if part[0].highlight else "any token"
            system = _JUDGE.format(
                explanation=explanation.text, question=f"does it fire on {token}?", n=len(part)
            )
            snippets = [
                _quoted(e, [e.highlight and r == e.centre for r in range(e.start, e.stop)])
                for e in part
            ]
            given = self._ask(system, _numbered(snippets)).get("answers")
            if not isinstance(given, list) or len(given) != len(part):
                given = [None] * len(part)
            answers += [a if isinstance(a, bool) else None for a in given]
        return answers

    def _ask(self, system: str, user: str) -> dict[str, Any]:
        """The JSON object in the answer, fenced or not; empty where there is none."""
        from openai import OpenAIError

        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {"model": self.model, "messages": messages, "temperature": 0}
        identity = json.dumps([self.client.base_url.host, request], sort_keys=True)
        path = self.cache_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if not path.is_file():
            try:
                reply = self.client.chat.completions.create(**request)
                answer = (reply.choices[0].message.content or "").replace(
                    self.client.api_key, "***"
                )
            except (ValueError, AttributeError, IndexError, TypeError):
                return {}  # not a reply of this API; not kept, so that a rerun asks again
            except OpenAIError as error:
                said = f"{type(error).__name__}: {error}".replace(self.client.api_key, "***")[:500]
                # `from None`: the original error carries the request, and so the key.
                raise ExplainerError(
                    f"{said} (check DFC_OPENAI_BASE_URL, DFC_OPENAI_MODEL and OPENAI_API_KEY; "
                    "answers so far are kept, the same call goes on from there)"
                ) from None
            kept = {"request": request, "answer": answer}
            write_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
        try:
            return json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
        except ValueError:
            return {}


def _quoted(example: Example, chosen: Sequence[bool]) -> str:
    pairs = zip(example.tokens, chosen, strict=True)
    return "".join(f"«{token}»" if c else token for token, c in pairs)


def _numbered(snippets: Sequence[str]) -> str:
    return "\n".join(f"{i}. {snippet}" for i, snippet in enumerate(snippets, start=1))


# --------------------------------------------------------------------------------------------------
# Scores


class Score(NamedTuple):
    """Balanced accuracy: the mean of the rates right on active and on inactive examples."""

    score: float  # NaN where one side has no answer
    low: float
    high: float
    n: int  # answers, both sides together
    unread: int  # examples without an answer that could be read, left out


def balanced_accuracy(truth: Sequence[bool], answers: Sequence[bool | None]) -> Score:
    """With a 95 % interval from the Wilson intervals of both rates (MOVER: Zou and Donner 2008)."""
    pairs = [(t, a) for t, a in zip(truth, answers, strict=True) if a is not None]
    sides = [[a == t for t, a in pairs if t == side] for side in (True, False)]
    unread = len(truth) - len(pairs)
    if not all(sides):
        return Score(nan, nan, nan, len(pairs), unread)
    rates = [statistics.wilson(sum(side), len(side)) for side in sides]
    score = sum(r.estimate for r in rates) / 2
    low = score - sqrt(sum((r.estimate - r.low) ** 2 for r in rates)) / 2
    high = score + sqrt(sum((r.high - r.estimate) ** 2 for r in rates)) / 2
    return Score(score, low, high, len(pairs), unread)


def interpret(
    cases: Mapping[Hashable, Examples],
    explainer: PredicateExplainer | OpenAIExplainer,
    seed: int = 0,
) -> pd.DataFrame:
    """Explain every feature, score it, and score it again with another feature's explanation.

    Args:
        cases: examples by feature; tuples as keys give the index several levels.
        seed: of the shuffle, in which no feature keeps its own explanation.

    Returns:
        One row per feature: ``explanation``, ``kind``, ``n_explain``, ``n_hard`` (hard negatives of
        detection), and for both tasks ``detection`` and ``fuzzing``, the score, with ``_low``,
        ``_high``, ``_n``, ``_unread`` (see ``Score``) and ``_shuffled`` (NaN for a lone feature).
    """
    explained = {k: explainer.explain(case.explain) for k, case in tqdm(cases.items(), "explain")}
    keys = list(cases)
    order = np.random.default_rng(seed).permutation(len(keys))  # a cycle leaves none in its place
    other = {keys[a]: keys[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    rows = []
    for key, case in tqdm(cases.items(), "score"):
        row = {"explanation": explained[key].text, "kind": explained[key].kind}
        row |= {"n_explain": len(case.explain)}
        row |= {"n_hard": sum(e.kind == "hard" for e in case.detection)}
        for task in ("detection", "fuzzing"):
            asked = getattr(case, task)
            own, shuffled = (
                balanced_accuracy([e.active for e in asked], explainer.judge(explained[k], asked))
                for k in (key, other[key])
            )
            row |= {f"{task}_{name}": value for name, value in own._asdict().items()}
            row[task] = row.pop(f"{task}_score")
            row[f"{task}_shuffled"] = shuffled.score if len(keys) > 1 else nan
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(keys))


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model in which each tensor's values are permuted: the same sizes and scales, and
    nothing learned. A null for auto-interpretation (after Heap et al. 2025, arXiv 2501.17727)."""
    generator, duplicate = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return duplicate
