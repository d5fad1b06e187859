"""The runner: what is stale, what a run leaves behind, and what it refuses.

Tiny compendia are made in temporary folders: three notebooks and a library of three modules beside
copies of the real leftmost ones, so that kernels see nothing of this checkout.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from dfc_lib import paths, profiles, provenance
from tools import freshness, runner
from tools.freshness import CompendiumError

SMOKE, TOY = profiles.PROFILES["smoke"], profiles.PROFILES["toy"]

FIRST = [
    '# The profile; DFC_PROFILE overrides.\nPROFILE = "toy"\nSCALE = 1.5  # a factor\nWORD = "a"',
    "from dfc_lib import alpha\nimport pandas as pd\n"
    "from dfc_lib import profiles\nfrom dfc_lib.results import figures\n"
    "profile = profiles.load(PROFILE)",
    'import sys\nprint("50%|#####     | 1/2 [00:01<00:01]", file=sys.stderr)\n'
    "value = SCALE * alpha.double(2)\nvalue",
    'data = pd.DataFrame({"v": [value]})\n'
    'figures.save_table("00_values", data, "One value.", profile=profile)',
]
SECOND = [
    'PROFILE = "toy"',
    "def lazy():\n    from dfc_lib.beta import triple\n    return triple(1)",
    "from dfc_lib import profiles\nfrom dfc_lib.results import figures\n"
    'figures.load_data("00_values", profiles.load(PROFILE)).v.tolist(), lazy()',
]


def cell(source: str, number: int, tags=()) -> dict:
    about = {"cell_type": "code", "id": f"cell-{number}", "source": source}
    return {**about, "metadata": {"tags": list(tags)}, "outputs": [], "execution_count": None}


def write_notebook(root: Path, name: str, sources: list[str], **declared) -> Path:
    cells = [cell(text, i, ["parameters"] if i == 0 else []) for i, text in enumerate(sources)]
    prose = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {name}"}
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"dfc": declared, "kernelspec": spec},
        "cells": [prose, *cells],
    }
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def make_compendium(root: Path) -> Path:
    library, original = root / "dfc_lib", Path(paths.__file__).parent
    (library / "results").mkdir(parents=True)
    for file in ("__init__.py", "paths.py", "profiles.py", "profiles.toml", "provenance.py"):
        shutil.copy(original / file, library)
    for file in ("store.py", "results/__init__.py", "results/figures.py", "results/dfc.mplstyle"):
        shutil.copy(original / file, library / file)
    (library / "alpha.py").write_text('"""Doubles."""\n\n\ndef double(x):\n    return 2 * x\n')
    (library / "beta.py").write_text("from . import gamma\n\n\ndef triple(x):\n    return 3 * x\n")
    (library / "gamma.py").write_text('TABLE = "gamma.toml"\n')
    (library / "gamma.toml").write_text("x = 1\n")
    (root / "data").mkdir()
    (root / "data" / "input.txt").write_text("one")
    (root / "requirements.lock").write_text("# pins\nnumpy==1\n")
    shutil.copy(paths.ROOT / "conftest.py", root)
    write_notebook(root, "00_first", FIRST, inputs=["data/input.txt"])
    write_notebook(root, "01_second", SECOND, needs=["00_first"])
    write_notebook(root, "02_alone", ["1 + 1"])
    return root


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DFC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A compendium in which nothing has run."""
    return make_compendium(tmp_path / "fresh")


@pytest.fixture(scope="module")
def all_ran(tmp_path_factory) -> tuple[Path, str]:
    root = make_compendium(tmp_path_factory.mktemp("ran") / "a folder with spaces")
    return root, subprocess.run(
        [sys.executable, "-m", "tools.runner", "run", "--root", str(root)],
        cwd=paths.ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("DFC_")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def ran(all_ran, tmp_path) -> Path:
    """A compendium whose notebooks have all run at toy; a copy that a test may change."""
    return shutil.copytree(all_ran[0], tmp_path / "compendium")


@pytest.fixture
def command(capfd):
    """The runner's command line in this process; returns what it printed."""

    def call(root: Path, *arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        code = runner.main([*arguments, "--root", str(root)])
        out, err = capfd.readouterr()
        assert code == status, out + err
        return out + err

    return call


def stale(root: Path, profile=TOY) -> dict[str, str]:
    project = runner.Project(root, profile)
    reasons = {name: project.why_stale(name) for name in project.notebooks}
    return {name: why for name, why in reasons.items() if why}


def outputs(path: Path) -> list:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [c["outputs"] for c in content["cells"] if c["cell_type"] == "code"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# A run that succeeds


def test_the_published_profile_executes_in_place(ran, fresh):
    """The committed notebook must be its source plus outputs, with nothing of the run in it."""
    path, source = ran / "notebooks/00_first.ipynb", fresh / "notebooks/00_first.ipynb"
    after, before = (json.loads(p.read_text(encoding="utf-8")) for p in (path, source))
    assert [(c["id"], "".join(c["source"])) for c in after["cells"]] == [
        (c["id"], c["source"]) for c in before["cells"]
    ]
    assert after["metadata"] == before["metadata"]
    assert [c["metadata"] for c in after["cells"]] == [c["metadata"] for c in before["cells"]]
    code = [c for c in after["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == [1, 2, 3, 4]
    assert outputs(path)[2][0]["data"]["text/plain"] == ["6.0"]
    assert not (ran / "build/toy/staging/00_first").exists()
    assert "papermill" not in path.read_text()


def test_progress_bars_are_not_committed(ran):
    """Their timings would make every rerun a diff."""
    kinds = [o["output_type"] for cell in outputs(ran / "notebooks/00_first.ipynb") for o in cell]
    assert kinds == ["execute_result"]


def test_a_later_notebook_reads_what_an_earlier_one_saved(ran):
    """The CSVs are the interface between notebooks."""
    result = outputs(ran / "notebooks/01_second.ipynb")[2][0]
    assert result["data"]["text/plain"] == ["([6], 3)"]


def test_figures_are_published_with_the_key_of_their_notebook(ran):
    """The manifest must say by which code a figure was made."""
    (row,) = json.loads((ran / "figures" / "manifest.json").read_text())
    assert row["notebook"] == "00_first"
    assert row["code_hash"] == runner.Project(ran, TOY).key("00_first")


def test_the_run_reports_notebook_seconds_and_figures(all_ran):
    """Who waits wants to know what ran, for how long and what came of it."""
    assert "[1/3] 00_first (never run here)" in all_ran[1]
    assert re.search(r"\d+ s, figures: 00_values", all_ran[1])
    assert "3 run, 0 already fresh" in all_ran[1]


def test_nothing_to_do_is_found_quickly_and_without_heavy_imports(ran):
    """A rerun with nothing changed must cost seconds, or nobody uses make."""
    code = (
        "import sys; from tools import runner; status = runner.main(sys.argv[1:]);"
        "heavy = {'torch', 'papermill', 'nbformat', 'pandas', 'numpy'} & set(sys.modules);"
        "sys.exit(status or bool(heavy))"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--root", str(ran)],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
    )
    after = os.times()
    # Processor time, so that other work on the machine does not count.
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 3
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 run, 3 already fresh" in done.stdout


def test_other_profiles_leave_the_committed_files_alone(ran, command):
    """`make smoke` must not put throwaway numbers where published ones are."""
    committed = [*sorted((ran / "notebooks").iterdir()), *sorted((ran / "figures").iterdir())]
    before = {path: path.read_bytes() for path in committed}
    out = command(ran, "run", "--profile", "smoke", "--notebook", "01")
    assert "2 run, 0 already fresh" in out
    assert {path: path.read_bytes() for path in committed} == before
    assert outputs(ran / "build/smoke/notebooks/00_first.ipynb")[2]
    (row,) = json.loads((ran / "build/smoke/figures/manifest.json").read_text())
    assert row["profile"] == "smoke"
    assert stale(ran, SMOKE) == {"02_alone": "never run here"}
    assert stale(ran) == {}


# What makes a notebook stale


def test_edits_that_change_no_result_keep_everything_fresh(ran):
    """Prose, comments and docstrings must not cost a rerun of everything."""
    edit(ran / "dfc_lib/alpha.py", '"""Doubles."""', '"""Doubles its argument."""\n# why\n')
    edit(ran / "notebooks/00_first.ipynb", "# a factor", "# a better comment")
    edit(ran / "notebooks/00_first.ipynb", "# 00_first", "# A title")
    edit(ran / "requirements.lock", "# pins", "# exact pins")
    os.utime(ran / "data/input.txt", (0, 0))
    assert stale(ran) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("notebooks/00_first.ipynb", "SCALE = 1.5", "SCALE = 2.5", {"00_first", "01_second"}),
        ("notebooks/01_second.ipynb", 'lazy()"', 'lazy(), 1"', {"01_second"}),
        ("dfc_lib/alpha.py", "2 * x", "x + x", {"00_first", "01_second"}),
        ("dfc_lib/beta.py", "3 * x", "x * 3", {"01_second"}),  # imported inside a function
        ("dfc_lib/gamma.py", "TABLE", "NAME", {"01_second"}),  # imported by an import, relatively
        ("dfc_lib/gamma.toml", "x = 1", "x = 2", {"01_second"}),  # named by an imported module
        ("dfc_lib/results/figures.py", "%.6g", "%.5g", {"00_first", "01_second"}),
        ("dfc_lib/results/dfc.mplstyle", "dpi: 150", "dpi: 90", {"00_first", "01_second"}),
        ("data/input.txt", "one", "two", {"00_first", "01_second"}),
        ("requirements.lock", "numpy==1", "numpy==2", {"00_first", "01_second", "02_alone"}),
        ("figures/00_values.csv", "6", "7", {"00_first"}),
        ("notebooks/02_alone.ipynb", '"2"', '"3"', {"02_alone"}),  # a stored output
    ],
)
def test_a_change_makes_stale_what_depends_on_it_and_nothing_else(ran, file, old, new, expected):
    """Too little staleness publishes old numbers, too much costs hours."""
    edit(ran / file, old, new)
    assert set(stale(ran)) == expected


def test_a_profile_counts_by_its_values(ran):
    """A profile more must cost nothing; a setting that differs must cost a run."""
    shutil.copytree(paths.ROOT / "tools", ran / "tools")
    library = ran / "dfc_lib/profiles.toml"

    def states() -> list[tuple[str, str]]:
        line = [sys.executable, "-m", "tools.runner", "status"]
        shown = subprocess.run(line, cwd=ran, capture_output=True, text=True, check=True).stdout
        row = r"^\d\d_\w+ +(fresh|stale) +\d+(?:  changed: (profile))?"
        return re.findall(row, shown, flags=re.M)

    with library.open("a") as stream:
        stream.write('\n[mine]\nlike = "toy"\nsteps = 7\n')
    assert states() == [("fresh", "")] * 3
    edit(library, "steps = 1_000", "steps = 1_001")
    assert states() == [("stale", "profile")] * 3


def test_another_arithmetic_makes_everything_stale(ran, monkeypatch):
    monkeypatch.setenv("DFC_ARITHMETIC", "native")
    assert stale(ran)["02_alone"] == "changed: arithmetic"


@pytest.mark.parametrize("file", ["figures/00_values.csv", "build/toy/state/00_first.json"])
def test_a_deleted_result_makes_its_notebook_stale(ran, file):
    """`make figures` must bring back what somebody deleted."""
    (ran / file).unlink()
    assert set(stale(ran)) == {"00_first"}


def test_a_missing_declared_output_makes_its_notebook_stale(ran):
    """A deleted cache must be remade before the notebooks that read it run."""
    path = ran / "notebooks/02_alone.ipynb"
    edit(path, '"dfc": {}', '"dfc": {"outputs": ["cache"]}')
    assert stale(ran) == {"02_alone": "missing: cache in the build folder"}
    (ran / "build/toy/cache").mkdir()
    assert stale(ran) == {}


def test_status_tells_fresh_from_stale_and_why(ran):
    """Before a long run one wants to know what it would do."""
    edit(ran / "dfc_lib/beta.py", "3 * x", "x * 3")
    shown = runner.status(runner.Project(ran, TOY))
    assert re.search(r"00_first +fresh +\d+$", shown, flags=re.M)
    assert re.search(r"01_second +stale +\d+  changed: dfc_lib.beta$", shown, flags=re.M)
    assert re.search(r"00_values +20\d\d-\d\d-\d\d \d\d:\d\d  00_first \(fresh\)", shown)


def test_status_in_a_clone_recognises_committed_figures(ran):
    """Without state of its own, a clone can still tell whether figures belong to its code."""
    shutil.rmtree(ran / "build")
    shown = runner.status(runner.Project(ran, TOY))
    assert "never run here; the committed figures come from this very code" in shown
    manifest = ran / "figures/manifest.json"
    edit(manifest, f'"{runner.Project(ran, TOY).key("00_first")}"', "null")  # saved outside a run
    assert "this very code" not in runner.status(runner.Project(ran, TOY))


# A download that is out of reach


@pytest.fixture
def download(ran, monkeypatch) -> list:
    """02_alone saves a figure of what it downloads, 01_second reads it; it fetches by this list."""
    answers = []

    class Module(types.ModuleType):
        @staticmethod
        def fetch():
            if answer := answers.pop():
                raise answer

    monkeypatch.setitem(sys.modules, "stand_in", Module("stand_in"))
    source = (
        "import pandas as pd\nfrom dfc_lib import profiles\nfrom dfc_lib.results import figures\n"
        'data = pd.DataFrame({"v": [1]})\n'
        'figures.save_table("02_counts", data, "Counts.", profile=profiles.load("toy"))'
    )
    write_notebook(ran, "02_alone", [source], fetch="stand_in")
    reader = SECOND[2].replace("00_values", "02_counts")
    write_notebook(ran, "01_second", [*SECOND[:2], reader], needs=["00_first", "02_alone"])
    return answers


def test_what_cannot_be_downloaded_keeps_its_committed_results(ran, download, command):
    """Without a network everything else must still be made, from the figures that are committed."""
    unreachable = ConnectionError("no network today")
    download[:] = [None]
    assert "2 run, 1 already fresh" in command(ran, "run")
    edit(ran / "notebooks/02_alone.ipynb", "[1]})", "[2]})")
    edit(ran / "notebooks/01_second.ipynb", "triple(1)", "triple(2)")
    before = (ran / "notebooks/02_alone.ipynb").read_bytes()
    download[:] = [unreachable]
    out = command(ran, "run")
    assert "    02_alone keeps its committed results: no network today\n" in out
    assert "1 run, 1 kept, 1 already fresh" in out
    assert (ran / "notebooks/02_alone.ipynb").read_bytes() == before
    for arguments in (["run", "--profile", "smoke"], ["check", "--profile", "smoke"]):
        download[:] = [unreachable]
        assert "02_alone keeps its committed results" in command(ran, *arguments)
    result = outputs(ran / "build/smoke/notebooks/01_second.ipynb")[2][0]
    assert result["data"]["text/plain"] == ["([1], 6)"]
    assert "02_counts" in (ran / "build/smoke/check/figures/manifest.json").read_text()
    download[:] = [None]
    assert "2 run, 1 already fresh" in command(ran, "run")


def test_a_download_that_is_not_whole_is_an_error(ran, download, command):
    """Nor may a notebook be kept of which nothing is committed: others would read nothing."""
    download[:] = [ValueError("x is cut short")]
    assert "02_alone reads what is not whole: x is cut short" in command(ran, "run", status=1)
    download[:] = [ConnectionError("no network today")]
    assert "has nothing of it" in command(ran, "run", status=1)


# A run that fails


def test_a_failing_cell_is_shown_and_replaces_nothing(ran, command):
    """A failed notebook must never stand where a good one was, nor its figures."""
    path = ran / "notebooks/00_first.ipynb"
    edit(path, "value = SCALE * alpha.double(2)", "value = SCALE * alpha.triple(2)")
    before = {p: p.read_bytes() for p in [path, *(ran / "figures").iterdir()]}
    error = command(ran, "run", status=1)
    assert "00_first failed in cell [3]" in error
    assert "value = SCALE * alpha.triple(2)" in error
    assert "AttributeError" in error
    unfinished = ran / "build/toy/staging/00_first/00_first.ipynb"
    assert str(unfinished) in error
    assert "AttributeError" in unfinished.read_text()
    assert {p: p.read_bytes() for p in before} == before
    assert set(stale(ran)) == {"00_first", "01_second"}


def test_a_dying_kernel_is_named_with_its_cell(ran, command):
    """Out of memory kills the kernel without a traceback; the cell must still be found."""
    edit(ran / "notebooks/02_alone.ipynb", "1 + 1", "import os; os._exit(9)")
    error = command(ran, "run", "--notebook", "02", status=1)
    assert "02_alone: the kernel died (out of memory?)" in error
    assert "os._exit(9)" in error


def test_an_output_with_a_path_of_this_machine_is_not_committed(ran, command):
    """Readers have no use for somebody's home folder, and it is nobody's business."""
    path = ran / "notebooks/02_alone.ipynb"
    edit(path, "1 + 1", "import os; print('in', os.getcwd())")
    before = path.read_bytes()
    error = command(ran, "run", "--notebook", "02", status=1)
    assert f"in {ran}/notebooks" in error
    assert path.read_bytes() == before


def test_a_figure_no_longer_written_is_removed(ran, command):
    """A renamed figure would otherwise stay behind under its old name for ever."""
    edit(ran / "notebooks/00_first.ipynb", "00_values", "00_numbers")
    edit(ran / "notebooks/01_second.ipynb", "00_values", "00_numbers")
    assert "removed 00_values.csv" in command(ran, "run")
    assert sorted(p.name for p in (ran / "figures").iterdir()) == [
        "00_numbers.csv",
        "manifest.json",
    ]


def test_terminating_a_run_keeps_the_good_notebook_and_stops_the_kernel(ran, command):
    """A killed run must leave neither a broken notebook nor a kernel that goes on computing."""
    path, note = ran / "notebooks/02_alone.ipynb", ran / "kernel.pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    edit(path, '"1 + 1"', json.dumps(code))
    before = path.read_bytes()
    line = [sys.executable, "-m", "tools.runner", "run", "--notebook", "02", "--root", str(ran)]
    process = subprocess.Popen(line, cwd=paths.ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300  # a busy machine starts kernels slowly
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    busy = command(ran, "run", "--notebook", "02", status=1)
    assert f"is being run already (process {process.pid} since" in busy
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped; finished notebooks are kept" in error
    assert path.read_bytes() == before
    kernel = int(note.read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel is still running")


def meet(mine: str, other: str) -> str:
    """A cell that ends only if the other notebook's cell runs at the same time."""
    return (
        f"import time; from pathlib import Path; Path({mine!r}).touch()\n"
        f"deadline = time.monotonic() + 120\n"
        f"while not Path({other!r}).exists():\n"
        f"    assert time.monotonic() < deadline\n    time.sleep(0.1)"
    )


def test_notebooks_that_do_not_need_each_other_run_side_by_side(fresh, command):
    """Two cores must not wait for one notebook; and what is needed must still come first."""
    write_notebook(fresh, "00_first", [meet("../first", "../alone")])
    write_notebook(fresh, "02_alone", [meet("../alone", "../first")])
    write_notebook(fresh, "01_second", ["assert not open('../first').read()"], needs=["00_first"])
    shown = command(fresh, "run", "--jobs", "2")
    assert shown.index("00_first: ") < shown.index("01_second (")
    assert "3 run, 0 already fresh" in shown


@pytest.mark.parametrize(("cores", "each"), [(8, 4), (1, 1)])
def test_notebooks_side_by_side_share_the_cores(fresh, command, monkeypatch, cores, each):
    """Two that each start a training per core would hold each other up."""
    monkeypatch.setenv("DFC_CORES", str(cores))
    for name in ("00_first", "02_alone"):
        code = f"from dfc_lib import paths; assert paths.cores() == {each}, paths.cores()"
        write_notebook(fresh, name, [code])
    command(fresh, "run", "--jobs", "2", "--notebook", "00", "02")
    alone = f"from dfc_lib import paths; assert paths.cores() == {cores}"
    write_notebook(fresh, "01_second", [alone], needs=["00_first"])  # which is fresh by then
    command(fresh, "run", "--jobs", "2", "--notebook", "01")


@pytest.mark.skipif(None in provenance.arithmetic().values(), reason="not x86-64, or native")
def test_kernels_have_the_one_arithmetic_and_the_profiles_threads(fresh, command):
    """Another order of sums is other last bits, which a greedy token near a tie shows."""
    names = [*provenance.ARITHMETIC, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED"]
    code = f"import os; [os.environ[name] for name in {names}]"
    path = write_notebook(fresh, "02_alone", [code])
    command(fresh, "run", "--notebook", "02")
    ((output,),) = outputs(path)
    expected = [*provenance.ARITHMETIC.values(), "1", "1", "0"]
    assert "".join(output["data"]["text/plain"]) == repr(expected)


@pytest.mark.parametrize("value", ["0", "two"])
def test_an_unusable_number_of_cores_is_named(monkeypatch, value):
    monkeypatch.setenv("DFC_CORES", value)
    with pytest.raises(ValueError, match=f"DFC_CORES={value!r}"):
        paths.cores()


def test_what_was_printed_in_a_row_is_one_output(fresh, command):
    """Where the kernel cuts a stream depends on the clock, and a committed notebook must not."""
    cell = "import sys\nfor i in range(3):\n    print(i)\n    sys.stdout.flush()\n'end'"
    path = write_notebook(fresh, "00_first", [cell])
    command(fresh, "run", "--notebook", "00")
    stream, value = json.loads(path.read_text())["cells"][1]["outputs"]
    assert "".join(stream["text"]) == "0\n1\n2\n"
    assert value["output_type"] == "execute_result"


def test_a_failure_does_not_waste_what_runs_beside_it(fresh, command):
    """A notebook of ten minutes is not thrown away because another has failed."""
    fails = meet("../first", "../alone") + "\n1 / 0"
    goes_on = meet("../alone", "../first") + "\nimport time; time.sleep(3)"
    write_notebook(fresh, "00_first", [fails])
    write_notebook(fresh, "02_alone", [goes_on])
    shown = command(fresh, "run", "--jobs", "2", status=1)
    assert "00_first FAILED; still running: 02_alone" in shown
    assert "ZeroDivisionError" in shown
    assert "01_second (" not in shown
    assert (fresh / "build/toy/state/02_alone.json").exists()


def test_a_notebook_that_cannot_begin_does_not_stop_those_that_run(fresh, command):
    """01 lacks an input once 00 has run; 02 is in its cell by then."""
    write_notebook(fresh, "00_first", [meet("../first", "../alone")])
    goes_on = meet("../alone", "../first") + "\nimport time; time.sleep(3)"
    write_notebook(fresh, "02_alone", [goes_on])
    write_notebook(fresh, "01_second", ["1"], needs=["00_first"], inputs=["data/gone.csv"])
    shown = command(fresh, "run", "--jobs", "2", status=1)
    assert "data/gone.csv" in shown
    assert (fresh / "build/toy/state/02_alone.json").exists()


def test_what_the_longest_work_waits_for_begins_first(fresh):
    """Of two that could begin, the one at the head of the longer chain."""
    begun, minutes = [], {"00_first": 1, "01_second": 5, "02_alone": 4, "03_last": 0}
    for name, needs in (("00_first", []), ("01_second", ["00_first"]), ("02_alone", [])):
        write_notebook(fresh, name, ["1"], needs=needs, minutes=minutes[name])
    write_notebook(fresh, "03_last", ["1"], needs=["01_second", "02_alone"])
    notebooks = freshness.load_notebooks(fresh)
    runner._in_order(notebooks, list(notebooks), begun.append, print, print, jobs=1)
    assert begun == ["00_first", "01_second", "02_alone", "03_last"]
    minutes["02_alone"] = 7
    write_notebook(fresh, "02_alone", ["1"], minutes=7)
    begun.clear()
    notebooks = freshness.load_notebooks(fresh)
    runner._in_order(notebooks, list(notebooks), begun.append, print, print, jobs=1)
    assert begun == ["02_alone", "00_first", "01_second", "03_last"]


def test_the_lock_of_a_killed_run_is_taken_over(fresh, capsys):
    """A power cut must not require deleting a file by hand."""
    code = (
        "import sys, time; from pathlib import Path; from dfc_lib import profiles;"
        "from tools import runner;"
        "project = runner.Project(Path(sys.argv[1]), profiles.PROFILES['toy']);"
        "lock = runner._alone(project); lock.__enter__(); print('locked', flush=True);"
        "time.sleep(60)"
    )
    line = [sys.executable, "-c", code, str(fresh)]
    with subprocess.Popen(line, cwd=paths.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(CompendiumError, match=f"process {holder.pid} since"):
            runner.run(runner.Project(fresh, TOY))
        holder.kill()
    with runner._alone(runner.Project(fresh, TOY)):
        assert f"an earlier run (process {holder.pid} since" in capsys.readouterr().out


# Reading the compendium


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--notebook", "07"], "no single notebook is called '07'"),
        (["--profile", "big"], "unknown profile 'big'"),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(fresh, capsys, arguments, message):
    """A misspelt name must not pass for nothing to do."""
    assert runner.main(["run", *arguments, "--root", str(fresh)]) == 1
    assert message in capsys.readouterr().err
    assert not (fresh / "build/toy/staging").exists()


def test_notebooks_run_after_what_they_need_else_by_number(tmp_path):
    """An order by number alone would run a notebook before its inputs exist."""
    for name, needs in {"00_a": ["03_d"], "01_b": [], "02_c": ["00_a"], "03_d": []}.items():
        write_notebook(tmp_path, name, ["1"], needs=needs)
    notebooks = freshness.load_notebooks(tmp_path)
    assert list(notebooks) == ["01_b", "03_d", "00_a", "02_c"]
    assert freshness.with_needs(notebooks, ["00_a"]) == ["03_d", "00_a"]
    wanted = ["2", "notebooks/03_d.ipynb", "01_b"]
    assert freshness.select(notebooks, wanted) == ["02_c", "03_d", "01_b"]


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"00_a": ["01_b"], "01_b": ["00_a"]}, "circle: "),
        ({"00_a": ["09_z"]}, "names '09_z'"),
        ({"00_a": "01_b"}, "must be a list of strings"),
    ],
)
def test_impossible_needs_are_refused(tmp_path, needs, message):
    """A misspelt need would silently be no dependency."""
    for name, value in needs.items():
        write_notebook(tmp_path, name, ["1"], needs=value)
    with pytest.raises(CompendiumError, match=message):
        freshness.load_notebooks(tmp_path)


def test_a_broken_notebook_is_named(tmp_path):
    """A merge conflict in a notebook must be told from a missing notebook."""
    write_notebook(tmp_path, "00_a", ["1"]).write_text("<<<<<<< ours")
    with pytest.raises(CompendiumError, match=r"00_a\.ipynb is no notebook"):
        freshness.load_notebooks(tmp_path)


def test_cells_without_an_id_are_refused(tmp_path):
    """They would get a random one at every run, and so a diff."""
    edit(write_notebook(tmp_path, "00_a", ["1"]), '"id": "cell-0",', "")
    with pytest.raises(CompendiumError, match="a cell has no id"):
        freshness.load_notebooks(tmp_path)


def test_a_missing_input_is_named(fresh):
    """The cell that fails on it would come minutes later and say less."""
    (fresh / "data/input.txt").unlink()
    with pytest.raises(CompendiumError, match=r"00_first reads data/input\.txt, which is missing"):
        runner.run(runner.Project(fresh, TOY), ["00"])


def test_an_unwritable_build_folder_is_named(fresh, capsys, monkeypatch):
    """The error must name the folder and the variable that moves it."""
    (fresh / "build").write_text("a file in the way")
    monkeypatch.setenv("DFC_BUILD", str(fresh / "build"))
    assert runner.main(["run", "--root", str(fresh)]) == 1
    error = capsys.readouterr().err
    assert f"{fresh}/build" in error
    assert "DFC_BUILD" in error


def test_magics_are_read_over_and_other_breakage_is_reported(tmp_path):
    """A cell that cannot be read would hide its imports from the runner."""
    root = make_compendium(tmp_path / "c")
    write_notebook(root, "03_magic", ["%matplotlib inline\nimport dfc_lib.beta", "%%bash\nls |"])
    parts = runner.Project(root, TOY).parts("03_magic")
    assert {"dfc_lib.beta", "dfc_lib.gamma"} < set(parts)
    assert "dfc_lib.alpha" not in parts
    write_notebook(root, "03_magic", ["1", "def f(:\n  pass"])
    with pytest.raises(CompendiumError, match=r"03_magic\.ipynb, code cell 2, line 1"):
        runner.Project(root, TOY).parts("03_magic")


def test_a_module_that_is_not_python_is_named(fresh):
    """A library in the middle of an edit is no reason for a traceback of the runner's."""
    edit(fresh / "dfc_lib/gamma.py", "TABLE", "TABLE = (")
    with pytest.raises(CompendiumError, match=r"gamma\.py:1: "):
        runner.Project(fresh, TOY).parts("01_second")


# nbval


def test_checked_cells_are_compared_always_and_regress_cells_where_published(fresh, command):
    """Invariants must hold at every profile, rounded results only where they were made."""
    for path in (fresh / "notebooks").iterdir():
        path.unlink()
    sources = [
        "# NBVAL_CHECK_OUTPUT\nimport sys\nprint('7%|', file=sys.stderr)\nprint('holds')",
        "# REGRESS\nprint('a result')",
        "# NBVAL_CHECK_OUTPUT\nprint('an invariant')",
        "import time\ntime.time()",
    ]
    path = write_notebook(fresh, "00_first", sources)
    content = json.loads(path.read_text())
    stored = ["holds\n", "an old result\n", "an old invariant\n", "1\n"]
    for item, text in zip(content["cells"][1:], stored, strict=True):
        item["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]
        item["execution_count"] = 1
    path.write_text(json.dumps(content))
    shown = command(fresh, "check", "--profile", "smoke", status=1)
    assert "FAILED notebooks/00_first.ipynb::Cell 2" in shown
    assert "1 failed, 3 passed" in shown
    shown = command(fresh, "check", "--profile", "toy", status=1)
    assert "FAILED notebooks/00_first.ipynb::Cell 1" in shown
    assert "2 failed, 2 passed" in shown


def test_check_leaves_committed_files_alone_and_compares_csvs(ran, command):
    """`make regress` must measure against the committed figures, not replace them."""
    (ran / "notebooks/02_alone.ipynb").unlink()
    committed = [*(ran / "notebooks").iterdir(), *(ran / "figures").iterdir()]
    before = {path: path.read_bytes() for path in committed}
    assert "1 of 1 CSVs are byte-identical" in command(ran, "check")
    assert {path: path.read_bytes() for path in committed} == before
    (row,) = json.loads((ran / "build/toy/check/figures/manifest.json").read_text())
    assert row["code_hash"] == runner.Project(ran, TOY).key("00_first")


def test_a_cell_of_a_check_that_hangs_is_ended(ran):
    """A hanging kernel must not hang continuous integration."""
    path = ran / "notebooks/02_alone.ipynb"
    edit(path, "1 + 1", "import time; time.sleep(600)")
    child = (
        "import sys; from pathlib import Path; from tools import execute; execute.CELL_TIMEOUT = 3;"
        f"sys.exit(execute._nbval(Path({str(path)!r}), Path({str(ran)!r})))"
    )
    root = Path(runner.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", child], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 1
    assert "Timeout of 3 seconds exceeded" in found.stdout


def test_the_quickstart_comes_first_and_a_readers_own_notebooks_do_not_run(tmp_path):
    """A copy made to play with must not end up among the results."""
    root = make_compendium(tmp_path)
    write_notebook(root, "quickstart", ["1 + 1"])
    write_notebook(root, "quickstart_my_copy", ["1 / 0"])
    write_notebook(root, "scratch", ["1 / 0"])
    names = list(freshness.load_notebooks(root))
    assert names[:2] == ["quickstart", "00_first"]
    assert not {"quickstart_my_copy", "scratch"} & set(names)
    assert freshness.select(freshness.load_notebooks(root), ["quickstart"]) == ["quickstart"]


def test_no_notebooks_is_an_error(tmp_path):
    """A check of nothing would pass."""
    with pytest.raises(CompendiumError, match="no numbered notebooks"):
        runner.check(runner.Project(tmp_path, SMOKE))
