"""The rubrics and the ToolRL reward, branch by branch and by their invariants."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfc_lib.data.scoring import calls, gold_has_call, lenient, names_tool, strict, toolrl_reward

quick = settings(deadline=None, max_examples=60)  # wall times say nothing on a busy machine


def block(*lines):
    """A call answer; each line is written as JSON unless it is text already."""
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    return f"<think>\nhm\n</think>\n<tool_call>\n{text}\n</tool_call>"


def call(name, /, **parameters):
    return {"name": name, "parameters": parameters}


REPLY = "<think>no tool fits</think>\n<response>Sorry, I cannot.</response>"
BOTH = block(call("f", x=1)) + "\n<response>Done.</response>"
GOLD = block(call("f", x=1))


# ---------------------------------------------------------------------------------------------
# lenient


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('<tool_call>\n{"name": "add"}\n</tool_call>', (1, 1)),
        ('<TOOL_Call> {"name" : "ADD"}', (1, 1)),  # any case; the block need not be complete
        ('I would write "name": "add_numbers" here', (0, 1)),  # contains a listed name
        ('"name": "ad"', (0, 1)),  # lies inside a listed name
        ('<tool_call>"name": "fly"', (1, 0)),
        ('"name": "fly", "name": "add"', (0, 0)),  # only the first name counts
        ('<tool_call>{"name": ""}', (0, 0)),  # an empty name is none
        ('<tool_call>{"Name": "add"}', (0, 0)),  # the field's own case matters
        ("<tool_call>add</tool_call>", (0, 0)),
        ("Of course!", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_lenient_table(response, expected):
    """A branch of S1's rubric scores otherwise than its public code."""
    assert lenient(response, ["Add", "multiply"]) == expected


def test_lenient_without_tools_or_with_an_empty_name_matches_nothing():
    """An empty listed name would lie inside every called name."""
    assert lenient('<tool_call>{"name": "add"}', []) == (1, 0)
    assert lenient('<tool_call>{"name": "add"}', ["", " "]) == (1, 0)


def test_lenient_refuses_a_bare_string_of_names():
    """Iterating over a string compares letters, and nearly every call would be correct."""
    with pytest.raises(TypeError, match="list of names"):
        lenient("", "add")


@quick
@given(st.text(), st.lists(st.text(min_size=1), max_size=4))
def test_lenient_does_not_depend_on_the_order_of_the_tools(text, names):
    """The first listed name, or the last, is preferred."""
    response = f'<tool_call>"name": "{text}"'
    assert lenient(response, names) == lenient(response, names[::-1])


# ---------------------------------------------------------------------------------------------
# parsing


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (block(call("f"), call("g", y=[1])), ["f", "g"]),
        (block(call("f")) + block(call("g")), ["f"]),  # the first block only
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', ["f"]),  # newlines are no matter
        (block(call("f"), "", call("g")), []),
        (block("[1]"), []),
        (block("{"), []),
        (block('{"name": "f"}'), []),
        (block('{"name": 3, "parameters": {}}'), []),
        (block('{"name": "f", "parameters": []}'), []),
        (block('{"name": "f",', '"parameters": {}}'), []),  # one call, one line
        ("<tool_call>\n\n</tool_call>", []),
        ('</tool_call><tool_call>{"name": "f", "parameters": {}}', []),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", []),
        ("<tool_call>" + "1" * 5_000 + "</tool_call>", []),  # more digits than int() takes
        ("", []),
    ],
)
def test_calls_table(text, names):
    """A malformed block is read as calls, or a good one is not."""
    assert [c["name"] for c in calls(text)] == names


def test_gold_has_call():
    """Rates over prompts with a gold call would be over the wrong prompts."""
    assert [gold_has_call(g) for g in (GOLD, BOTH, REPLY, "")] == [True, True, False, False]


# ---------------------------------------------------------------------------------------------
# strict


def flags(response, gold):
    """called, correct, correct_normalised as 0/1 text."""
    return "".join("01"[v] for v in strict(response, gold))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([call("f", x=1, y="a b")], "111"),
        ([call("f", y="a b", x=1)], "111"),  # key order
        ([call("g", x=1, y="a b")], "100"),
        ([call("f", x=1)], "100"),
        ([call("f", x=1, y="a b", z=0)], "100"),
        ([call("f", x=1, y="A-b!")], "101"),
        ([call("f", x=2, y="a b")], "100"),
        ([call("f", x=True, y="a b")], "100"),
        ([call("f", x="1", y="a b")], "100"),
        ([call("f", x=1.0, y="a b")], "100"),  # a float for an int
        ([call("f", x=1, y="a b"), call("f", x=1, y="a b")], "100"),
        (["nonsense"], "100"),
    ],
)
def test_strict_table(made, expected):
    """A part of the comparison is dropped, or leaks into another part."""
    assert flags(block(*made), block(call("f", x=1, y="a b"))) == expected


@pytest.mark.parametrize(
    ("gold", "made", "exact", "normalised"),
    [
        (2.0, 2, False, True),
        (2, 2.0, False, False),
        (1.0, True, False, False),
        (2.5, 2.5, True, True),
        (None, None, True, True),
        (None, False, False, False),
        ("New York, NY", "new york ny", False, True),
        ("it's", "its", False, True),
        ("Straße", "STRASSE", False, True),
        ("+", "-", False, False),
        ("-", "/", False, False),  # nothing but punctuation: compared as it is
        ("C++", "C", False, False),  # a symbol is no punctuation
        ("$5", "5", False, False),
        ([1.0, "A"], [1, "a"], False, True),
        (["a", "b"], ["b", "a"], False, False),
        (["a"], ["a", "a"], False, False),
        ({"k": ["A."]}, {"k": ["a"]}, False, True),
        ({"k": 1}, {"K": 1}, False, False),
        ({"k": 1}, {"k": 1, "l": 1}, False, False),
        ([[1], 2], [[1], 2], True, True),
        ([True], [1], False, False),
    ],
)
def test_strict_values(gold, made, exact, normalised):
    """Exact values take 1, 1.0 and true for the same, or normalised ones forgive wrongly."""
    s = strict(block(call("f", x=made)), block(call("f", x=gold)))
    assert (s.correct, s.correct_normalised) == (exact, normalised)


def test_strict_several_calls_are_an_ordered_list():
    """A swapped pair of calls is not the gold's answer."""
    a, b = call("f", x=1), call("g", x=1)
    assert flags(block(a, b), block(a, b)) == "111"
    assert flags(block(b, a), block(a, b)) == "100"
    assert flags(block(a), block(a, b)) == "100"


def test_strict_ignores_later_blocks_and_needs_no_layout():
    """Strict judges the first call, not the tags around it."""
    one = '<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>'
    assert strict(f"Sure. {one} and {block(call('g'))}", GOLD).correct
    assert not strict(f"{block(call('g'))} {one}", GOLD).correct


@pytest.mark.parametrize(
    ("response", "silent"),
    [
        (REPLY, True),
        ("", True),
        (GOLD, False),
        ("<tool_call> well", False),  # cut off by the length limit: it was calling
    ],
)
def test_strict_irrelevance(response, silent):
    """A call where none fits counts as right, or no call as wrong."""
    assert strict(response, REPLY) == (not silent, silent, silent)


def test_strict_refuses_a_malformed_gold():
    """An unreadable gold would make every response wrong without a word."""
    with pytest.raises(ValueError, match="gold answer has no well-formed"):
        strict(GOLD, "<tool_call>")


# ---------------------------------------------------------------------------------------------
# ToolRL's format reward


CALL_LINE = json.dumps(call("f", x=1))


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        (GOLD, GOLD, 1),
        (GOLD, f"  \n{GOLD}\n ", 1),  # stripped first
        (GOLD, "<think></think>\n<tool_call>\n\n</tool_call>", 1),  # inner text may be empty
        (GOLD, "<think>a</think>\n<tool_call>\n</tool_call>", 0),  # two newlines are needed
        (GOLD, f"<think>a</think>\n<tool_call>{CALL_LINE}\n</tool_call>", 0),
        (GOLD, f"<think>a</think>\n<tool_call>\n{CALL_LINE}</tool_call>", 0),
        (GOLD, f"<think>a</think>\n\n<tool_call>\n{CALL_LINE}\n</tool_call>", 0),
        (GOLD, f"<think>a</think><tool_call>\n{CALL_LINE}\n</tool_call>", 0),
        (GOLD, f"<think>a\n<tool_call>\n{CALL_LINE}\n</tool_call>", 0),
        (GOLD, f"<think>a<think>b</think></think>\n<tool_call>\n{CALL_LINE}\n</tool_call>", 1),
        (GOLD, f"x{GOLD}", 0),
        (GOLD, f"{GOLD}x", 0),
        (GOLD, f"{GOLD}\n{GOLD}", 0),  # tags twice
        (GOLD, GOLD.replace("hm", "<tool_call>"), 0),
        (GOLD, GOLD.replace("hm", "</tool_call>"), 0),
        (GOLD, GOLD.replace("hm", "<response>hm</response>"), 1),  # not required, not counted
        (GOLD, BOTH, 0),
        (GOLD, REPLY, 0),
        (REPLY, REPLY, 1),
        (REPLY, "<think>a\nb</think>\n<response>\nc\n</response>", 1),
        (REPLY, "<think>a</think>\n<response></response>", 1),
        (REPLY, "<think>a</think>\n\n<response>c</response>", 0),
        (REPLY, "<response>c</response>", 0),
        (REPLY, "<think>a</think>\n<response>c</response></response>", 0),
        (REPLY, "<think>a</think>\n<response><response>c</response>", 0),
        (REPLY, f"<think>{CALL_LINE}<tool_call></think>\n<response>c</response>", 1),
        (REPLY, GOLD, 0),
        (BOTH, BOTH, 1),
        (BOTH, GOLD, 0),
        (BOTH, REPLY, 0),
        (BOTH, BOTH.replace("\n<response>", "<response>"), 0),
        (BOTH, BOTH.replace("Done.", "<tool_call>"), 0),
        (BOTH, BOTH.replace("hm", "</response>"), 0),
        (BOTH, "<think>a</think>\n<response>b</response>\n<tool_call>\nc\n</tool_call>", 0),
        ("<think>only</think>", "<think>a\nb</think>", 1),
        ("<think>only</think>", "<think>a</think>b</think>", 1),
        ("<think>only</think>", "<think>a", 0),
        ("<think>only</think>", "", 0),
        ("", "<think>a</think>", 1),
    ],
)
def test_format_reward_table(gold, response, expected):
    """A layout is rewarded that ToolRL does not reward, or the other way round."""
    assert toolrl_reward(response, gold).format == expected


# ---------------------------------------------------------------------------------------------
# ToolRL's correctness reward


def scaled(score, best_possible):
    return 6 * score / best_possible - 3


@pytest.mark.parametrize(
    ("gold", "made", "expected"),
    [
        ([call("f", x=1)], [call("f", x=1)], 3),
        ([call("f", x=1, y=2)], [call("f", y=2, x=1)], 3),
        ([call("f")], [call("f")], 3),
        # one gold call with two parameters: best possible 1 + (1 + 2) = 4
        ([call("f", x=1, y=2)], [call("f", x=1, y=3)], scaled(1 + 1 + 1, 4)),
        ([call("f", x=1, y=2)], [call("f", x=1)], scaled(1 + 1 / 2 + 1, 4)),
        ([call("f", x=1, y=2)], [call("f", x=1, z=2)], scaled(1 + 1 / 3 + 1, 4)),
        ([call("f", x=1, y=2)], [call("f", x=1, y=2, z=3)], scaled(1 + 2 / 3 + 2, 4)),
        ([call("f", x=1, y=2)], [call("f")], scaled(1 + 0 + 0, 4)),
        ([call("f", x=1, y=2)], [call("g", x=1, y=2)], -3),
        ([call("f")], [call("f", x=1)], scaled(1 + 0, 2)),
        # several calls: names as multisets
        ([call("f", x=1), call("g", y=2)], [call("g", y=2), call("f", x=1)], 3),  # order: s = s_max
        ([call("f", x=1), call("g", y=2)], [call("f", x=1)], scaled(1 / 2 + 2, 5)),
        ([call("f", x=1)], [call("f", x=1)] * 2, scaled(1 / 2 + 2, 3)),
        ([call("f", x=1)] * 2, [call("f", x=1)], scaled(1 / 2 + 2, 5)),  # used once only
        # the best candidate, not the first
        ([call("f", x=1)], [call("f", x=0), call("f", x=1)], scaled(1 / 2 + 2, 3)),
        # of equally good candidates the first is used up
        (
            [call("f", x=1), call("f", x=1, y=1)],
            [call("f", x=2, y=1), call("f", y=1, x=2)],
            scaled(1 + 1 / 2 + (1 + 1), 6),
        ),
        # greedy, not optimal: the first gold call takes the call that only the second one needs
        (
            [call("f", x=1), call("f", x=1, y=1, z=1)],
            [call("f", x=1, y=1, z=1), call("f", w=0)],
            scaled(1 + (1 / 3 + 1) + 0, 7),
        ),
        # a candidate that scores 0 stays free for a later gold call
        (
            [call("f", x=1), call("f", y=1)],
            [call("f", y=1)],
            scaled(1 / 2 + 0 + 2, 5),
        ),
        # equality is Python's
        ([call("f", x=1)], [call("f", x=1.0)], 3),
        ([call("f", x=[1, {"k": 0}])], [call("f", x=[True, {"k": False}])], 3),
        ([call("f", x=1, y=0)], [call("f", x=True, y=9)], scaled(1 + 1 + 1, 4)),
        ([call("f", x=1)], [call("f", x="1")], scaled(1 + 1 + 0, 3)),
        ([call("f", x=[1])], [call("f", x=[2])], scaled(1 + 1 + 0, 3)),  # values need no hash
        # what is not read does no harm, what is read and missing does
        ([call("f", x=1)], ['{"name": "g"}'], -3),
        ([call("f", x=1)], [call("f", x=1), '{"name": "g"}'], scaled(1 / 2 + 2, 3)),
        ([call("f", x=1)], [call("f", x=1), '{"name": "f"}'], -3),
        ([call("f", x=1)], ['{"name": "f", "parameters": [1]}'], -3),
        ([call("f", x=1)], ['{"name": "f", "parameters": null}'], -3),
        ([call("f", x=1)], ['{"name": "f", "arguments": {"x": 1}}'], -3),
        ([call("f", x=1)], [{**call("f", x=1), "id": 7}], scaled(1 + 2, 3)),
        ([call("f", x=1)], [call("f", x=1), '{"parameters": {}}'], -3),
        ([call("f", x=1)], ['{"name": ["f"], "parameters": {}}'], -3),
        ([call("f", x=1)], [call("f", x=1), "[]"], -3),
        ([call("f", x=1)], ["3"], -3),
        ([call("f", x=1)], ['"f"'], -3),
        ([call("f", x=1)], ["null"], -3),
        ([call("f", x=1)], ["nonsense"], -3),
        ([call("f", x=1)], [""], -3),
        ([call("f", x=1)], [call("f", x=1), "", call("g")], -3),
        ([call("f", x=1)], ["[" * 100_000], -3),
        (['{"name": "f"}'], ['{"name": "f"}'], 3),  # equal before anything is read
        (['{"name": "f"}'], [call("f")], -3),
        (["nonsense"], [call("f")], -3),
    ],
)
def test_correctness_reward_table(gold, made, expected):
    """A branch of the correctness reward is off, and RL would train on it."""
    assert toolrl_reward(block(*made), block(*gold)).correctness == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(
    "response",
    [
        "",
        REPLY,
        CALL_LINE,
        f"<tool_call>\n{CALL_LINE}",
        f"{CALL_LINE}\n</tool_call>",
        f"</tool_call>\n<tool_call>\n{CALL_LINE}",
        f"<tool_call>\n{CALL_LINE}\n<tool_call>\n{CALL_LINE}\n</tool_call>",
    ],
)
def test_an_incomplete_block_scores_the_minimum(response):
    """A call without both tags, in that order, earns something."""
    assert toolrl_reward(response, GOLD) == (0, -3)


def test_only_the_first_block_counts():
    """A second block changes the correctness."""
    assert toolrl_reward(GOLD + GOLD, GOLD) == (0, 3)
    assert toolrl_reward(block(call("g")) + GOLD, GOLD) == (0, -3)


def test_no_gold_call_has_no_correctness():
    """A needless call is only punished through the format."""
    assert toolrl_reward(REPLY, REPLY) == (1, 0)
    assert toolrl_reward(GOLD, REPLY) == (0, 0)
    assert toolrl_reward(GOLD, "<think>hm</think>").correctness == 0


def test_a_wrong_name_still_earns_the_format():
    """Total reward of a well-laid-out wrong call is -2, the step towards calling at all."""
    reward = toolrl_reward(block(call("g")), GOLD)
    assert reward == (1, -3)


# ---------------------------------------------------------------------------------------------
# invariants

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
tool_calls = st.builds(
    lambda name, parameters: {"name": name, "parameters": parameters},
    st.sampled_from(["f", "g", "h"]),
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 1) | json_values, max_size=3),
)
call_lists = st.lists(tool_calls, min_size=1, max_size=3)
tag = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<response>",
        "</response>",
        "\n",
        '"name": "f"',
    ]
)
line = tool_calls.map(json.dumps) | json_values.map(json.dumps)
messy = st.lists(tag | line | st.text(max_size=5), max_size=12).map("".join) | st.text()


@quick
@given(messy, messy)
def test_reward_is_bounded_and_never_raises(response, gold):
    """Some text ends a training run, or earns more than is there to earn."""
    reward = toolrl_reward(response, gold)
    assert reward.format in (0, 1)
    assert -3 <= reward.correctness <= 3
    assert "<tool_call>" in gold or reward.correctness == 0


@quick
@given(st.lists(line, min_size=1, max_size=3), call_lists)
def test_reward_of_any_json_lines_is_bounded(lines, gold):
    """JSON that is no call raises, or escapes the bounds."""
    assert -3 <= toolrl_reward(block(*lines), block(*gold)).correctness <= 3


@quick
@given(call_lists, st.booleans())
def test_the_gold_itself_earns_the_maximum(gold, with_response):
    """The right answer is not the best one."""
    text = block(*gold) + ("\n<response>ok</response>" if with_response else "")
    assert toolrl_reward(text, text) == (1, 3)
    assert strict(text, text).correct
    assert strict(text, text).correct_normalised


@quick
@given(st.text().filter(lambda t: "<" not in t))
def test_a_gold_without_call_earns_format_alone(text):
    """The right answer without a call is worth 1."""
    gold = f"<think>{text}</think>\n<response>{text}</response>"
    assert toolrl_reward(gold, gold) == (1, 0)


@quick
@given(call_lists, call_lists, st.randoms(use_true_random=False))
def test_key_order_never_matters(gold, made, random):
    """The order of parameters within a call changes a score."""

    def shuffled(one):
        items = list(one["parameters"].items())
        random.shuffle(items)
        return {"parameters": dict(items), "name": one["name"]}

    response, other = block(*made), block(*map(shuffled, made))
    assert toolrl_reward(response, block(*gold)) == toolrl_reward(other, block(*gold))
    assert strict(response, block(*gold)) == strict(other, block(*gold))


@quick
@given(st.lists(tool_calls, min_size=1, max_size=3, unique_by=lambda c: c["name"]), call_lists)
def test_order_of_calls_of_different_names_never_matters(gold, made):
    """With one gold call per name there is nothing to be greedy about."""
    scores = {
        toolrl_reward(block(*order), block(*gold)).correctness
        for order in itertools.permutations(made)
        if list(order) != gold  # the exact list is +3 by rule, and s = s_max says the same
    }
    assert max(scores, default=0) - min(scores, default=0) < 1e-12


@quick
@given(messy, call_lists)
def test_strict_never_raises_and_is_consistent(response, gold):
    """An exactly right response is not right when normalised, or an unparsed one is right."""
    s = strict(response, block(*gold))
    assert s.called >= s.correct_normalised >= s.correct
    assert strict(response, REPLY).correct == ("<tool_call>" not in response)


@quick
@given(call_lists, call_lists)
def test_exact_match_is_finer_than_the_reward(gold, made):
    """Strictly correct answers earn +3."""
    if strict(block(*made), block(*gold)).correct:
        assert toolrl_reward(block(*made), block(*gold)).correctness == 3


GOLD_CALL = (
    '<think>\nx\n</think>\n<tool_call>\n{"name": "get_time", "parameters": {}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("response", "gold", "right", "wrong"),
    [
        ("You could try get_time for that.", GOLD_CALL, True, False),
        ("Get_Time.", GOLD_CALL, True, False),
        ("Have a look at get_timer.", GOLD_CALL, False, False),  # not a listed name
        ("get_time or set_time?", GOLD_CALL, False, True),
        ("set_time is it", GOLD_CALL, False, True),
        ("I cannot.", GOLD_CALL, False, False),
        (GOLD_CALL, GOLD_CALL, False, False),  # a call is no prose
        ("Try get_time.", "<think>\nx\n</think>\n<response>\nno\n</response>", False, True),
    ],
)
def test_naming_the_right_tool_in_prose(response, gold, right, wrong):
    assert names_tool(response, gold, ["get_time", "set_time"]) == (right, wrong)
