"""Prompts and neutral texts from ToolRL's rows, FineWeb's, and a user's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dfc_lib import paths, profiles
from dfc_lib.data import corpora, prompts, scoring
from dfc_lib.data.corpora import CorpusError, record_of

CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Turin", "Perth", "Nice", "Kyoto"]
TOOLS = (
    (
        "weather_now",
        "Current weather.",
        {"city": ("The city.", "str", "Oslo"), "days": ("", "int, optional", 3)},
    ),
    ("M4.5+ Earthquakes, Past 7 Days", "Recent earthquakes.", {}),
    ("6.j4 Quotes", "Quotes.\nFrom a category.", {"k.1": ("The category.", "List[str]", "")}),
)


def system_text(tools=TOOLS) -> str:
    """A system text in the layout of ToolRL's public data: the markers are its own."""
    listed = "\n".join(
        f"{i}. Name: {name}\nDescription: {description}\nParameters: "
        + json.dumps(
            {
                p: dict(zip(("description", "type", "default"), s, strict=True))
                for p, s in of.items()
            }
        )
        for i, (name, description, of) in enumerate(tools, 1)
    )
    return (
        "You are an assistant that can call tools.\n\n**Available Tools**\nIn your response, you "
        f"can use the following tools:\n{listed}\n\n**Steps for Each Turn**\n1. **Think**\n\n"
        "**Output Format**\n```plaintext\n<think> Your thoughts </think>\n<tool_call>\n"
        '{"name": "Tool name", "parameters": {"Parameter name": "Parameter content"}}\n...\n'
        "</tool_call>\n<response> ... </response>\n```\n\n**Important Notes**\n"
        "1. Refer to the history and to `<obs>` (if exists)."
    )


def call(**parameters) -> str:
    line = json.dumps({"name": "weather_now", "parameters": parameters})
    return f"<think> I should use the tool. </think>\n<tool_call>\n{line}\n</tool_call>"


REPLY = "<think> I should answer. </think>\n<response> Here it is. </response>"


def toolrl_rows(n: int) -> list[dict[str, str]]:
    """n dialogues as rows: a first step with a call and, for every third, its later steps."""
    rows = []
    for i in range(n):
        city = CITIES[i % len(CITIES)]
        first = f"**Dialogue Records History**\n<user> Weather in {city} in {i} days? </user>"
        answer = REPLY if i % 5 == 4 else call(city=city, days=i)
        rows.append({"instruction": system_text(), "input": first, "output": answer})
        if i % 3 == 0:
            later = f'{first}\n\n{answer}\n<obs> [{{"name": "weather_now", "results": {i}}}] </obs>'
            rows.append({"instruction": system_text(), "input": later, "output": REPLY})
            more = f"{later}\n\n{REPLY}\n\n<user> And tomorrow? </user>"
            rows.append(
                {"instruction": system_text(), "input": more, "output": call(city=city, days=1)}
            )
    return rows


def fineweb_rows(n: int) -> list[dict]:
    """n pages with FineWeb's columns; some far too long, some too short."""
    sentence = "On day {} the {} market was open and {} people came to look at the boats. "
    pages = (
        "".join(
            sentence.format(i, CITIES[(i + j) % 10], i * j) for j in range(4 + 40 * (i % 7 == 0))
        )
        for i in range(n)
    )
    return [
        {
            "text": "Closed." if i % 11 == 0 else page,
            "id": f"<urn:uuid:{i}>",
            "url": f"https://example.org/{i}",
        }
        | {
            "dump": "CC-MAIN-2024-10",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(page) // 4,
        }
        for i, page in enumerate(pages)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """The profile of the hub pair, reading stand-ins for its data."""
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    records = write(tmp_path / "rlla.json", toolrl_rows(60))
    neutral = write(tmp_path / "fineweb" / "000_00000.parquet", fineweb_rows(400)).parent
    counts = {"n_crosscoder_texts": 40, "n_ranking": 12, "n_neutral_texts": 12, "n_steering": 20}
    return replace(profiles.get("qwen"), records=str(records), neutral=str(neutral), **counts)


# ---------------------------------------------------------------------------------------------
# ToolRL's rows


def test_a_row_is_mapped_faithfully():
    """Tools, query and gold must be the row's own; the texts that RL saw must stay as they are."""
    row = toolrl_rows(1)[0]
    record = record_of(row)
    assert record.tool_names == [name for name, _, _ in TOOLS]
    assert record.tools[0].parameters == {"city": "str", "days": "int, optional"}
    assert record.tools[1].parameters == {}
    assert record.tools[2].description == "Quotes.\nFrom a category."
    assert (record.query, record.kind, record.tool) == (
        "Weather in Oslo in 0 days?",
        "call",
        "weather_now",
    )
    assert record.gold == row["output"]
    training = prompts.messages(record, prompts.TRAINING_STYLES[0])
    assert [m["content"] for m in training] == [row["instruction"], row["input"]]
    assert prompts.published_text(record, prompts.TRAINING_STYLES[0]) == row["instruction"]


def test_the_fixed_prompt_is_not_the_training_prompt():
    """Off the training prompt: the tools in another system text, the same dialogue for the user."""
    row = toolrl_rows(1)[0]
    fixed = prompts.messages(record_of(row), prompts.FIXED_STYLE)
    assert "**Available Tools**" not in fixed[0]["content"]
    assert all(name in fixed[0]["content"] for name, _, _ in TOOLS)
    assert fixed[-1] == {"role": "user", "content": "Weather in Oslo in 0 days?"}
    eliciting = prompts.messages(record_of(row), prompts.ELICITING_STYLE)
    assert eliciting[-1]["content"] == row["input"]


def test_a_dialogue_of_several_turns_is_kept_whole():
    """Dropping history, or wrapping it as one more user turn, would ask another question."""
    row = toolrl_rows(1)[2]
    record = record_of(row)
    assert record.query == row["input"].removeprefix("**Dialogue Records History**\n")
    assert "<obs>" in record.query
    assert prompts.messages(record, prompts.ELICITING_STYLE)[-1]["content"].count("<user>") == 2


def test_the_gold_satisfies_every_rubric():
    """A layout that the reward does not know would make each score silently zero."""
    for row in toolrl_rows(12):
        record = record_of(row)
        assert scoring.toolrl_reward(record.gold, record.gold).format == 1
        assert scoring.strict(record.gold, record.gold).correct
        assert record.kind == ("call" if "<tool_call>" in row["output"] else "response")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "<tool_call>\n{'name': 1}\n</tool_call>"}, "not JSON"),
        ({"output": None}, "output is not a text"),
        ({"input": "**Dialogue Records History**\n"}, "no <user> turn"),
        ({"instruction": "No tools at all."}, "no tool is listed"),
        (
            {"instruction": system_text().replace("Parameters: {}", "Parameters: {")},
            "not a JSON object",
        ),
    ],
)
def test_an_unusable_row_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        record_of(toolrl_rows(1)[0] | change)


def test_rows_of_another_form_are_refused():
    with pytest.raises(
        ValueError, match="it must have instruction, input, output or tools, query, gold"
    ):
        record_of({"prompt": "x", "answer": "y"})


# ---------------------------------------------------------------------------------------------
# Splits


def test_splits_are_disjoint_and_hold_whole_dialogues(profile):
    """The steps of one dialogue in two splits would let a prompt's history into another split."""
    found = {split: corpora.records(profile, split) for split in corpora.splits(profile)}
    assert set(found) == set(corpora.SHARES)
    prompts.assert_disjoint(**found)
    rows = toolrl_rows(60)
    assert sum(map(len, found.values())) == len(rows)
    openings = [
        {re.search(r"<user> (.*?) </user>", r.user)[1] for r in some} for some in found.values()
    ]
    assert sum(map(len, openings)) == len(set().union(*openings)) == 60
    ids = [record.id for some in found.values() for record in some]
    assert len(set(ids)) == len(ids)


def test_neutral_texts_are_cut_and_disjoint(profile):
    found = {s: corpora.neutral(profile, s) for s in ("crosscoder", "ranking", "evaluation")}
    assert [len(texts) for texts in found.values()] == [40, 12, 20]
    texts = [text for some in found.values() for text in some]
    assert len(set(texts)) == len(texts)
    shortest, longest = corpora.NEUTRAL_CHARACTERS
    assert shortest <= min(map(len, texts)) <= max(map(len, texts)) <= longest
    page = fineweb_rows(8)[7]["text"]
    assert len(page) > longest
    cut = corpora._cut(page)
    assert page.startswith(cut + " ")


def test_a_source_is_read_once_and_again_when_it_changes(profile, monkeypatch):
    """Downloading at every notebook would be slow, and stale splits would be wrong."""
    first = corpora.records(profile, "evaluation")
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_rows", lambda *_, **__: pytest.fail("read again"))
        assert corpora.records(profile, "evaluation") == first
    write(Path(profile.records), toolrl_rows(90))
    assert len(corpora.records(profile, "evaluation")) > len(first)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_every_file_format_gives_the_same_records(profile, tmp_path, suffix):
    """ToolRL's own release is one JSON list; the hub stores parquet; users write JSON lines."""
    same = replace(profile, records=str(write(tmp_path / f"x{suffix}", toolrl_rows(60))))
    assert corpora.records(same, "ranking") == corpora.records(profile, "ranking")


def test_the_embedded_data_are_read_where_they_are():
    """The shipped pair must not go through any conversion."""
    toy = profiles.get("toy")
    assert corpora.splits(toy) == ["rl", "crosscoder", "ranking", "selection", "evaluation"]
    shipped = prompts.read_records(paths.DATA / "prompts" / "selection.jsonl")
    assert corpora.records(toy, "selection") == shipped
    assert corpora.neutral(toy, "ranking") == prompts.read_neutral(
        paths.DATA / "neutral" / "ranking.jsonl"
    )


def test_what_is_left_out_is_said(profile, tmp_path):
    rows = [*toolrl_rows(60), *toolrl_rows(1), toolrl_rows(1)[0] | {"instruction": "none"}]
    mended = replace(profile, records=str(write(tmp_path / "some.jsonl", rows)))
    with pytest.warns(UserWarning, match=r"3 x a repetition.*1 x no tool is listed"):
        corpora.records(mended, "ranking")


def test_what_a_row_lacks_is_said_with_the_first_such_row(profile, tmp_path):
    rows, short = toolrl_rows(60), {"tools": [], "query": "x"}
    mended = replace(profile, records=str(write(tmp_path / "x.jsonl", [*rows, short, short])))
    said = rf"2 x no gold in a row with .* \(first: row {len(rows) + 1}\)"
    with pytest.warns(UserWarning, match=said):
        corpora.records(mended, "ranking")


# ---------------------------------------------------------------------------------------------
# One's own rows


OWN = {
    "tools": [{"name": "fly", "description": "Fly.", "parameters": {"to": "string"}}],
    "query": "Take me to Rome.",
    "gold": call(to="Rome").replace("weather_now", "fly"),
}


def test_own_rows_take_the_styles_layout():
    record = record_of(OWN)
    assert (record.kind, record.tool, record.tools[0].parameters) == (
        "call",
        "fly",
        {"to": "string"},
    )
    for style in prompts.STYLES:
        assert prompts.messages(record, style) == prompts.STYLES[style].messages(
            record.tools, record.query
        )
    seen = record_of(OWN | {"system": "S", "user": "U"})
    assert [m["content"] for m in prompts.messages(seen, prompts.TRAINING_STYLES[0])] == ["S", "U"]
    assert prompts.messages(seen, prompts.FIXED_STYLE)[-1]["content"] == "Take me to Rome."


def test_records_with_own_texts_survive_the_disk(tmp_path):
    found = [record_of(OWN), record_of(OWN | {"system": "S", "user": "U"})]
    prompts.write_records(tmp_path / "x.jsonl", found)
    assert prompts.read_records(tmp_path / "x.jsonl") == found


# ---------------------------------------------------------------------------------------------
# What is missing


def test_no_network_names_the_download_by_hand(profile, tmp_path, monkeypatch):
    """Offline and with an empty cache: both errors must give a command and a folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "empty"))
    hub = profiles.get("qwen")
    with pytest.raises(CorpusError) as caught:
        corpora.records(hub, "ranking")
    assert "hf download emrecanacikgoz/ToolRL --repo-type dataset --local-dir" in str(caught.value)
    assert str(tmp_path / "downloads" / "ToolRL") in str(caught.value)
    with pytest.raises(CorpusError, match=r"sample/10BT/000_00000\.parquet"):
        corpora.neutral(hub, "ranking")


def test_a_data_set_downloaded_by_hand_is_found(profile, tmp_path):
    """What the error message says must work: no setting, no network."""
    rows = toolrl_rows(60)
    write(tmp_path / "downloads" / "ToolRL" / "data" / "train.parquet", rows)
    write(tmp_path / "downloads" / "ToolRL" / ".cache" / "other.parquet", [{"x": 1}])
    (tmp_path / "downloads" / "ToolRL" / "dataset_infos.json").write_text("{}")
    by_hand = replace(profile, records="emrecanacikgoz/ToolRL", name="by_hand")
    assert corpora.records(by_hand, "ranking") == corpora.records(profile, "ranking")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 cut short", "cannot be read"),
        (b'{"instruction": "a"}\n{"instr', "line 2: not JSON"),
        (b"", "not every split has a text"),
    ],
)
def test_a_damaged_file_is_named(profile, tmp_path, content, message):
    path = tmp_path / ("damaged.parquet" if content[:4] == b"PAR1" else "damaged.jsonl")
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"damaged.*{message}"):
        corpora.records(replace(profile, records=str(path)), "ranking")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./a/b", "empty"])
def test_a_missing_source_is_named(profile, tmp_path, source):
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / source) if source == "empty" else source
    with pytest.raises(CorpusError, match=r"no such file or folder|file in this folder"):
        corpora.records(replace(profile, records=source), "ranking")


def test_too_little_neutral_text_is_an_error_only_when_a_split_is_empty(profile, tmp_path):
    few = replace(profile, neutral=str(write(tmp_path / "few.parquet", fineweb_rows(60))))
    with pytest.warns(UserWarning, match="fewer texts than wanted"):
        assert 0 < len(corpora.neutral(few, "crosscoder")) < 40
    none = replace(profile, neutral=str(write(tmp_path / "none.jsonl", [{"text": "short"}])))
    with pytest.raises(CorpusError, match="not every split has a text"):
        corpora.neutral(none, "crosscoder")
    wrong = replace(profile, neutral=str(write(tmp_path / "wrong.jsonl", [{"content": "x"}])))
    with pytest.raises(CorpusError, match="no column 'text'"):
        corpora.neutral(wrong, "crosscoder")
