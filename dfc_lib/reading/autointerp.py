"""What a feature detects: explained on some texts, and the explanation scored on other ones.

Two tasks score an explanation (Paulo et al. 2024, arXiv 2410.13928): *detection* asks whether the
feature is active anywhere in a snippet, *fuzzing* whether the highlighted token is one that the
feature fires on. Both are balanced accuracies over held-out examples, so guessing gives 0.5.

Texts are deduplicated and split into halves; the explainer sees windows of one half and is scored
on the other. Negatives are verified: no token of the window has a non-zero activation. Half of them
are hard: centred on a token that the feature fires on elsewhere or, where there are too few, in the
same region of the prompt. What an explainer does not answer is counted and left out.

Two explainers: ``PredicateExplainer`` chooses from a library of readable predicates, offline;
``OpenAIExplainer`` asks any endpoint that speaks OpenAI's chat completions.
"""

import hashlib
import html
import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt64

from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data.activations import Activations
from dfc_lib.results import statistics
from dfc_lib.store import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csc_array

Kind = Literal["structural", "mixed", "content", "unknown"]

# --------------------------------------------------------------------------------------------------
# What can be said of a token whatever the feature: words that complete "the token ...", and whether
# they speak of structure alone (tags, role markers, positions, punctuation of JSON).

MARKS: dict[str, tuple[str, bool]] = {
    "chat": ("is in a text under the chat template", True),
    "prose": ("is in a text without a chat template", True),
    "turn": ("belongs to a turn marker (special token, role, line break)", True),
    "opening": ("belongs to the header that opens the assistant's turn", True),
    "last": ("is the last of its text", True),
    "early": ("is among the first eight of its text", True),
    "fixed": ("is in the beginning that many prompts share", True),
    "system": ("is in the system turn", True),
    "user": ("is in a user turn", True),
    "assistant": ("is in an assistant turn", True),
    "tag": ("belongs to a tag such as <tool_call>", True),
    "think": ("is inside <think>", True),
    "tool_call": ("is inside <tool_call>", True),
    "response": ("is inside <response>", True),
    "break": ("contains a line break", True),
    "line": ("starts a line", True),
    "brackets": ("is punctuation of the tool list or of JSON", True),
    "tool": ("is in a tool's name", False),
    "parameter": ("is in a parameter's name", False),
    "description": ("is in a tool's description", False),
    "digit": ("contains a digit", False),
    "capital": ("begins with a capital letter", False),
    "word": ("starts a word (space before it)", False),
    "inner": ("goes on with a word", False),
    "stop": ("is a full stop, a comma or another mark of prose", False),
    "after digit": ("follows a digit", False),
    "after capital": ("follows a token with a capital letter", False),
    "after stop": ("follows a full stop, a comma or another mark of prose", False),
    "after tool": ("follows a token of a tool's name", False),
    "repeated": ("has occurred before in its text", False),
}
REGIONS = ("prose", "turn", "system", "user", "assistant", "think", "tool_call", "tool")
TEMPLATE = ("turn", "tag", "fixed", "break", "brackets")  # what the template itself writes
FIXED_SHARE = 0.2  # a beginning that this share of the texts have in common is the template's
_COLUMN = {name: i for i, name in enumerate(MARKS)}
_TURN = re.compile(r"(<\|im_start\|>(\w+)\n)(.*?)(<\|im_end\|>\n?|\Z)", re.S)
_TAG = re.compile(r"</?(?:think|tool_call|response|user)>")
_LISTED = {  # in the system turn or a call: every listing style, and JSON
    "tool": (r"(\w+)\([\w, ]*\)", r"Name: (\w+)", r'"name": "(\w+)"'),
    "parameter": (r"\w+\(([\w, ]+)\)", r'"(\w+)": "(?:string|integer)"', r'[{,] ?"(\w+)": '),
    "description": (r"\): ([^\n]*)", r"Description: ([^\n]*)"),
}


def _marks(strings: Sequence[str]) -> Bool[np.ndarray, "token mark"]:
    """The marks of one text's tokens."""
    text, n = "".join(strings), len(strings)
    chars = {name: np.zeros(len(text), dtype=bool) for name in MARKS}

    def mark(name: str, found: re.Match, group: int | str = 0) -> None:
        chars[name][found.start(group) : found.end(group)] = True

    for turn in _TURN.finditer(text):
        mark("turn", turn, 1)
        mark("turn", turn, 4)
        if turn[2] in ("system", "user", "assistant"):
            mark(turn[2], turn, 3)
        if turn[2] == "assistant":
            mark("opening", turn, 1)
    for tag in _TAG.finditer(text):
        mark("tag", tag)
    for name in ("think", "tool_call", "response"):
        for inside in re.finditer(rf"<{name}>(.*?)(?:</{name}>|\Z)", text, re.S):
            mark(name, inside, 1)
    listing = chars["system"] | chars["tool_call"]
    for name, patterns in _LISTED.items():
        for found in (f for pattern in patterns for f in re.finditer(pattern, text)):
            mark(name, found, 1)
        chars[name] &= listing
    chars["parameter"] &= np.array([c.isalnum() or c == "_" for c in text])
    starts = np.cumsum([0, *(len(s) for s in strings)])[:-1]
    of = {name: np.logical_or.reduceat(mask, starts) for name, mask in chars.items()}

    bare, where, seen = [s.strip() for s in strings], np.arange(n), {}
    first = [seen.setdefault(s, i) == i for i, s in enumerate(strings)]
    of["chat"] = np.full(n, of["turn"].any())
    of["prose"] = ~of["chat"]
    of["last"], of["early"] = where == n - 1, where < 8
    of["break"] = np.array(["\n" in s for s in strings])
    in_list = np.logical_or.reduceat(listing, starts)
    of["brackets"] = in_list & [bool(b) and not set(b) - set("{}[]()\":,-;'_") for b in bare]
    of["stop"] = ~of["brackets"] & [bool(b) and not set(b) - set(".,;:!?'-") for b in bare]
    of["digit"] = np.array([any(c.isdigit() for c in s) for s in strings])
    of["capital"] = np.array([b[:1].isupper() for b in bare])
    of["word"] = np.array([s[0] == " " and len(s) > 1 for s in strings])
    of["inner"] = np.array([s[0].isalpha() for s in strings])
    of["inner"] &= _shifted(np.array([s[-1].isalpha() for s in strings]))
    of["repeated"] = ~np.array(first)
    of["line"] = _shifted(of["break"])
    of |= {f"after {name}": _shifted(of[name]) for name in ("digit", "capital", "stop", "tool")}
    return np.stack([of[name] for name in MARKS], axis=1)


def _shifted(mask: np.ndarray) -> np.ndarray:
    return np.append(False, mask[:-1])


# --------------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True)
class Corpus:
    """Distinct texts of an all-token cache and, for each token but the first, what it is.

    Arrays have one entry per *row*: a token of a text, texts one after the other.
    """

    rows: Int64[np.ndarray, " row"]  # where the row's vector is in the cache
    text: Int64[np.ndarray, " row"]  # which text it belongs to, counted from 0
    position: Int64[np.ndarray, " row"]  # of the token in its text, from 1
    token: Int64[np.ndarray, " row"]
    before: Int64[np.ndarray, " row"]  # the token before it
    start: Int64[np.ndarray, " row"]  # the window around it is rows start .. stop - 1
    stop: Int64[np.ndarray, " row"]
    window: UInt64[np.ndarray, " row"]  # equal where two windows hold the same tokens
    held_out: Bool[np.ndarray, " row"]  # in a text that explanations are scored on
    marks: Bool[np.ndarray, "row mark"]
    strings: Mapping[int, str]  # a token's text

    @staticmethod
    def of(
        activations: Activations,
        tokenizer: Any,
        texts: Sequence[int] | None = None,
        before: int = 12,
        after: int = 3,
        seed: int = 0,
    ) -> "Corpus":
        """Read a cache's token ids; no vector is read.

        Args:
            activations: a cache with ``positions="all"``.
            texts: its sequences to take (default: all); repeated texts are taken once.
            before, after: tokens of context in a window.
            seed: of the split into explained and held-out texts.

        Raises:
            ValueError: the cache holds last tokens only.
        """
        if activations.positions != "all":
            raise ValueError(f"{activations.directory}: windows need a cache of all positions")
        tokens, table = activations.tokens, activations.rows
        first: dict[bytes, int] = {}
        for i in range(len(tokens)) if texts is None else sorted(texts):
            first.setdefault(tokens[i].tobytes(), int(i))
        chosen = np.array(sorted(first.values()))
        rows = np.flatnonzero(table["sequence"].isin(chosen))
        sequence, position = (table[name].to_numpy()[rows] for name in ("sequence", "position"))
        at, text = tokens.offsets[sequence] + position, np.searchsorted(chosen, sequence)
        token, previous = tokens.ids[at].astype(np.int64), tokens.ids[at - 1].astype(np.int64)

        edges, here = np.searchsorted(text, np.arange(len(chosen) + 1)), np.arange(len(rows))
        start = np.maximum(edges[text], here - before)
        stop = np.minimum(edges[text + 1], here + after + 1)
        rng, window = np.random.default_rng(seed), np.zeros(len(rows), dtype=np.uint64)
        for there in (here + offset for offset in range(-before, after + 1)):
            inside = (there >= start) & (there < stop)  # a multilinear hash, modulo 2**64
            odd = rng.integers(0, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            window[inside] += (token[there[inside]].astype(np.uint64) + np.uint64(1)) * odd
        held_out = rng.permutation(len(chosen)) < len(chosen) // 2

        strings = {int(i): tokenizer.decode([int(i)]) or "�" for i in np.unique(tokens.ids)}
        marks = [_marks([strings[int(t)] for t in tokens[int(i)]])[1:] for i in chosen]
        marks = np.concatenate(marks)
        _, inverse, counts = np.unique(
            tokens.prefix_hashes()[at], return_inverse=True, return_counts=True
        )
        shared = counts[inverse] >= max(2, FIXED_SHARE * len(chosen))
        marks[:, _COLUMN["fixed"]] = shared & marks[:, _COLUMN["chat"]]
        return Corpus(
            rows,
            text,
            position,
            token,
            previous,
            start,
            stop,
            window,
            held_out[text],
            marks,
            strings,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def mark(self, *names: str) -> Bool[np.ndarray, " row"]:
        """Where any of these ``MARKS`` holds."""
        return self.marks[:, [_COLUMN[name] for name in names]].any(axis=1)

    @cached_property
    def region(self) -> Int64[np.ndarray, " row"]:
        """Equal where two tokens are in the same part of the prompt."""
        return self.marks[:, [_COLUMN[name] for name in REGIONS]] @ (1 << np.arange(len(REGIONS)))

    @cached_property
    def occurrences(self) -> Int64[np.ndarray, "2 vocabulary"]:
        """How often each token occurs as part of the template itself, and how often in all."""
        size = max(self.strings) + 1
        of_template = np.bincount(self.token[self.mark(*TEMPLATE)], minlength=size)
        return np.stack([of_template, np.bincount(self.token, minlength=size)])


def codes(
    crosscoder: Crosscoder, activations: Activations, corpus: Corpus, batch_size: int = 4096
) -> "csc_array":
    """The code at every row of the corpus: a sparse (row, d_dict) array, float32."""
    from scipy.sparse import csr_array, vstack

    parts = []
    for i in range(0, len(corpus), batch_size):
        x = activations.gather(corpus.rows[i : i + batch_size]).to(crosscoder.device)
        parts.append(csr_array(crosscoder.encode(x).detach().float().cpu().numpy()))
    return vstack(parts).tocsc()


# --------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True)
class Example:
    """A window of a text, rows ``start .. stop - 1`` of the corpus."""

    start: int
    stop: int
    centre: int  # the row that the window was cut around
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    active: bool  # the truth: detection, is any token active; fuzzing, is the centre
    kind: Literal["top", "quantile", "hard", "easy", "moved"]
    highlight: bool = False  # True in fuzzing: the question is about the centre


class Examples(NamedTuple):
    """What a feature is explained on, and what the explanation is scored on: other texts."""

    explain: list[Example]
    detection: list[Example]
    fuzzing: list[Example]


def examples(
    corpus: Corpus,
    activation: Float[np.ndarray, " row"],
    n: int = 40,
    n_top: int = 10,
    minimum: int = 10,
    seed: int = 0,
) -> Examples | None:
    """Windows on which a feature is active and on which it is not; None if it is too rare.

    Args:
        activation: the feature at every row of the corpus.
        n: active windows per half, at most one per text, and as many inactive ones.
        n_top: of the active ones, how many are the strongest; the others are spread evenly over the
            ranks of the remaining texts' activations.
        minimum: fewer active or inactive windows than this in either half give None.
    """
    rng = np.random.default_rng(seed)
    count = np.append(0, np.cumsum(activation > 0))
    quiet = count[corpus.stop] == count[corpus.start]
    halves, used = [], np.array([], dtype=np.uint64)
    for half in (False, True):
        usable = (corpus.held_out == half) & ~np.isin(corpus.window, used)
        top, rest = _active(corpus, activation, usable, n, n_top, rng)
        positive = np.concatenate([top, rest])
        negative = _quiet(corpus, np.flatnonzero(usable & quiet), positive, rng)
        if min(len(positive), len(negative)) < minimum:
            return None
        chosen = [(row, True, "top") for row in top] + [(row, True, "quantile") for row in rest]
        chosen += [(row, False, kind) for row, kind in negative]
        halves.append([_example(corpus, activation, *each) for each in chosen])
        used = corpus.window[[row for row, _, _ in chosen]]
    explain, detection = halves
    return Examples(explain, detection, _fuzzing(detection, rng))


def _active(
    corpus: Corpus, activation: np.ndarray, usable: np.ndarray, n: int, n_top: int, rng
) -> tuple[np.ndarray, np.ndarray]:
    """The strongest rows, and some of every strength; no text and no window twice."""

    def by_strength(rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-activation[rows], kind="stable")]

    rows = rng.permutation(np.flatnonzero(usable & (activation > 0)))
    rows = _first(corpus.window, rows)
    top = _first(corpus.text, by_strength(rows))[:n_top]
    rest = rows[~np.isin(corpus.text[rows], corpus.text[top])]
    rest = by_strength(_first(corpus.text, rest))
    ranks = np.unique(np.linspace(0, max(0, len(rest) - 1), n - len(top)).astype(int))
    return top, rest[ranks[: len(rest)]]


def _first(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of each key, in the order given."""
    return rows[np.sort(np.unique(keys[rows], return_index=True)[1])]


def _quiet(
    corpus: Corpus, rows: np.ndarray, positive: np.ndarray, rng
) -> list[tuple[int, Literal["hard", "easy"]]]:
    """As many inactive rows as there are active ones, no text and no window twice."""
    import pandas as pd

    rows = _first(corpus.window, rng.permutation(rows))
    same = rows[np.isin(corpus.token[rows], corpus.token[positive])]
    # Its tokens take turns, so that a frequent one does not take all places.
    turn = pd.Series(corpus.token[same]).groupby(corpus.token[same]).cumcount()
    same = same[np.argsort(turn.to_numpy(), kind="stable")]
    near = rows[np.isin(corpus.region[rows], corpus.region[positive])]
    chosen: dict[int, tuple[int, str]] = {}  # by text
    for kind, candidates, up_to in (
        ("hard", same, len(positive) // 2),
        ("hard", near, len(positive) // 2),
        ("easy", rows, len(positive)),
    ):
        for row in candidates.tolist():
            if len(chosen) >= up_to:
                break
            chosen.setdefault(int(corpus.text[row]), (row, kind))
    return list(chosen.values())


def _example(corpus: Corpus, activation: np.ndarray, row: int, active: bool, kind: str) -> Example:
    start, stop = int(corpus.start[row]), int(corpus.stop[row])
    tokens = tuple(corpus.strings[t] for t in corpus.token[start:stop].tolist())
    return Example(
        start, stop, int(row), tokens, tuple(activation[start:stop].tolist()), active, kind
    )


def _fuzzing(detection: list[Example], rng) -> list[Example]:
    """Active windows with an active token highlighted; half of the negatives are such windows with
    an inactive token highlighted (hard), the others inactive windows."""
    right = [replace(e, highlight=True) for e in detection if e.active]
    moved = []
    for e in (right[i] for i in rng.permutation(len(right))):
        off = e.start + np.flatnonzero(np.array(e.activations) == 0)
        if len(off) and len(moved) < len(right) // 2:
            moved.append(replace(e, centre=int(rng.choice(off)), active=False, kind="moved"))
    quiet = [replace(e, highlight=True) for e in detection if not e.active]
    picked = rng.permutation(len(quiet))[: len(right) - len(moved)]
    return [*right, *moved, *(quiet[i] for i in sorted(picked.tolist()))]


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


class Explainer(Protocol):
    """Explains a feature from examples, and says on which other examples it should be active."""

    def explain(self, examples: Sequence[Example]) -> Explanation: ...

    def judge(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[bool | None]: ...  # None: no answer that could be read


@dataclass(frozen=True)
class PredicateExplainer:
    """The predicate, or the conjunction of two, that best tells the examples apart.

    Best is the mean of the two balanced accuracies that score it later, here on the explained
    texts: per window (does it hold anywhere?) and per token, inactive tokens counted half from
    active and half from inactive windows. Two predicates must beat one by ``margin``.

    Candidates are the marks; the tokens that the feature fires on in the examples (twice or more,
    and in three of ten occurrences), alone and in sets; and likewise the tokens before those. A set
    is structural if nine in ten of its tokens' occurrences belong to the template itself.
    """

    corpus: Corpus
    margin: float = 0.02

    def explain(self, examples: Sequence[Example]) -> Explanation:
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
        better = merit[pair] > merit[single, single] + self.margin
        rule = tuple(library[i] for i in (pair if better else (single,)))
        structural = {p.structural for p in rule}
        kind = (
            "mixed" if len(structural) == 2 else "structural" if True in structural else "content"
        )
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
                shown = " or ".join(f"‘{_visible(self.corpus.strings[t])}’" for t in tokens)
                words = f"{'follows' if previous else 'is'} {shown}"
                template, total = self.corpus.occurrences[:, list(tokens)].sum(axis=1)
                structural = bool(template >= 0.9 * max(total, 1))
                made.append(Predicate(words, structural, tokens=tokens, previous=previous))
        return made

    def judge(self, explanation: Explanation, examples: Sequence[Example]) -> list[bool | None]:
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
        base_url: of the endpoint, up to and including ``/v1``; never written anywhere.
        batch: snippets judged in one request.
        timeout: seconds until an attempt counts as failed.
        max_retries: further attempts.
    """

    model: str
    cache_dir: Path
    base_url: str = field(repr=False)
    api_key: str = field(repr=False)
    batch: int = 10
    timeout: float = 60.0
    max_retries: int = 5

    @classmethod
    def from_environment(cls, cache_dir: str | Path, **options: Any) -> "OpenAIExplainer":
        """Endpoint, model and key from ``DFC_OPENAI_BASE_URL`` (default: OpenAI's own),
        ``DFC_OPENAI_MODEL`` and ``OPENAI_API_KEY`` (a local server may need none).

        Raises:
            ExplainerError: no model is named.
        """
        if not (model := os.environ.get("DFC_OPENAI_MODEL")):
            raise ExplainerError("set DFC_OPENAI_MODEL to the model's name at the endpoint")
        base_url = os.environ.get("DFC_OPENAI_BASE_URL") or "https://api.openai.com/v1"
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return cls(model, Path(cache_dir), base_url, key, **options)

    def explain(self, examples: Sequence[Example]) -> Explanation:
        largest, shown = max(max(e.activations) for e in examples), []
        for e in (e for e in examples if e.active):
            on = [(t, a) for t, a in zip(e.tokens, e.activations, strict=True) if a > 0]
            strengths = ", ".join(f"{t!r} {max(1, round(10 * a / largest))}" for t, a in on)
            shown.append(f"{_quoted(e, [a > 0 for a in e.activations])}\n  {strengths}")
        silent = ["".join(e.tokens) for e in examples if not e.active]
        asked = f"FIRES\n{_numbered(shown)}\n\nSILENT\n{_numbered(silent)}"
        answer = _json_object(self._ask(_EXPLAIN, asked))
        said, structural = answer.get("explanation"), answer.get("structural")
        if not isinstance(said, str) or not said.strip():
            return Explanation("", "unknown")
        kind = "unknown" if not isinstance(structural, bool) else "content"
        return Explanation(said.strip(), "structural" if structural is True else kind)

    def judge(self, explanation: Explanation, examples: Sequence[Example]) -> list[bool | None]:
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
            given = _json_object(self._ask(system, _numbered(snippets))).get("answers")
            if not isinstance(given, list) or len(given) != len(part):
                given = [None] * len(part)
            answers += [a if isinstance(a, bool) else None for a in given]
        return answers

    def _ask(self, system: str, user: str) -> str:
        """The answer, from the cache where it is there; "" where the reply holds none."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {"model": self.model, "messages": messages, "temperature": 0}
        identity = json.dumps([urlsplit(self.base_url).hostname, request], sort_keys=True)
        path = self.cache_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["answer"]
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise ExplainerError("the package openai is missing; run: make setup") from None
        try:
            client = OpenAI(
                api_key=self.api_key,
                base_url=self.base_url,
                timeout=self.timeout,
                max_retries=self.max_retries,
            )
            reply = client.chat.completions.with_raw_response.create(**request).text
            answer = json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError):
            return ""  # not a reply of this API; not kept, so that a rerun asks again
        except Exception as error:
            said = f"{type(error).__name__}: {error}".replace(self.api_key, "***")[:500]
            # `from None`: the original error carries the request, and so the key.
            raise ExplainerError(
                f"{said} (check DFC_OPENAI_BASE_URL, DFC_OPENAI_MODEL and OPENAI_API_KEY; answers "
                "so far are kept, the same call goes on from there)"
            ) from None
        kept = {"request": request, "answer": answer.replace(self.api_key, "***")}
        write_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        return kept["answer"]


def _quoted(example: Example, chosen: Sequence[bool]) -> str:
    pairs = zip(example.tokens, chosen, strict=True)
    return "".join(f"«{token}»" if c else token for token, c in pairs)


def _numbered(snippets: Sequence[str]) -> str:
    return "\n".join(f"{i}. {snippet}" for i, snippet in enumerate(snippets, start=1))


def _json_object(answer: str) -> dict:
    """The JSON object in an answer, fenced or not; empty where there is none."""
    try:
        found = json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
    cases: Mapping[Hashable, Examples], explainer: Explainer, seed: int = 0, progress: bool = True
) -> "pd.DataFrame":
    """Explain every feature, score it, and score it again with another feature's explanation.

    Args:
        cases: examples by feature; tuples as keys give the index several levels.
        seed: of the shuffle, in which no feature keeps its own explanation.

    Returns:
        One row per feature: ``explanation``, ``kind``, ``n_explain``, ``n_hard`` (hard negatives of
        detection), and for both tasks ``detection`` and ``fuzzing``, the score, with ``_low``,
        ``_high``, ``_n``, ``_unread`` (see ``Score``) and ``_shuffled`` (NaN for a lone feature).
    """
    import pandas as pd
    from tqdm.auto import tqdm

    bar = {"disable": not progress, "dynamic_ncols": True}
    explained = {
        key: explainer.explain(case.explain)
        for key, case in tqdm(cases.items(), desc="explain", **bar)
    }
    keys = list(cases)
    order = np.random.default_rng(seed).permutation(len(keys))  # a cycle leaves none in its place
    other = {keys[a]: keys[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    rows = []
    for key, case in tqdm(cases.items(), desc="score", **bar):
        row = {"explanation": explained[key].text, "kind": explained[key].kind}
        row |= {"n_explain": len(case.explain), "n_hard": sum(e.kind == "hard" for e in case[1])}
        for task, asked in (("detection", case.detection), ("fuzzing", case.fuzzing)):
            truth = [e.active for e in asked]
            own, shuffled = (
                balanced_accuracy(truth, explainer.judge(explained[k], asked))
                for k in (key, other[key])
            )
            row |= {f"{task}_{name}": value for name, value in own._asdict().items()}
            row[task] = row.pop(f"{task}_score")
            row[f"{task}_shuffled"] = shuffled.score if len(keys) > 1 else nan
        rows.append(row)
    index = pd.MultiIndex.from_tuples([k if isinstance(k, tuple) else (k,) for k in keys])
    return pd.DataFrame(rows, index=index)


def scrambled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy of a model in which each tensor's values are permuted: the same sizes and scales, and
    nothing learned. A null for auto-interpretation (after Heap et al. 2025, arXiv 2501.17727)."""
    import copy

    generator, duplicate = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return duplicate


# --------------------------------------------------------------------------------------------------
# Pictures in HTML


@torch.no_grad()
def logit_effect(
    model: torch.nn.Module, direction: Float[torch.Tensor, " d_model"], tokenizer: Any, n: int = 8
) -> "pd.DataFrame":
    """Tokens that a direction promotes most and least, through the final norm and the unembedding.

    A direct reading that leaves out all blocks above the site. Columns ``side`` (promoted or
    suppressed), ``token`` and ``effect``, the logit less its mean over the vocabulary.
    """
    import pandas as pd

    head = model.get_output_embeddings()
    logits = head(model.model.norm(direction.to(head.weight)[None]))[0].float().cpu()
    effect, order = logits - logits.mean(), logits.argsort(descending=True, stable=True)
    sides = [("promoted", order[:n]), ("suppressed", order.flip(0)[:n])]
    rows = [
        (side, _visible(tokenizer.decode([i])), float(effect[i]))
        for side, ids in sides
        for i in ids
    ]
    return pd.DataFrame(rows, columns=["side", "token", "effect"])


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "␣")


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
        largest = max((max(e.activations) for e in shown), default=1.0)
        for e in shown:
            text = _tokens(e, lambda t, a, m=largest / 2: f"<mark>{t}</mark>" if a > m else t)
            rows.append(f"<tr><td>{max(e.activations):.2f}</td><td {left}>{text}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _tokens(example: Example, dress) -> str:
    """A window as HTML; active tokens bold and dressed by their activation."""
    parts = []
    for token, activation in zip(example.tokens, example.activations, strict=True):
        shown = html.escape(token.replace("\n", "↵"))
        parts.append(dress(f"<b>{shown}</b>", activation) if activation > 0 else shown)
    return "".join(parts)


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;
color:#222;background:#fff}h1{font-size:1.4em}h2{font-size:1.05em;margin:1.6em 0 .4em}
table{border-collapse:collapse}td{padding:.15em .8em .15em 0;vertical-align:top}
code{font:13px/1.7 ui-monospace,monospace;white-space:pre-wrap}.n{color:#666;text-align:right}
.row{display:flex;gap:2em;flex-wrap:wrap}svg{display:block}"""


def dashboard(
    title: str,
    corpus: Corpus,
    activation: Float[np.ndarray, " row"],
    shown: Sequence[Example],
    scores: Mapping[str, Any],
    effect: "pd.DataFrame | None" = None,
) -> str:
    """One feature on a page that needs nothing else: no script, font or picture from outside.

    Args:
        title: plain text.
        activation: the feature at every row of the corpus (the first position is not among them).
        shown: examples, in the order given.
        scores: a row of ``interpret``.
        effect: what ``logit_effect`` gives.
    """
    on = activation[activation > 0]
    largest = float(on.max()) if len(on) else 1.0
    judged = [
        f"{task}: balanced accuracy {scores[task]:.2f} [{scores[f'{task}_low']:.2f}, "
        f"{scores[f'{task}_high']:.2f}], n = {scores[f'{task}_n']:.0f}; with another feature's "
        f"explanation {scores[f'{task}_shuffled']:.2f}"
        for task in ("detection", "fuzzing")
    ]

    def shade(token: str, a: float) -> str:
        alpha = 0.15 + 0.6 * a / largest
        return f'<span style="background:rgba(213,94,0,{alpha:.2f})" title="{a:.2f}">{token}</span>'

    rows = [(max(e.activations), _tokens(e, shade)) for e in shown]
    top = [f'<tr><td class="n">{a:.2f}</td><td><code>{text}</code></td></tr>' for a, text in rows]
    rate = f"Active at {len(on):,} of {len(activation):,} tokens ({len(on) / len(activation):.2%})."
    charts = [("Activations", np.histogram(on, 24, (0, largest))[0], ("0", f"{largest:.2f}"), rate)]
    from_end = corpus.position - np.bincount(corpus.text)[corpus.text]  # 0 at the last token
    for heading, where, ends in (
        ("Firing by position", corpus.position - 1, ("2nd token", "65th")),
        ("Firing by distance from the end", from_end + 63, ("64th from the end", "last")),
    ):
        inside = (where >= 0) & (where < 64)
        total = np.bincount(where[inside], minlength=64)
        share = np.bincount(where[inside], activation[inside] > 0, 64) / np.maximum(total, 1)
        charts.append((heading, share, ends, f"Highest bar: {share.max():.0%} of the texts."))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Explanation: {html.escape(scores['explanation'])} ({scores['kind']}).</p>",
        f"<p>{'<br>'.join(judged)}</p>",
        f"<h2>Examples, strongest first</h2><table>{''.join(top)}</table>",
        '<div class="row">',
        *(f"<div><h2>{h}</h2>{_bars(v, *ends)}<p>{note}</p></div>" for h, v, ends, note in charts),
        "</div>",
    ]
    if effect is not None:
        parts.append('<h2>Direct effect on the next token</h2><div class="row">')
        for side, part in effect.groupby("side", sort=False):
            cells = "".join(
                f'<tr><td><code>{html.escape(token)}</code></td><td class="n">{e:+.2f}</td></tr>'
                for token, e in zip(part.token, part.effect, strict=True)
            )
            parts.append(f"<div>{side}<table>{cells}</table></div>")
        parts.append("</div>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _bars(values: np.ndarray, first: str, last: str, width: int = 270, height: int = 90) -> str:
    """A bar chart as inline SVG, its axis labelled at both ends."""
    step, scale = width / len(values), height / max(float(values.max()), 1e-9)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - v * scale:.1f}" width="{step * 0.85:.1f}" '
        f'height="{v * scale:.1f}"/>'
        for i, v in enumerate(values)
        if v > 0
    )
    return (
        f'<svg width="{width}" height="{height + 20}"><g fill="#D55E00">{bars}</g>'
        f'<path d="M0 {height}H{width}" stroke="#222"/><g font-size="12" fill="#222">'
        f'<text y="{height + 15}">{first}</text>'
        f'<text x="{width}" y="{height + 15}" text-anchor="end">{last}</text></g></svg>'
    )
