"""Windows of text on which a feature is active, and on which it is not.

A corpus holds the distinct texts of a cache, split into halves, and what can be said of each token
whatever the feature. A feature is explained on windows of one half and its explanation is scored on
windows of the other. Negatives are verified: no token of the window has a non-zero activation. Half
of them are hard: centred on a token that the feature fires on elsewhere or, where there are too
few, in the same region of the prompt.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64, UInt64
from scipy.sparse import csc_array, csr_array, vstack

from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data.activations import Activations

# Words that complete "the token ...", and whether they speak of structure alone (tags, role
# markers, positions, punctuation of JSON).
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
_BEFORE, _AFTER = 12, 3  # tokens of context in a window
_BATCH = 4096  # rows encoded at once
_N_TOP = 10  # active windows that are the strongest; the others are of all strengths

_TURN = r"<\|im_start\|>{}\n(.*?)(?:<\|im_end\|>|\Z)"
_INSIDE = r"<{0}>(.*?)(?:</{0}>|\Z)"
_LISTED = {  # in the system turn or a call: every listing style, and JSON
    "tool": (r"(\w+)\([\w, ]*\)", r"Name: (\w+)", r'"name": "(\w+)"'),
    "parameter": (r"\w+\(([\w, ]+)\)", r'"(\w+)": "(?:string|integer)"', r'[{,] ?"(\w+)": '),
    "description": (r"\): ([^\n]*)", r"Description: ([^\n]*)"),
}
_BRACKETS, _STOPS = set("{}[]()\":,-;'_"), set(".,;:!?'-")
_SPANS = {  # marks that patterns give to characters: their groups
    "turn": (r"(<\|im_start\|>\w+\n).*?(<\|im_end\|>\n?|\Z)",),
    "opening": (r"(<\|im_start\|>assistant\n)",),
    "tag": (r"(</?(?:think|tool_call|response|user)>)",),
    **{role: (_TURN.format(role),) for role in ("system", "user", "assistant")},
    **{tag: (_INSIDE.format(tag),) for tag in ("think", "tool_call", "response")},
    **_LISTED,
}


def _marks(strings: Sequence[str]) -> Bool[np.ndarray, "token mark"]:
    """The marks of one text's tokens."""
    text, where = "".join(strings), np.arange(len(strings))
    chars = {name: np.zeros(len(text), dtype=bool) for name in _SPANS}
    for name, patterns in _SPANS.items():
        for found in (f for pattern in patterns for f in re.finditer(pattern, text, re.S)):
            for group in range(1, len(found.groups()) + 1):
                chars[name][slice(*found.span(group))] = True
    listing = chars["system"] | chars["tool_call"]
    for name in _LISTED:
        chars[name] &= listing
    chars["parameter"] &= np.array([c.isalnum() or c == "_" for c in text])
    starts = np.cumsum([0, *(len(s) for s in strings)])[:-1]
    of = {name: np.logical_or.reduceat(mask, starts) for name, mask in chars.items()}

    def each(holds: Callable[[str], bool]) -> Bool[np.ndarray, " token"]:
        return np.array([bool(holds(s)) for s in strings])

    of["repeated"] = pd.Series(strings).duplicated().to_numpy()
    of["chat"] = np.full(len(strings), of["turn"].any())
    of["prose"] = ~of["chat"]
    of["last"], of["early"] = where == where[-1], where < 8
    of["break"] = each(lambda s: "\n" in s)
    listed = np.logical_or.reduceat(listing, starts)
    of["brackets"] = listed & each(lambda s: s.strip() and set(s.strip()) <= _BRACKETS)
    of["stop"] = ~of["brackets"] & each(lambda s: s.strip() and set(s.strip()) <= _STOPS)
    of["digit"] = each(lambda s: any(c.isdigit() for c in s))
    of["capital"] = each(lambda s: s.strip()[:1].isupper())
    of["word"] = each(lambda s: s[0] == " " and len(s) > 1)
    of["inner"] = each(lambda s: s[0].isalpha()) & _shifted(each(lambda s: s[-1].isalpha()))
    of["line"] = _shifted(of["break"])
    of |= {f"after {name}": _shifted(of[name]) for name in ("digit", "capital", "stop", "tool")}
    of["fixed"] = np.zeros_like(of["chat"])  # told by other texts, in Corpus.of
    return np.stack([of[name] for name in MARKS], axis=1)


def visible(token: str) -> str:
    """A token's text with its white space to be seen."""
    return token.replace("\n", "↵").replace(" ", "␣")


def _shifted(mask: np.ndarray) -> np.ndarray:
    return np.append(False, mask[:-1])


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
        seed: int = 0,
    ) -> "Corpus":
        """Read a cache's token ids; no vector is read.

        Args:
            activations: a cache with ``positions="all"``.
            texts: its sequences to take (default: all); repeated texts are taken once.
            seed: of the split into explained and held-out texts.
        """
        tokens, table = activations.tokens, activations.rows
        asked = range(len(tokens)) if texts is None else sorted(texts)
        chosen = np.array(asked)[~pd.Series([tokens[i].tobytes() for i in asked]).duplicated()]
        rows = np.flatnonzero(table["sequence"].isin(chosen))
        sequence, position = (table[name].to_numpy()[rows] for name in ("sequence", "position"))
        at, text = tokens.offsets[sequence] + position, np.searchsorted(chosen, sequence)
        token, previous = tokens.ids[at].astype(np.int64), tokens.ids[at - 1].astype(np.int64)

        edges, here = np.searchsorted(text, np.arange(len(chosen) + 1)), np.arange(len(rows))
        start = np.maximum(edges[text], here - _BEFORE)
        stop = np.minimum(edges[text + 1], here + _AFTER + 1)
        rng, window = np.random.default_rng(seed), np.zeros(len(rows), dtype=np.uint64)
        for there in (here + offset for offset in range(-_BEFORE, _AFTER + 1)):
            inside = (there >= start) & (there < stop)  # a multilinear hash, modulo 2**64
            odd = rng.integers(0, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            window[inside] += (token[there[inside]].astype(np.uint64) + np.uint64(1)) * odd
        held_out = rng.permutation(len(chosen)) < len(chosen) // 2

        strings = {int(i): tokenizer.decode([int(i)]) or "�" for i in np.unique(tokens.ids)}
        marks = [_marks([strings[int(t)] for t in tokens[int(i)]])[1:] for i in chosen]
        marks, beginnings = np.concatenate(marks), pd.Series(tokens.prefix_hashes()[at])
        alike = beginnings.groupby(beginnings).transform("size").to_numpy()
        shared = alike >= max(2, FIXED_SHARE * len(chosen))
        marks[:, _COLUMN["fixed"]] = shared & marks[:, _COLUMN["chat"]]
        half = held_out[text]
        return Corpus(
            rows, text, position, token, previous, start, stop, window, half, marks, strings
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


def codes(crosscoder: Crosscoder, activations: Activations, corpus: Corpus) -> csc_array:
    """The code at every row of the corpus: a sparse (row, d_dict) array, float32."""
    parts = []
    for rows in np.array_split(corpus.rows, range(_BATCH, len(corpus), _BATCH)):
        x = activations.gather(rows).to(crosscoder.device)
        parts.append(csr_array(crosscoder.encode(x).detach().float().cpu().numpy()))
    return vstack(parts).tocsc()


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
    minimum: int = 10,
    seed: int = 0,
) -> Examples | None:
    """Windows on which a feature is active and on which it is not; None if it is too rare.

    Args:
        activation: the feature at every row of the corpus.
        n: active windows per half, at most one per text, and as many inactive ones. Ten are the
            strongest; the others are spread evenly over the ranks of the remaining activations.
        minimum: fewer active or inactive windows than this in either half give None.
    """
    rng = np.random.default_rng(seed)
    count = np.append(0, np.cumsum(activation > 0))
    quiet = count[corpus.stop] == count[corpus.start]
    halves, used = [], np.array([], dtype=np.uint64)
    for half in (False, True):
        usable = (corpus.held_out == half) & ~np.isin(corpus.window, used)
        top, rest = _active(corpus, activation, usable, n, rng)
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
    corpus: Corpus, activation: np.ndarray, usable: np.ndarray, n: int, rng
) -> tuple[np.ndarray, np.ndarray]:
    """The strongest rows, and some of every strength; no text and no window twice."""

    def by_strength(rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-activation[rows], kind="stable")]

    rows = rng.permutation(np.flatnonzero(usable & (activation > 0)))
    rows = _first(corpus.window, rows)
    top = _first(corpus.text, by_strength(rows))[:_N_TOP]
    rest = rows[~np.isin(corpus.text[rows], corpus.text[top])]
    rest = by_strength(_first(corpus.text, rest))
    ranks = np.unique(np.linspace(0, max(0, len(rest) - 1), n - len(top)).astype(int))
    return top, rest[ranks[: len(rest)]]


def _first(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of each key, in the order given."""
    return rows[~pd.Series(keys[rows]).duplicated().to_numpy()]


def _quiet(
    corpus: Corpus, rows: np.ndarray, positive: np.ndarray, rng
) -> list[tuple[int, Literal["hard", "easy"]]]:
    """As many inactive rows as there are active ones, no text and no window twice."""
    rows = _first(corpus.window, rng.permutation(rows))
    same = rows[np.isin(corpus.token[rows], corpus.token[positive])]
    # Its tokens take turns, so that a frequent one does not take all places.
    turn = pd.Series(corpus.token[same]).groupby(corpus.token[same]).cumcount()
    same = same[np.argsort(turn.to_numpy(), kind="stable")]
    near = rows[np.isin(corpus.region[rows], corpus.region[positive])]
    half, chosen = len(positive) // 2, {}  # row -> kind
    wanted = [("hard", same, half), ("hard", near, half), ("easy", rows, len(positive))]
    for kind, candidates, up_to in wanted:
        taken = corpus.text[np.fromiter(chosen, dtype=np.int64)]
        candidates = candidates[~np.isin(corpus.text[candidates], taken)]
        picked = _first(corpus.text, candidates)[: up_to - len(chosen)]
        chosen |= dict.fromkeys(picked.tolist(), kind)
    return list(chosen.items())


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
