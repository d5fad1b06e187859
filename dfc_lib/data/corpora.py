"""Where a profile's prompts and neutral texts come from: one way in, whatever the pair.

``records(profile, split)`` and ``neutral(profile, split)`` read what ``profile.records`` and
``profile.neutral`` name:

- a folder with one JSONL file a split, as the embedded pair's ``data/prompts``;
- a file (or a folder of files) of rows, JSONL, JSON or parquet: your own prompts;
- a data set of the Hugging Face hub, ``owner/name`` or ``owner/name:configuration``.

Rows are laid out as records and split once; the result is kept in ``build/<profile>/corpora/`` and
made again when the source changes. A hash of the content decides the split, so that no two splits
share a request. Rows of prompts come in one of two forms:

=============  ================================================================================
ToolRL's       ``instruction`` (the system text with its numbered list of tools), ``input`` (the
               dialogue, turns marked ``<user>`` and ``<obs>``), ``output`` (the gold answer);
               arXiv 2504.13958 and its public data
our own        ``tools`` (a list of ``name, description, parameters``), ``query``, ``gold`` and, if
               the model was trained on texts of its own, ``system`` and ``user`` as it saw them
=============  ================================================================================

The gold answer is in ToolRL's layout, see ``scoring``. Rows of neutral text have a column ``text``.
"""

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfc_lib import paths, store
from dfc_lib.data import scoring
from dfc_lib.data.pair import sha256
from dfc_lib.profiles import Profile
from dfc_lib.data.prompts import SPLITS, Record, Tool, assign, read_neutral, read_records, write_neutral, write_records

CORPORA_VERSION = 1  # raise it when the same source would give other records
# ToolRL has 4,000 rows: half to train crosscoders on, and 1,000 to evaluate on.
SHARES = {"crosscoder": 0.50, "ranking": 0.15, "selection": 0.10, "evaluation": 0.25}
NEUTRAL_CHARACTERS = 200, 2_000  # shorter web pages are left out, longer ones cut: about 450 tokens
HEADER = "**Dialogue Records History**"
SOURCE = "source.json"


class CorpusError(RuntimeError):
    """A source of texts is missing, out of reach or not in a known form; says what to do."""


def splits(profile: Profile) -> list[str]:
    """The splits of the profile's prompts."""
    folder = _prompts(profile)
    return [split for split in SPLITS if (folder / f"{split}.jsonl").exists()]


def records(profile: Profile, split: str) -> list[Record]:
    """All prompts of a split, in a fixed order.

    Raises:
        CorpusError: the source is out of reach, or no row of it can be used.
        FileNotFoundError: a shipped file is missing.
    """
    return read_records(_prompts(profile) / f"{split}.jsonl")


def neutral(profile: Profile, split: str) -> list[str]:
    """All neutral texts of a split, in a fixed order. Raises as :func:`records`."""
    return read_neutral(_neutral(profile) / f"{split}.jsonl")


# ---------------------------------------------------------------------------------------------
# Made once, kept


def _prompts(profile: Profile) -> Path:
    """The folder with one file of records a split."""
    shipped = _split_files(profile.records)
    if shipped:
        return shipped
    folder, about = _kept(profile, "prompts", profile.records)
    if _is_current(folder, about):
        return folder
    left_out: Counter[str] = Counter()
    by_split: dict[str, dict[str, Record]] = {split: {} for split in SHARES}
    for row in _rows(profile.records, hint=_DOWNLOAD_ALL):
        try:
            record = record_of(row)
        except ValueError as error:
            left_out[str(error)] += 1
            continue
        if record.id in by_split[record.split]:
            left_out["a repetition of another row"] += 1
        by_split[record.split][record.id] = record
    reasons = "; ".join(f"{n} x {reason}" for reason, n in left_out.most_common(5))
    _need_some(profile.records, by_split, reasons)
    if reasons:
        warnings.warn(f"{profile.records}: rows left out: {reasons}", stacklevel=3)
    for split, found in by_split.items():
        write_records(folder / f"{split}.jsonl", found.values())
    return _mark_current(folder, about)


def _neutral(profile: Profile) -> Path:
    """The folder with one file of neutral texts a split."""
    shipped = _split_files(profile.neutral)
    if shipped:
        return shipped
    wanted = {
        "crosscoder": profile.n_crosscoder_texts,
        "ranking": max(profile.n_ranking, profile.n_neutral_texts),
        "evaluation": profile.n_steering,
    }
    folder, about = _kept(profile, "neutral", profile.neutral, wanted)
    if _is_current(folder, about):
        return folder
    by_split: dict[str, dict[str, None]] = {split: {} for split in wanted}
    rows = _rows(profile.neutral, streaming=True, hint=_DOWNLOAD_ONE)
    for row in rows:
        if "text" not in row:
            raise CorpusError(f"{profile.neutral}: its rows have no column 'text' ({list(row)}).")
        text = _cut(row["text"])
        split = assign(text, SHARES)
        if text and split in wanted and len(by_split[split]) < wanted[split]:
            by_split[split][text] = None
        if all(len(by_split[split]) >= n for split, n in wanted.items()):
            rows.close()
            break
    _need_some(profile.neutral, by_split)
    fewer = {s: f"{len(by_split[s])} of {n}" for s, n in wanted.items() if len(by_split[s]) < n}
    if fewer:
        warnings.warn(f"{profile.neutral}: fewer texts than wanted: {fewer}", stacklevel=3)
    write_neutral(folder, {split: list(found) for split, found in by_split.items()})
    return _mark_current(folder, about)


def _split_files(source: str) -> Path | None:
    """The folder itself, where a source is one that holds a file a split."""
    folder = paths.ROOT / source
    return folder if any((folder / f"{split}.jsonl").exists() for split in SHARES) else None


def _kept(profile: Profile, what: str, source: str, wanted: Any = None) -> tuple[Path, dict]:
    """Where the split texts of a source are kept, and what must be written beside them."""
    about: dict[str, Any] = {"version": CORPORA_VERSION, "source": source, "wanted": wanted}
    about["files"] = {path.name: sha256(path) for path in _files(source)}
    return paths.build(profile.name, "corpora") / what, about


def _is_current(folder: Path, about: dict) -> bool:
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8")) == about
    except (OSError, ValueError):
        return False


def _mark_current(folder: Path, about: dict) -> Path:
    """Last of all, so that a killed run leaves no half-made splits that look whole."""
    store.write_atomically(folder / SOURCE, json.dumps(about, indent=1) + "\n")
    return folder


def _need_some(source: str, by_split: Mapping[str, Any], left_out: str = "") -> None:
    counts = {split: len(found) for split, found in by_split.items()}
    if not all(counts.values()):
        raise CorpusError(
            f"{source}: not every split has a text ({counts}; left out: {left_out or 'none'}). "
            "Give a larger source, or mend its rows: a row of prompts has instruction, input and "
            "output, or tools, query and gold; a neutral one has text."
        )


# ---------------------------------------------------------------------------------------------
# Rows

# FineWeb is far too large to download whole; one file of it is plenty.
_DOWNLOAD_ALL = "hf download {name} --repo-type dataset --local-dir {place}"
_DOWNLOAD_ONE = _DOWNLOAD_ALL + ' --include "sample/10BT/000_00000.parquet"'
_SUFFIXES = (".parquet", ".jsonl", ".json")  # a folder's rows are in files of the first kind it has


def _files(source: str) -> list[Path]:
    """The local files of a source: itself, those in its folder, or those downloaded by hand."""
    path = paths.ROOT / source
    if not path.exists() and (downloaded := paths.downloaded(source.partition(":")[0])):
        path = downloaded
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    for suffix in _SUFFIXES:
        found = sorted(path.rglob(f"*{suffix}"))
        if visible := [p for p in found if "/." not in f"/{p.relative_to(path).as_posix()}"]:
            return visible
    raise CorpusError(f"{path}: no .parquet, .jsonl or .json file in this folder.")


def _rows(source: str, *, streaming: bool = False, hint: str) -> Iterator[dict[str, Any]]:
    """The rows of a source; a hub data set's splits one after the other."""
    files, (name, _, configuration) = _files(source), source.partition(":")
    if not files and not _looks_like_hub(name):
        raise CorpusError(
            f"{source}: no such file or folder, and not the name of a hub data set (owner/name). "
            "Paths in a profile are relative to the compendium, in a profile file to that file."
        )
    for file in files:
        yield from _rows_of(file)
    if files:
        return
    import datasets

    try:
        found = datasets.load_dataset(name, configuration or None, streaming=streaming)
        for split in sorted(found):
            yield from found[split]
    except Exception as error:  # the hub's client has many kinds of its own
        place = paths.DOWNLOADS / name.rpartition("/")[2]
        command = hint.format(name=name, place=os.path.relpath(place, paths.ROOT))
        raise CorpusError(
            f"{source}: cannot be had from the Hugging Face hub ({type(error).__name__}: {error}). "
            f"On a machine with network access run `{command}` and copy the folder to {place}, "
            "where it is found."
        ) from error


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one local file."""
    if file.suffix not in _SUFFIXES:
        raise CorpusError(f"{file}: cannot be read; give .parquet, .jsonl or .json.")
    try:
        if file.suffix == ".parquet":
            import datasets

            yield from datasets.load_dataset(
                "parquet", data_files=[str(file)], split="train", streaming=True
            )
            return
        with file.open(encoding="utf-8") as lines:
            if file.suffix == ".json" and lines.read(1) == "[":  # one list, as ToolRL's own release
                lines.seek(0)
                yield from json.load(lines)
                return
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise CorpusError(f"{file}, line {number}: not JSON ({error}).") from error
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's errors are ValueErrors
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"{file}: cannot be read ({type(error).__name__}: {error}). Copy or download it again."
        ) from error


def _looks_like_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _cut(text: Any) -> str:
    """A web page as a neutral text: stripped, cut between words; empty if it is too short."""
    at_least, at_most = NEUTRAL_CHARACTERS
    text = text.strip() if isinstance(text, str) else ""
    if len(text) > at_most:
        text = text[:at_most].rpartition(" ")[0] or text[:at_most]
    return text if len(text) >= at_least else ""


# ---------------------------------------------------------------------------------------------
# A row as a record

_TOOL = re.compile(
    r"^\d+\. Name: (?P<name>[^\n]*)\nDescription: (?P<description>.*?)"
    r"\nParameters: (?P<parameters>[^\n]*)$",
    re.DOTALL | re.MULTILINE,
)
_USER_TURN = re.compile(r"<user>(.*?)</user>", re.DOTALL)
_ANY_TURN = re.compile(r"<(?:user|obs|think|tool_call|response)>")


def record_of(row: Mapping[str, Any]) -> Record:
    """A row in ToolRL's form or in ours as a record; its split and id are hashes of its content.

    The steps of one dialogue, which ToolRL gives as rows of growing history, begin with the same
    user turn; that turn decides the split.

    Raises:
        ValueError: the row cannot be used, in words that are the same for rows with the same fault.
    """
    if {"instruction", "input", "output"} <= row.keys():
        return _from_toolrl(*(_text(row, column) for column in ("instruction", "input", "output")))
    if {"tools", "query", "gold"} <= row.keys():
        tools = tuple(_own_tool(tool) for tool in row["tools"])
        optional = {column: row.get(column) or "" for column in ("system", "user", "domain")}
        query = _text(row, "query")
        return _record(tools, query, query, _text(row, "gold"), **optional)
    raise ValueError(
        f"its columns are {sorted(row)}, neither instruction, input, output nor tools, query, gold"
    )


def _from_toolrl(system: str, dialogue: str, gold: str) -> Record:
    tools = toolrl_tools(system)
    turns = dialogue.replace(HEADER, "", 1).strip()
    first = _USER_TURN.search(turns)
    if first is None:
        raise ValueError("no <user> turn in the input")
    alone = len(_ANY_TURN.findall(turns)) == 1
    query = first[1].strip() if alone else turns
    return _record(tools, query, first[1], gold, system=system, user=dialogue)


def toolrl_tools(system: str) -> tuple[Tool, ...]:
    """The tools that a ToolRL system text lists; a parameter's type is given in the data's words.

    Raises:
        ValueError: a tool's parameters are not a JSON object.
    """
    tools = []
    for match in _TOOL.finditer(system):
        try:
            parameters = json.loads(match["parameters"])
            types = {
                name: str(spec.get("type", "")) if isinstance(spec, dict) else str(spec)
                for name, spec in parameters.items()
            }
        except (ValueError, AttributeError):
            raise ValueError("a tool's parameters are not a JSON object") from None
        tools.append(Tool(match["name"].strip(), match["description"].strip(), types))
    return tuple(tools)


def _own_tool(tool: Any) -> Tool:
    try:
        parameters = tool.get("parameters") or {}
        if isinstance(parameters, str):  # parquet has no free-form objects
            parameters = json.loads(parameters)
        types = {k: str(v) for k, v in parameters.items() if v is not None}
        return Tool(tool["name"], tool.get("description") or "", types)
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError("a tool has no name, or its parameters are no object") from None


def _record(
    tools: tuple[Tool, ...], query: str, opening: str, gold: str, domain: str = "", **texts: str
) -> Record:
    if not tools:
        raise ValueError("no tool is listed")
    if not query.strip():
        raise ValueError("the query is empty")
    calls = scoring.calls(gold)
    if scoring.gold_has_call(gold) and not calls:
        raise ValueError("the gold's <tool_call> block is not JSON, one call a line")
    content = json.dumps([[t.name for t in tools], query, gold, *texts.values()])
    return Record(
        id=hashlib.blake2b(content.encode(), digest_size=6).hexdigest(),
        split=assign(" ".join(opening.casefold().split()), SHARES),
        kind="call" if calls else "response",
        domain=domain,
        tool=calls[0]["name"] if calls else "",
        held_out=False,
        tools=tools,
        query=query,
        gold=gold.strip(),
        **texts,
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} is not a text")
    return row[column]
