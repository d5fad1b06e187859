"""What TEACHING.md names is there: notebooks, sections, figures, cells and exercises."""

import itertools
import re

import pytest

from dfc_lib import paths
from dfc_lib.results.figures import read_manifest
from tools import slides
from tools.freshness import load_notebooks

TEXT = (paths.ROOT / "TEACHING.md").read_text(encoding="utf-8")
NOTEBOOKS = {name[:2]: notebook for name, notebook in load_notebooks(paths.ROOT).items()}
QUOTED = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", TEXT))
DIFFICULTY = r"(?m)^\*\*(\d)\.\*\* \((easy|medium|hard), \d+ min\)"


def exercises(number: str) -> dict[str, str]:
    """Difficulty of a notebook's exercises by their number."""
    cells = NOTEBOOKS[number].content["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return dict(re.findall(DIFFICULTY, prose))


def test_every_section_that_is_named_is_there():
    """A heading that was reworded leaves a teacher searching."""
    named = re.findall(r"`(\d\d) § (\d+) · ([^`]+)`", TEXT)
    assert len(named) == TEXT.count(" § ") > 30
    for number, section, heading in named:
        there = slides.sections(NOTEBOOKS[number])
        assert int(section) in there, (number, section)
        assert there[int(section)].heading.replace("`", "") == f"{section} · {heading}"


def test_every_figure_that_is_named_is_there():
    known = {row["id"] for row in read_manifest(paths.FIGURES)}
    named = {text for text in QUOTED if re.fullmatch(r"\d\d_\w+", text)}
    assert len(named) > 25
    assert named <= known


def test_every_exercise_that_is_named_is_there():
    named = re.findall(r"\*(\d\d), exercise (\d)\*", TEXT)
    assert len(named) == TEXT.count(", exercise ") > 30
    for number, exercise in named:
        assert exercise in exercises(number), (number, exercise)


def test_exercises_stand_in_the_row_of_their_difficulty():
    _, table = TEXT.split("## Exercises by difficulty")
    rows = re.findall(r"(?m)^\| (easy|medium|hard),(.*)$", table)
    assert [difficulty for difficulty, _ in rows] == ["easy", "medium", "hard"]
    for difficulty, row in rows:
        for number, exercise in re.findall(r"\*(\d\d), exercise (\d)\*", row):
            assert exercises(number)[exercise] == difficulty, (number, exercise)
    for number, exercise, said in re.findall(
        r"\*(\d\d), exercise (\d)\* \((easy|medium|hard)\)", TEXT
    ):
        assert exercises(number)[exercise] == said


def test_every_cell_to_run_live_is_there():
    """Cells are named by a piece of their code, in the column of a plan or after "Run live"."""
    _, plan = TEXT.split("| minutes | what | run live | show |")
    rows = [line.split(" | ") for line in plan.split("\n\n")[0].splitlines()[2:]]
    found = [
        (number, code)
        for row in rows
        for number in [re.search(r"`(\d\d) §", row[1])[1]]
        for code in re.findall(r"`([^`]+)`", row[2])
    ]
    told = re.findall(r"Run live: in `(\d\d) §[^`]+` the cell with\s+`([^`]+)`", TEXT)
    assert len(told) == TEXT.count("Run live:")
    assert len(found + told) > 5
    for number, code in found + told:
        assert any(code in cell for cell in NOTEBOOKS[number].code), (number, code)


def test_the_decks_that_are_named_are_made():
    decks = re.findall(r"(?m)^\[(\w+)\]$", slides.SELECTION.read_text(encoding="utf-8"))
    assert decks
    assert all(f"`{name}`" in TEXT for name in decks)


@pytest.mark.parametrize("command", re.findall(r"`make (\w+)`", TEXT))
def test_commands_are_targets(command):
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^{command}:", makefile)


def test_the_minutes_of_the_lesson_add_up():
    spans = re.findall(r"(?m)^\| (\d+)-(\d+) \|", TEXT)
    assert spans[0][0] == "0"
    assert spans[-1][1] == "90"
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
