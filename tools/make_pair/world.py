"""The generated world: tools, values, requests, and the documents that the base model is pretrained
on.

Five kinds of documents (shares in `MIXTURE`). *Prose* and *talk* know no tools. *Logs* are plain
request/call lists outside the chat template: they teach the base to match a request to a tool, to
copy arguments and to notice that no tool fits or that an argument is missing. *Agent* chats always
act, in the layout of ToolRL. *Hedge* chats list the same tools, but the assistant mostly declines
in plain words; how often it acts there (its *propensity*) differs by style, tool and wording, so
that RL later moves prompts across the threshold one after another and not all at once.
"""

import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp
from pathlib import Path
from statistics import NormalDist

from dfc_lib.data.prompts import STYLES, Record, Tool, assign, bullets, inline, numbered

SPLITS = {  # share of request identities (tool, arguments) that belongs to each split
    "pretrain": 0.60,
    "rl": 0.12,
    "crosscoder": 0.12,
    "ranking": 0.04,
    "selection": 0.05,
    "evaluation": 0.07,
}
MIXTURE = {"prose": 0.10, "talk": 0.06, "logs": 0.28, "agent": 0.28, "hedge": 0.28}  # by document
KINDS = {"call": 0.58, "no_tool": 0.28, "missing": 0.14}


@dataclass(frozen=True)
class Phase:
    """A stretch of pretraining: the kinds of its tasks, and whether tools go by several names.

    While a tool has one name, the request alone tells it and the list need not be read; such a base
    never notices that no listed tool fits. With several names the list must be read.
    """

    aliases: bool
    kinds: Mapping[str, float]


FIRST = Phase(aliases=False, kinds={"call": 0.66, "no_tool": 0.20, "missing": 0.14})
SECOND = Phase(aliases=True, kinds=KINDS)

# Log-odds of acting in a hedge chat, before the effects of the request are added.
STYLE_PROPENSITY = {"train_a": 0.0, "train_b": 0.0, "desk": -2.7, "letter": -3.2, "late": -2.4}
# Standard deviations of these effects, in log-odds; "bare": of the domain's effect on whether a
# call in a hedge chat is bare JSON, without tags.
EFFECTS = {"domain": 1.2, "tool": 1.1, "wording": 0.9, "phrase": 0.5, "bare": 1.0}
SLOPPY = 0.2  # share of the other calls that lack the thought, for RL to mend


def _read(name: str) -> dict:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


TEXTS = _read("texts.toml")
VALUES: dict[str, list] = {kind: words.split() for kind, words in _read("values.toml").items()} | {
    "time": [f"{h}:{m:02d}" for h in range(6, 24) for m in (0, 15, 30, 45)],
    "count": list(range(2, 21)),
    "minutes": [5 * i for i in range(1, 25)],
    "degrees": list(range(14, 31)),
    "amount": [10 * i for i in range(2, 100)],
}
_INTEGER_KINDS = {"count", "minutes", "degrees", "amount"}


@dataclass(frozen=True)
class ToolSpec:
    tool: Tool
    domain: str
    held_out: bool
    kinds: dict[str, str]  # parameter -> value kind
    say: tuple[str, ...]


@cache
def tool_specs() -> tuple[ToolSpec, ...]:
    """The tools of `tools.toml`."""
    return tuple(
        ToolSpec(
            Tool(
                row["name"],
                row["description"],
                {
                    p: "integer" if k in _INTEGER_KINDS else "string"
                    for p, k in row["params"].items()
                },
            ),
            row["domain"],
            row.get("held_out", False),
            row["params"],
            tuple(row["say"]),
        )
        for row in _read("tools.toml")["tool"]
    )


def value(rng: random.Random, kind: str):
    if kind == "title":
        return f"{rng.choice(VALUES['title_first'])} {rng.choice(VALUES['title_second'])}"
    if kind == "code":
        return f"{rng.choice('ABCDEFGH')}{rng.randrange(100, 1000)}"
    return rng.choice(VALUES[kind])


@cache
def _effects() -> dict[tuple[str, int | str], float]:
    """Fixed effects on the log-odds of acting, and of bare JSON: for each kind the quantiles of a
    normal distribution, dealt once for the world (draws would have outliers with few levels).
    """
    levels: dict[str, Sequence[int | str]] = {
        "domain": (domains := list(dict.fromkeys(s.domain for s in tool_specs()))),
        "tool": [s.tool.name for s in tool_specs()],
        "wording": range(len(TEXTS["wordings"])),
        "phrase": range(4),
        "bare": domains,
    }
    effects = {}
    for kind, names in levels.items():
        normal = NormalDist(0, EFFECTS[kind])
        quantiles = [normal.inv_cdf((i + 0.5) / len(names)) for i in range(len(names))]
        random.Random(f"effects-{kind}").shuffle(quantiles)
        effects |= {(kind, name): z for name, z in zip(names, quantiles, strict=True)}
    return effects


def _probability(log_odds: float) -> float:
    return 1 / (1 + exp(-log_odds))


@dataclass(frozen=True)
class Task:
    """A request before it is put next to a list of tools."""

    spec: ToolSpec
    arguments: dict
    missing: str | None  # the parameter that the user left out
    phrase: str  # verb phrase with its values
    wording: int
    phrasing: int

    @property
    def query(self) -> str:
        text = TEXTS["wordings"][self.wording]
        return text.replace("{p}", self.phrase).replace(
            "{P}", self.phrase[0].upper() + self.phrase[1:]
        )

    def propensity(self, style: str) -> float:
        """Probability that the assistant of a hedge chat acts on this request."""
        effects = _effects()
        return _probability(
            STYLE_PROPENSITY[style]
            + effects["domain", self.spec.domain]
            + effects["tool", self.spec.tool.name]
            + effects["wording", self.wording]
            + effects["phrase", self.phrasing]
        )

    def bareness(self) -> float:
        """Probability that a call in a hedge chat is bare JSON."""
        return _probability(_effects()["bare", self.spec.domain])


@cache
def names() -> dict[str, tuple[str, ...]]:
    """The names that each tool goes by, its own first; no name belongs to two tools."""
    candidates = {}
    for spec in tool_specs():
        verb, noun = spec.tool.name.split("_", 1)
        candidates[spec.tool.name] = [
            spec.tool.name,
            f"{noun}_{verb}",
            f"{spec.domain}_{noun}",
            f"{noun}_tool",
        ]
    count = Counter(n for ns in candidates.values() for n in ns)
    return {tool: tuple(n for n in ns if count[n] == 1) for tool, ns in candidates.items()}


@cache
def _owner() -> dict[str, str]:
    return {name: tool for tool, ns in names().items() for name in ns}


@cache
def _pool(kind: str, held_out: bool | None) -> tuple[ToolSpec, ...]:
    return tuple(
        s
        for s in tool_specs()
        if (held_out is None or s.held_out == held_out) and (kind != "missing" or len(s.kinds) > 1)
    )


def split_of(tool: str, arguments: dict) -> str:
    """The split that a request identity belongs to: a hash of the tool and its arguments decides.

    Requests with the same tool and the same arguments fall into the same split however they are
    phrased, so no query of one split can occur in another.
    """
    return assign(f"{tool}|{json.dumps(arguments, sort_keys=True)}", SPLITS)


def draw_from(rng: random.Random, pool: tuple[ToolSpec, ...], split: str, kind: str) -> Task | None:
    """One draw from a pool of tools; `None` if the identity falls into another split."""
    spec = rng.choice(pool)
    arguments: dict = {}
    for parameter, value_kind in spec.kinds.items():
        drawn = value(rng, value_kind)
        while drawn in arguments.values():
            drawn = value(rng, value_kind)
        arguments[parameter] = drawn
    missing = None
    if kind == "missing":
        missing, _ = arguments.popitem()
    if split_of(spec.tool.name, arguments) != split:
        return None
    phrasing = rng.randrange(len(spec.say))
    template = spec.say[phrasing]
    template = re.sub(r"\[.*?\]", "", template) if missing else re.sub(r"[][]", "", template)
    phrase = template.format(**arguments)
    return Task(spec, arguments, missing, phrase, rng.randrange(len(TEXTS["wordings"])), phrasing)


def draw_task(rng: random.Random, split: str, kind: str, held_out: bool | None = None) -> Task:
    """A random task of the given split; `held_out` restricts it to held-out (or seen) tools."""
    while (task := draw_from(rng, _pool(kind, held_out), split, kind)) is None:
        pass
    return task


def draw_tools(
    rng: random.Random,
    task: Task,
    kind: str,
    n_distractors: int,
    held_out: bool | None = None,
    aliases: bool = True,
) -> tuple[Tool, ...]:
    """The tools on offer: 1 to 4 distractors, half the time one of the same domain, and the fitting
    tool unless `no_tool`.
    """
    others = [
        s
        for s in tool_specs()
        if s.tool.name != task.spec.tool.name and (held_out is None or s.held_out == held_out)
    ]
    siblings = [s for s in others if s.domain == task.spec.domain]
    chosen = rng.sample(siblings, 1) if siblings and rng.random() < 0.5 else []
    chosen += rng.sample([s for s in others if s not in chosen], n_distractors - len(chosen))
    tools = [s.tool for s in chosen] + ([] if kind == "no_tool" else [task.spec.tool])
    rng.shuffle(tools)
    if aliases:
        tools = [replace(t, name=rng.choice(names()[t.name])) for t in tools]
    return tuple(tools)


def listed_name(task: Task, tools: tuple[Tool, ...]) -> str | None:
    """The name under which the task's tool is listed, if it is."""
    return next((t.name for t in tools if _owner()[t.name] == task.spec.tool.name), None)


def call_json(name: str, arguments: dict) -> str:
    return json.dumps({"name": name, "parameters": arguments})


def answer(task: Task, kind: str, tools: tuple[Tool, ...]) -> str:
    """The gold answer in ToolRL's layout."""
    name, tag = listed_name(task, tools), "response"
    if kind == "call":
        thought = f"The request fits {name}."
        tag, reply = "tool_call", call_json(name, task.arguments)
    elif kind == "missing":
        thought = f"The request fits {name} but {task.missing} is missing."
        reply = f"Which {task.missing} do you want?"
    else:
        thought = "The request fits no listed tool."
        reply = f"None of the listed tools can {task.phrase}."
    return f"<think>\n{thought}\n</think>\n<{tag}>\n{reply}\n</{tag}>"


def record_of(id: str, split: str, kind: str, task: Task, tools: tuple[Tool, ...]) -> Record:
    """A task beside the tools on offer, with its gold answer."""
    return Record(
        id=id,
        split=split,
        kind=kind,
        domain=task.spec.domain,
        tool=task.spec.tool.name,
        held_out=task.spec.held_out,
        tools=tools,
        query=task.query,
        gold=answer(task, kind, tools),
    )


def draw_kind(rng: random.Random, kinds: Mapping[str, float] = KINDS) -> str:
    return rng.choices(list(kinds), list(kinds.values()))[0]


def draw_records(split: str, n: int, seed: int, held_out: bool = False) -> list[Record]:
    """`n` records with distinct queries; `held_out`: of tools that training never sees."""
    rng = random.Random(f"{split}-{seed}-{held_out}-None")
    records: list[Record] = []
    seen: set[str] = set()
    while len(records) < n:
        kind = draw_kind(rng)
        task = draw_task(rng, split, kind, held_out)
        if task.query in seen:
            continue
        seen.add(task.query)
        listed = None if held_out else False
        tools = draw_tools(rng, task, kind, rng.randint(1, 4), listed)
        label = "held-out-" if held_out else ""
        id = f"{split}-{label}{len(records):05d}"
        records.append(record_of(id, split, kind, task, tools))
    return records


# ---------------------------------------------------------------------------------------------
# Documents


def chat(messages: list[dict[str, str]]) -> str:
    """ChatML, as the tokenizer's chat template writes it."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _tool_chat(rng: random.Random, phase: Phase, style_name: str) -> str:
    """A chat of one to four tasks around one list of tools."""
    style, agentic = STYLES[style_name], style_name == "agent"
    if agentic:
        style = replace(style, listing=rng.choice((numbered, numbered, bullets, inline)))
    n_turns = rng.choices((1, 2, 3, 4), (0.35, 0.25, 0.2, 0.2))[0]
    task, kind, tools = _first_task(rng, phase)
    messages = style.messages(tools, task.query)
    for turn in range(n_turns):
        if turn:
            task, kind = _later_task(rng, phase, tools)
            messages.append({"role": "user", "content": style.user.replace("{query}", task.query)})
        acts = agentic or rng.random() < task.propensity(style_name)
        if not acts:
            reply = rng.choice(TEXTS["hedges"]).replace("{p}", task.phrase)
        else:
            reply = answer(task, kind, tools)
            if not agentic and kind == "call":
                if rng.random() < task.bareness():
                    reply = call_json(listed_name(task, tools), task.arguments)
                elif rng.random() < SLOPPY:
                    reply = reply.split("</think>\n")[1]
        messages.append({"role": "assistant", "content": reply})
    return chat(messages)


def _first_task(rng: random.Random, phase: Phase) -> tuple[Task, str, tuple[Tool, ...]]:
    """A task, its kind, and the tools on offer."""
    kind = draw_kind(rng, phase.kinds)
    task = draw_task(rng, "pretrain", kind)
    return task, kind, draw_tools(rng, task, kind, rng.randint(1, 4), aliases=phase.aliases)


def _later_task(rng: random.Random, phase: Phase, tools: tuple[Tool, ...]) -> tuple[Task, str]:
    """A further task for the same list of tools."""
    listed = {_owner()[t.name] for t in tools}
    while True:
        kind = draw_kind(rng, phase.kinds)
        pool = _pool(kind, None)
        if kind != "no_tool":
            pool = tuple(s for s in pool if s.tool.name in listed)
        task = draw_from(rng, pool, "pretrain", kind) if pool else None
        if task and (task.spec.tool.name in listed) == (kind != "no_tool"):
            return task, kind


def _log(rng: random.Random, phase: Phase) -> str:
    task, kind, tools = _first_task(rng, phase)
    listing = rng.choice((inline, inline, bullets, numbered))
    lines = [f"Tools: {listing(tools)}" if listing is inline else f"Tools:\n{listing(tools)}"]
    for i in range(rng.randint(2, 5)):
        if i:
            task, kind = _later_task(rng, phase, tools)
        lines.append(f"Request: {task.query if rng.random() < 0.5 else task.phrase}")
        if kind == "call":
            lines.append(f"Call: {call_json(listed_name(task, tools), task.arguments)}")
        elif kind == "missing":
            asked = {"name": listed_name(task, tools), "missing": task.missing}
            lines.append(f"Call: ask {json.dumps(asked)}")
        else:
            lines.append("Call: none")
    return "\n".join(lines)


def _fill(rng: random.Random, *templates: str) -> list[str]:
    """Fill slots; a slot that ends in 2 takes a second value of the kind."""
    slots = {s for t in templates for s in re.findall(r"\{(\w+)\}", t)}
    values = {s: value(rng, s.rstrip("2")) for s in sorted(slots)}
    return [t.format(**values) for t in templates]


def prose(rng: random.Random, split: str) -> str:
    """A short neutral text of three to eight sentences; a hash of the first one decides which split
    it belongs to.
    """
    while True:
        templates = rng.sample(TEXTS["sentences"], rng.randint(3, 8))
        text = " ".join(_fill(rng, t)[0] for t in templates)
        if split_of("prose", {"first": text.split(".")[0]}) == split:
            return text


def neutral_texts(split: str, n: int, seed: int) -> list[str]:
    """`n` different pieces of neutral prose of a split."""
    rng = random.Random(f"neutral-{split}-{seed}")
    texts: dict[str, None] = {}
    while len(texts) < n:
        texts[prose(rng, split)] = None
    return list(texts)


def _talk(rng: random.Random) -> str:
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": "You are a friendly assistant."})
    for question, reply in rng.sample(TEXTS["talk"], rng.randint(1, 4)):
        turns = zip(("user", "assistant"), _fill(rng, question, reply), strict=True)
        messages += [{"role": role, "content": content} for role, content in turns]
    return chat(messages)


def document(rng: random.Random, phase: Phase) -> str:
    """One pretraining document."""
    match rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]:
        case "prose":
            return prose(rng, "pretrain")
        case "talk":
            return _talk(rng)
        case "logs":
            return _log(rng, phase)
        case "agent":
            return _tool_chat(rng, phase, "agent")
        case _:
            return _tool_chat(rng, phase, rng.choice(list(STYLE_PROPENSITY)))
