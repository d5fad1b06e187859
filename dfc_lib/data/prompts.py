"""Prompt records, the styles in which a record is laid out, and the splits of the data.

A record is style-free: the tools on offer, the user's query and the gold answer in ToolRL's layout
(arXiv 2504.13958: think, then tool call or response). A `Style` turns it into chat messages. RL
sees only `TRAINING_STYLES`; the *fixed prompt* of the `calibrated` protocol is a style that RL
never saw; the `published` protocol feeds the system text alone (S1: no user query, no chat
template). A record that brings the very texts that RL saw (`system`, `user`) shows them wherever a
training style is asked for. `corpora` says where records come from.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dfc_lib.store import write_atomically


@dataclass(frozen=True)
class Tool:
    """A callable tool: `parameters` maps a parameter's name to its type (`"string"`, `"integer"` or
    what else the data calls it).
    """

    name: str
    description: str
    parameters: dict[str, str]


@dataclass(frozen=True)
class Record:
    """One task: which tools are listed, what the user asks, and the gold answer.

    `kind` is `"call"` (a listed tool fits and every argument is given), `"no_tool"` (nothing listed
    fits) or `"missing"` (a tool fits, an argument is not given); `"response"` where the gold
    answers in words and the data does not say why. `tool` is the tool the user has in mind, listed
    or not.
    """

    id: str
    split: str
    kind: str
    domain: str
    tool: str
    held_out: bool
    tools: tuple[Tool, ...]
    query: str
    gold: str
    system: str = ""  # the system text and the user message as RL saw them, where the data has them
    user: str = ""

    @property
    def tool_names(self) -> list[str]:
        return [tool.name for tool in self.tools]


# ---------------------------------------------------------------------------------------------
# How the tools are listed


def numbered(tools: Sequence[Tool]) -> str:
    """ToolRL's listing: number and name, description, parameters as JSON."""
    return "\n".join(
        f"{i}. Name: {t.name}\nDescription: {t.description}\nParameters: {json.dumps(t.parameters)}"
        for i, t in enumerate(tools, start=1)
    )


def bullets(tools: Sequence[Tool]) -> str:
    """One line a tool, with its description."""
    return "\n".join(f"- {t.name}({', '.join(t.parameters)}): {t.description}" for t in tools)


def inline(tools: Sequence[Tool]) -> str:
    """All tools in one line, without descriptions."""
    return "; ".join(f"{t.name}({', '.join(t.parameters)})" for t in tools)


@dataclass(frozen=True)
class Style:
    """How a record becomes chat messages. `system` has one `{tools}` slot, `user` one `{query}`
    slot.
    """

    system: str
    listing: Callable[[Sequence[Tool]], str]
    user: str = "{query}"
    opening: Sequence[str] = ()  # an earlier user / assistant exchange

    def messages(self, tools: Sequence[Tool], query: str) -> list[dict[str, str]]:
        content = self.system.replace("{tools}", self.listing(tools))
        messages = [{"role": "system", "content": content}]
        if self.opening:
            messages += [
                {"role": "user", "content": self.user.replace("{query}", self.opening[0])},
                {"role": "assistant", "content": self.opening[1]},
            ]
        return [*messages, {"role": "user", "content": self.user.replace("{query}", query)}]


_TAGGED = "<user> {query} </user>"  # as in ToolRL's dialogues
_LISTINGS = {"numbered": numbered, "bullets": bullets, "inline": inline}

STYLES = {
    name: Style(**style | {"listing": _LISTINGS[style["listing"]]})
    for name, style in tomllib.loads(
        Path(__file__).with_name("styles.toml").read_text(encoding="utf-8")
    ).items()
}
TRAINING_STYLES = ("train_a", "train_b")
ELICITING_STYLE = "agent"
FIXED_STYLE = "desk"  # the fixed prompt; RL never saw it


# ---------------------------------------------------------------------------------------------
# Splits and files


def assign(key: str, shares: Mapping[str, float]) -> str:
    """One of the splits, by a hash of `key`: equal keys never part. `shares` sum to one."""
    u = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    for split, share in shares.items():
        if u < share:
            return split
        u -= share
    return split


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, whole or not at all."""
    own = ("system", "user")  # left out where a record has none
    _write(path, ({k: v for k, v in asdict(r).items() if v or k not in own} for r in records))


def read_records(path: Path) -> list[Record]:
    """Read records written by `write_records`.

    Raises:
        FileNotFoundError: the file is missing; says how to get it back.
        ValueError: a line is not a record; names file and line.
    """
    records = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            row["tools"] = tuple(Tool(**tool) for tool in row["tools"])
            records.append(Record(**row))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not a prompt record: {error}") from error
    return records


def write_neutral(path: Path, texts: Iterable[str]) -> None:
    """Write neutral texts as JSON lines, whole or not at all."""
    _write(path, ({"text": text} for text in texts))


def read_neutral(path: Path) -> list[str]:
    """Read neutral texts written by `write_neutral`. Raises as `read_records` does."""
    return [json.loads(line)["text"] for line in _lines(path)]


def _write(path: Path, rows: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: restore it with `git checkout -- data` or `make pair`"
        )
    return path.read_text(encoding="utf-8").splitlines()


def assert_disjoint(**splits: Sequence[Record]) -> None:
    """Raise if two splits share a query, or a record sits in a split other than its own.

    Raises:
        ValueError: names both splits and one offending query.
    """
    owner: dict[str, str] = {}
    for name, records in splits.items():
        for record in records:
            if record.split != name:
                raise ValueError(f"record {record.id} is of split {record.split}, found in {name}")
            other = owner.setdefault(record.query, name)
            if other != name:
                raise ValueError(f"splits {other} and {name} share the query {record.query!r}")


# ---------------------------------------------------------------------------------------------
# From a record to text and tokens


def messages(record: Record, style: str) -> list[dict[str, str]]:
    """A record as chat messages.

    Texts that a record brings with it replace the style's: the system text in a training style, the
    user message in every style that marks the user's turns as ToolRL does.
    """
    laid_out = STYLES[style].messages(record.tools, record.query)
    if record.system and style in TRAINING_STYLES:
        laid_out[0] = {"role": "system", "content": record.system}
    if record.user and STYLES[style].user == _TAGGED:
        laid_out[-1] = {"role": "user", "content": record.user}
    return laid_out


def chat_text(tokenizer, record: Record, style: str, prefill: str = "") -> str:
    """The prompt up to and including the assistant header, under the chat template, plus an
    optional prefill.
    """
    laid_out = messages(record, style)
    text = tokenizer.apply_chat_template(laid_out, tokenize=False, add_generation_prompt=True)
    return text + prefill


def published_text(record: Record, style: str) -> str:
    """The prompt of S1's public code: the system text alone, no user query, no chat template."""
    return messages(record, style)[0]["content"]


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without added special tokens (the chat template has written them already)."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
