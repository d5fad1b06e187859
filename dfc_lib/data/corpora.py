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
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dfc_lib import paths, store
from dfc_lib.data import prompts, scoring
from dfc_lib.data.pair import by_hand, is_hub_name
from dfc_lib.data.prompts import Record, Tool
from dfc_lib.profiles import Profile
from dfc_lib.provenance import code_hash

# ToolRL has 4,000 rows: half to train crosscoders on, and 1,000 to evaluate on.
SHARES = {"crosscoder": 0.50, "ranking": 0.15, "selection": 0.10, "evaluation": 0.25}
NEUTRAL_CHARACTERS = 200, 2_000  # shorter web pages are left out, longer ones cut: about 450 tokens
HEADER = "**Dialogue Records History**"


class CorpusError(RuntimeError):
    """A source of texts is missing, out of reach or not in a known form; says what to do."""


def splits(profile: Profile) -> list[str]:
    """The splits of the profile's prompts."""
    folder = _prompts(profile)
    return [split for split in ("rl", *SHARES) if (folder / f"{split}.jsonl").exists()]


def records(profile: Profile, split: str) -> list[Record]:
    """All prompts of a split, in a fixed order.

    Raises:
        CorpusError: the source is out of reach, or no row of it can be used.
        FileNotFoundError: a shipped file is missing.
    """
    return prompts.read_records(_prompts(profile) / f"{split}.jsonl")


def neutral(profile: Profile, split: str) -> list[str]:
    """All neutral texts of a split, in a fixed order. Raises as :func:`records`."""
    wanted = {
        "crosscoder": profile.n_crosscoder_texts,
        "ranking": max(profile.n_ranking, profile.n_neutral_texts),
        "evaluation": profile.n_steering,
    }
    folder = _folder(profile, "neutral", profile.neutral, _write_neutral, wanted)
    return prompts.read_neutral(folder / f"{split}.jsonl")


# ---------------------------------------------------------------------------------------------
# Made once, kept


def _prompts(profile: Profile) -> Path:
    """The folder with one file of records a split."""
    return _folder(profile, "prompts", profile.records, _write_prompts)


def _folder(
    profile: Profile, what: str, source: str, write: Callable[..., None], wanted: Any = None
) -> Path:
    """The source itself where it holds a file a split; else what ``write`` makes of it, kept."""
    shipped = paths.ROOT / source
    if any((shipped / f"{split}.jsonl").exists() for split in SHARES):
        return shipped
    folder = paths.build(profile.name, "corpora", what)
    files = {path.name: store.sha256(path) for path in _files(source)}
    made_from = {"code": code_hash(__name__), "source": source, "wanted": wanted, "files": files}
    content, mark = json.dumps(made_from, indent=1) + "\n", folder / "source.json"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != content:
        write(source, folder, wanted)
        # Last of all, so that a killed run leaves no half-made splits that look whole.
        store.write_atomically(mark, content)
    return folder


def _write_prompts(source: str, folder: Path, _: None) -> None:
    left_out: dict[str, list[int]] = {}  # the rows, counted from 1
    by_split: dict[str, dict[str, Record]] = {split: {} for split in SHARES}
    for number, row in enumerate(_rows(source), start=1):
        try:
            record = record_of(row)
        except ValueError as error:
            left_out.setdefault(str(error), []).append(number)
            continue
        if record.id in by_split[record.split]:
            left_out.setdefault("a repetition of another row", []).append(number)
        by_split[record.split][record.id] = record
    most = sorted(left_out.items(), key=lambda of: -len(of[1]))[:5]
    reasons = "; ".join(f"{len(rows)} x {why} (first: row {rows[0]})" for why, rows in most)
    _need_some(source, by_split, reasons)
    if reasons:
        warnings.warn(f"{source}: rows left out: {reasons}", stacklevel=5)
    for split, records in by_split.items():
        prompts.write_records(folder / f"{split}.jsonl", records.values())


def _write_neutral(source: str, folder: Path, wanted: dict[str, int]) -> None:
    by_split: dict[str, dict[str, None]] = {split: {} for split in wanted}
    missing = Counter(wanted)
    # FineWeb is far too large to download whole; one file of it is plenty.
    for row in _rows(source, ' --include "sample/10BT/000_00000.parquet"', streaming=True):
        if "text" not in row:
            raise CorpusError(f"{source}: its rows have no column 'text' ({list(row)}).")
        text = _cut(row["text"])
        split = prompts.assign(text, SHARES)
        if text and missing[split]:
            by_split[split][text] = None
            missing[split] = wanted[split] - len(by_split[split])
        if not missing.total():
            break
    _need_some(source, by_split)
    if fewer := {s: f"{wanted[s] - n} of {wanted[s]}" for s, n in missing.items() if n}:
        warnings.warn(f"{source}: fewer texts than wanted: {fewer}", stacklevel=5)
    for split, texts in by_split.items():
        prompts.write_neutral(folder / f"{split}.jsonl", texts)


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


def _rows(source: str, options: str = "", streaming: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a source; a hub data set's splits one after the other.

    ``options`` are those of the download by hand that an error suggests.
    """
    files, (name, _, configuration) = _files(source), source.partition(":")
    if not files and not is_hub_name(name):
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
        of_splits = datasets.load_dataset(name, configuration or None, streaming=streaming)
        for split in sorted(of_splits):
            yield from of_splits[split]
    except Exception as error:  # the hub's client has many kinds of its own
        raise CorpusError(by_hand(name, error, f" --repo-type dataset{options}")) from error


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one local file."""
    if file.suffix not in _SUFFIXES:
        raise CorpusError(f"{file}: cannot be read; give .parquet, .jsonl or .json.")
    try:
        if file.suffix == ".parquet":
            import datasets

            of_file = {"data_files": [str(file)], "split": "train"}
            yield from datasets.load_dataset("parquet", **of_file, streaming=True)
            return
        with file.open(encoding="utf-8") as lines:
            is_list = lines.read(1) == "["  # as ToolRL's own release
            lines.seek(0)
            yield from json.load(lines) if is_list else _parsed(lines)
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's errors are ValueErrors
        raise CorpusError(
            f"{file}: cannot be read ({type(error).__name__}: {error}). Copy or download it again."
        ) from error


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: not JSON ({error})") from error


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
        system, dialogue, gold = (_text(row, name) for name in ("instruction", "input", "output"))
        turns = dialogue.replace(HEADER, "", 1).strip()
        first = _USER_TURN.search(turns)
        if first is None:
            raise ValueError("no <user> turn in the input")
        query = first[1].strip() if len(_ANY_TURN.findall(turns)) == 1 else turns
        tools = (_tool(match.groupdict()) for match in _TOOL.finditer(system))
        return _record(tools, query, first[1], gold, system=system, user=dialogue)
    if {"tools", "query", "gold"} <= row.keys():
        optional = {column: row.get(column) or "" for column in ("system", "user", "domain")}
        query = _text(row, "query")
        return _record(map(_tool, row["tools"]), query, query, _text(row, "gold"), **optional)
    forms = ({"instruction", "input", "output"}, {"tools", "query", "gold"})
    nearest = max(forms, key=lambda form: len(form & row.keys()))
    raise ValueError(
        f"no {' and no '.join(sorted(nearest - row.keys()))} in a row with the columns "
        f"{sorted(row)}; it must have instruction, input, output or tools, query, gold"
    )


def _tool(listed: Mapping[str, Any]) -> Tool:
    """A tool; a parameter's type is given in the data's words."""
    try:
        parameters = listed.get("parameters")
        if isinstance(parameters, str):  # in ToolRL's texts, and in parquet, which has no objects
            parameters = json.loads(parameters)
        types = {
            name: str(spec.get("type", "")) if isinstance(spec, dict) else str(spec)
            for name, spec in (parameters or {}).items()
            if spec is not None
        }
        return Tool(listed["name"].strip(), (listed.get("description") or "").strip(), types)
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError("a tool has no name, or its parameters are not a JSON object") from None


def _record(
    tools: Iterable[Tool], query: str, opening: str, gold: str, domain: str = "", **texts: str
) -> Record:
    tools = tuple(tools)
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
        split=prompts.assign(" ".join(opening.casefold().split()), SHARES),
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
