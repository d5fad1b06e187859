"""The committed notebooks: executed, small, laid out alike, and their links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from dfc_lib import paths, profiles
from dfc_lib.results import figures
from tools.freshness import load_notebooks

NAMES = sorted(load_notebooks(paths.ROOT))
LIMIT = 1_000_000  # bytes


@pytest.fixture(params=NAMES)
def notebook(request) -> dict:
    path = paths.NOTEBOOKS / f"{request.param}.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"])
    return content | {"name": request.param, "bytes": path.stat().st_size}


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook: dict) -> str:
    return "\n\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")


def test_it_is_executed_and_small(notebook):
    assert notebook["bytes"] < LIMIT
    for cell in code(notebook):
        assert cell["execution_count"], cell["source"]
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]


def test_it_opens_as_the_others_do(notebook):
    opening = notebook["cells"][0]["source"]
    label = figures.label(notebook["name"]).capitalize()
    assert opening.startswith(f"# {label} · ")
    for row in ("Before", "Needs", "Writes", "Takes"):
        assert f"| {row} |" in opening
    parameters = [c for c in code(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert [c["source"].splitlines()[0].split("=")[0].strip() for c in parameters] == ["PROFILE"]


def test_it_is_stale_once_a_pair_that_it_opens_changes(notebook):
    """`make status` knows the pairs by what a notebook declares, not by what its code opens."""
    if any(re.search(r"\.(pairs|replicates)\(", cell["source"]) for cell in code(notebook)):
        declared = {Path(item).parts[:3] for item in notebook["metadata"]["dfc"]["inputs"]}
        assert declared >= {("data", "pairs", name) for name in "012"}


def test_it_says_which_figures_it_writes(notebook):
    """The opening table and the manifest agree."""
    line = next(x for x in prose(notebook).splitlines() if x.startswith("| Writes |"))
    label = figures.label(notebook["name"])
    said = set(re.findall(rf"`(?:figures/)?({label}_\w+)`", line))
    manifest = figures.read_manifest(figures.folder(profiles.get("toy")))
    assert said == {row["id"] for row in manifest if row["notebook"] == notebook["name"]}


def test_every_exercise_has_a_folded_solution_that_asserts(notebook):
    exercises = re.findall(r"^\*\*(\d)\.\*\* \(", prose(notebook), flags=re.MULTILINE)
    solutions = [c for c in code(notebook) if c["source"].startswith("# Solution")]
    assert exercises == [c["source"].split()[2] for c in solutions] != []
    for cell in solutions:
        assert "assert" in cell["source"]
        assert "hide-cell" in cell["metadata"]["tags"]
        assert cell["metadata"]["jupyter"] == {"source_hidden": True, "outputs_hidden": True}


def test_every_solution_passes_its_own_check(notebook):
    """A check that refuses the solution sends a reader astray."""
    for cell in code(notebook):
        if cell["source"].startswith("# Solution") and "\ncheck." in cell["source"]:
            said = "".join("".join(o.get("text", "")) for o in cell["outputs"])
            assert "Right." in said.splitlines(), cell["source"]


def test_its_links_lead_somewhere(notebook):
    shown = [
        o.get("data", {}).get("text/markdown", "") for c in code(notebook) for o in c["outputs"]
    ]
    text = prose(notebook) + "".join(map("".join, shown))
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [t for t in targets if "://" not in t and not (paths.NOTEBOOKS / t).exists()]
    assert missing == []


def test_the_readme_lists_all_and_its_links_lead_somewhere():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\d\d_\w+|quickstart)`", readme, flags=re.MULTILINE)
    assert listed == ["quickstart", *(name for name in NAMES if name != "quickstart")]
    targets = re.findall(r"\]\(([^)#\s]+)", readme)
    assert [t for t in targets if "://" not in t and not (paths.ROOT / t).exists()] == []
