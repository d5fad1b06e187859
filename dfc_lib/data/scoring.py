"""Three rubrics for one assistant answer: the lenient one of S1, a strict one, and ToolRL's reward.

All take plain text, as a model writes it and as `prompts.Record.gold` stores it:

    <think>
    The user wants ...
    </think>
    <tool_call>
    {"name": "get_weather", "parameters": {"city": "Oslo"}}
    </tool_call>

A call is one JSON object on one line, and the first `<tool_call>` block is the one that counts. An
answer with several calls is an *ordered list* of calls, for the gold and for the response alike.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


# ---------------------------------------------------------------------------------------------
# from text to calls


def gold_has_call(gold: str) -> bool:
    """Whether the gold answer asks for a tool call (else for a response, or thinking alone)."""
    return _OPEN in gold


def calls(text: str) -> list[dict[str, Any]]:
    """The calls in the first tool-call block, in order.

    Returns:
        one `{"name": str, "parameters": dict, ...}` per line of the block; an empty list where
        there is no complete block, or any of its lines is not such an object. Never raises.
    """
    try:
        parsed = _json_lines(text)
        whole = all(isinstance(c["name"], str) and isinstance(c["parameters"], dict) for c in parsed)
    except _MALFORMED:
        return []
    return parsed if whole else []


def _json_lines(text: str) -> list[Any]:
    """What the first block holds, one JSON value a line, calls or not. Raises `_MALFORMED`."""
    inner, closed, _ = text.partition(_OPEN)[2].partition(_CLOSE)
    if not closed:
        raise ValueError("no complete <tool_call> block")
    return [json.loads(line) for line in inner.strip().split("\n")]


# What model text can provoke, here and where the parsed values are read as calls. RecursionError:
# a few thousand opening brackets are enough for the JSON parser.
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Named(NamedTuple):
    """Which listed tools a reply names in plain prose."""

    right: bool  # the gold call's tool, and no other listed one
    wrong: bool  # another listed one, or any where the gold has no call


def names_tool(response: str, gold: str, tool_names: Sequence[str]) -> Named:
    """Whether prose names the right tool: the name as a word, in any case, in whatever sentence.

    A response with a tag or a JSON object in it is no prose: neither right nor wrong.
    """
    text = response.strip().lower()
    if "<" in text or "{" in text:
        return Named(False, False)
    gold_names = {call["name"].lower() for call in calls(gold)}
    words = set(re.findall(r"[\w.-]*\w", text))
    named = {name.lower() for name in tool_names} & words
    return Named(bool(named) and named <= gold_names, bool(named - gold_names))


# ---------------------------------------------------------------------------------------------
# lenient


class Lenient(NamedTuple):
    """S1's rubric for one response."""

    format_accuracy: int  # 0 or 1
    tool_correctness: int  # 0 or 1


_JSON_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')


def lenient(response: str, tool_names: Sequence[str]) -> Lenient:
    """Score a response as S1 does (arXiv 2606.26474, public evaluation code): the gold is not read.

    Format: `<tool_call>` in any case, and a JSON `"name": "..."` anywhere, in or out of the block.
    Tool: the first such name, lower-cased, equals, contains or lies inside a lower-cased listed
    name.

    Args:
        response: the assistant text.
        tool_names: names of all tools that the prompt lists.

    Raises:
        TypeError: `tool_names` is one string, whose letters would each match nearly any name.
    """
    if isinstance(tool_names, str):
        raise TypeError(f"tool_names is the string {tool_names!r}; pass a list of names")
    name = _JSON_NAME.search(response)
    if name is None:
        return Lenient(0, 0)
    called = name.group(1).lower()
    listed = [tool.strip().lower() for tool in tool_names]
    # An empty listed name lies inside every name; it is no tool.
    tool_ok = any(tool and (tool in called or called in tool) for tool in listed)
    return Lenient(int(_OPEN in response.lower()), int(tool_ok))


# ---------------------------------------------------------------------------------------------
# strict


class Strict(NamedTuple):
    """What of the gold answer the response's first tool-call block gets right."""

    called: bool  # `<tool_call>` occurs, complete or not
    correct: bool  # names, parameter names and values are the gold's; without a gold call: silence
    correct_normalised: bool  # the same, forgiving what `strict` says of values


def strict(response: str, gold: str) -> Strict:
    """Compare the response's first tool-call block with the gold's, call by call.

    Exact values are equal as JSON would have it: 1, 1.0, true and "1" are four different values.
    The normalised variant follows BFCL's AST matching (the Berkeley Function-Calling Leaderboard's
    `ast_checker.py`): an integer is accepted where the gold has the equal float, not the other way
    round; strings are compared without case, white space and punctuation (all of Unicode's, and
    `^`: a superset of BFCL's list; a string of nothing else is compared as it is); lists in order
    and objects by key, in the same manner within. Parameter and tool *names* are always exact.

    Args:
        response: the assistant text; any text is scored, none raises.
        gold: the gold answer's text.

    Raises:
        ValueError: the gold holds `<tool_call>` but no well-formed block: nothing to compare with.
    """
    called, made = _OPEN in response, calls(response)
    if not gold_has_call(gold):
        return Strict(called, not called, not called)
    wanted = calls(gold)
    if not wanted:
        raise ValueError(f"the gold answer has no well-formed <tool_call> block: {gold!r}")
    if [call["name"] for call in wanted] != [call["name"] for call in made]:
        return Strict(called, False, False)
    values = [[call["parameters"] for call in some] for some in (wanted, made)]
    return Strict(called, _equal(*values, normalised=False), _equal(*values, normalised=True))


def _equal(wanted: Any, made: Any, normalised: bool) -> bool:
    # `type` and not `isinstance`: in Python True is an int, and equal to 1.
    if normalised and type(wanted) is float and type(made) is int:
        return wanted == made
    if type(wanted) is not type(made):
        return False
    if isinstance(wanted, str):
        return wanted == made or (normalised and _plain(wanted) == _plain(made))
    if isinstance(wanted, list):
        return len(wanted) == len(made) and all(
            _equal(w, m, normalised) for w, m in zip(wanted, made, strict=True)
        )
    if isinstance(wanted, dict):
        return wanted.keys() == made.keys() and all(
            _equal(value, made[key], normalised) for key, value in wanted.items()
        )
    return wanted == made


def _plain(text: str) -> str:
    def forgiven(c: str) -> bool:
        return c.isspace() or c == "^" or unicodedata.category(c).startswith("P")

    return "".join(c for c in text.casefold() if not forgiven(c)) or text


# ---------------------------------------------------------------------------------------------
# ToolRL's reward


class Reward(NamedTuple):
    """ToolRL's two rewards for one response; GRPO is given their sum, in [-3, 4]."""

    format: float  # 0 or 1
    correctness: float  # in [-3, 3]


def toolrl_reward(response: str, gold: str) -> Reward:
    """ToolRL's format and correctness rewards (arXiv 2504.13958, and its public code).

    **Format**, 0 or 1. Which of `<tool_call>` and `<response>` occur in the gold decides the
    layout: think and call; think and response; think, call and response; think alone. One newline
    stands between elements, after the opening and before the closing `<tool_call>` tag. The call
    and response tags that are required occur exactly once each; think tags, and tags that are not
    required, are not counted.

    **Correctness**, in [-3, 3]; 0 where the gold has no call. +3 for an equal ordered list of
    calls, else 6 s / s_max - 3. s adds up the multiset Jaccard index of the names and, for each
    gold call in order, the best still unused predicted call of that name by Jaccard index of the
    parameter names plus the number of equal values; s_max = 1 + sum over gold calls of (1 + number
    of parameters). -3 where a block is incomplete, a line is not JSON, or lacks what is read of it.

    Where the paper is silent the public code decides:

    - The matching is greedy (the paper says optimal); of equally good candidates the first is
      taken, and one that scores 0 stays unused.
    - Values are equal as Python values: 1, 1.0 and true are the same, nested ones too.
    - A line that is no object with a name: -3 for the whole answer. A predicted call's parameters
      are only read where its name is the gold call's; there, -3 if they are missing or no object.
      Fields beside name and parameters matter for the exact +3 alone.
    - An empty block, or a blank line among the calls, is not JSON: -3.

    The block runs from the first opening to the *next* closing tag. The public code also ends it at
    a second opening tag, and is content with a closing tag before the opening one; these two
    layouts score -3 here. So does a gold whose block is malformed, lest one bad record end a
    training run.

    Args:
        response: the assistant text; stripped first.
        gold: the gold answer's text.
    """
    response = response.strip()
    return Reward(_format_reward(response, gold), _correctness_reward(response, gold))


def _format_reward(response: str, gold: str) -> float:
    layout, once = [r"<think>.*?</think>"], []
    if _OPEN in gold:
        layout += [_OPEN, ".*?", _CLOSE]
        once += [_OPEN, _CLOSE]
    if "<response>" in gold:
        layout += ["<response>.*?</response>"]
        once += ["<response>", "</response>"]
    # Counting first leaves the pattern one place to match, so it runs in linear time.
    counted = all(response.count(tag) == 1 for tag in once)
    return float(counted and re.fullmatch("\n".join(layout), response, re.DOTALL) is not None)


def _correctness_reward(response: str, gold: str) -> float:
    if _OPEN not in gold:
        return 0.0
    try:
        wanted, made = _json_lines(gold), _json_lines(response)
        if wanted == made:
            return 3.0
        score = _jaccard([call["name"] for call in wanted], [call["name"] for call in made])
        best_possible = 1
        unused = list(range(len(made)))
        for call in wanted:
            parameters = call["parameters"]
            best_possible += 1 + len(parameters)
            same = (i for i in unused if made[i]["name"] == call["name"])
            matches = {i: _parameter_score(parameters, made[i]["parameters"]) for i in same}
            chosen = max(matches, key=matches.get, default=None)  # of equal ones the first
            if chosen is not None and matches[chosen] > 0:
                unused.remove(chosen)
                score += matches[chosen]
    except _MALFORMED:
        return -3.0
    return 6 * score / best_possible - 3


def _parameter_score(wanted: dict, made: dict) -> float:
    equal = sum(key in made and made[key] == value for key, value in wanted.items())
    return _jaccard(list(wanted.keys()), list(made.keys())) + equal


def _jaccard(a: list, b: list) -> float:
    """|a and b| / |a or b| as multisets; 1 for equal lists (two empty ones too)."""
    if a == b:
        return 1.0
    common = (Counter(a) & Counter(b)).total()
    return common / (len(a) + len(b) - common)
