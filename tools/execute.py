"""Executes one notebook in a process of its own, and puts what came of it in its places.

Nothing good is replaced before a run has succeeded: the executed notebook and its figures wait in
``staging/<name>/`` of the build folder and move to their places at the end.

Papermill and the like are imported where they are used, so finding nothing to do is quick.
"""

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfc_lib import paths, store
from dfc_lib.results.figures import read_manifest, write_manifest
from tools.freshness import CompendiumError, Notebook, Project, contents, outputs_digest

START_TIMEOUT = 300  # seconds for a kernel to start: a busy laptop can need minutes
CELL_TIMEOUT = 1800  # and for one cell of a check: nbval waits for ever for a dead kernel
EPOCH = "1767225600"  # 2026-01-01, should anything want to write a date


@dataclass
class Job:
    """A notebook that is being executed."""

    project: Project
    name: str
    parts: dict[str, str]
    key: str
    beside: int  # so many others share the cores
    started: float
    process: multiprocessing.process.BaseProcess | None = None

    @property
    def staging(self) -> Path:
        return self.project.staging(self.name)

    @property
    def unfinished(self) -> Path:
        """The notebook while it runs."""
        return self.staging / f"{self.name}.ipynb"

    @property
    def environment(self) -> dict[str, str]:
        """What the kernel starts in, beyond what it inherits."""
        project, on_path = self.project, [str(self.project.root), os.environ.get("PYTHONPATH", "")]
        # The same on every machine: the last bits of a sum depend on the number of threads.
        threads = str(project.profile.threads or "")
        libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM") if threads else ()
        return {f"{library}_NUM_THREADS": threads for library in libraries} | {
            "DFC_ROOT": str(project.root),
            "DFC_PROFILE": project.profile.handle,
            "DFC_NOTEBOOK": self.name,
            "DFC_CODE_HASH": self.key,
            "DFC_CORES": str(max(1, paths.cores() // (1 + self.beside))),
            "DFC_FIGURES": str(project.figures),
            "DFC_STAGING": str(self.staging),
            "PYTHONPATH": os.pathsep.join(filter(None, on_path)),
            "PYTHONHASHSEED": "0",
            "SOURCE_DATE_EPOCH": EPOCH,
            "TOKENIZERS_PARALLELISM": "false",  # forked workers otherwise warn into the notebook
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "JUPYTER_PREFER_ENV_PATH": "1",  # a kernel in the home folder must not shadow this one
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger's notice at kernel start
        }

    def start(self, work: Callable[..., int], *arguments: Any) -> "Job":
        """Let a process of its own do ``work(*arguments)``, which returns its exit status."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        arguments = (work, arguments, self.environment, self.staging / "report")
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=_child, args=arguments, name=self.name, daemon=True)
        self.process.start()
        return self

    def report(self) -> str:
        """What the process, which has ended, printed."""
        self.process.join()
        path = self.staging / "report"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _child(work: Callable[..., int], arguments: tuple, environment: dict, report: Path) -> None:
    """In the child: ends, kernel included, when the runner says so and when it is gone."""
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runner = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([runner.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    with report.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
    try:
        status = work(*arguments)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def begin(project: Project, name: str, beside: int) -> Job:
    """Begin to execute a notebook by papermill, ``beside`` so many others that share the cores.

    Raises:
        CompendiumError: an input is missing.
    """
    notebook = project.notebooks[name]
    for item in notebook.declared("inputs"):
        if not (project.root / item).exists():
            raise CompendiumError(f"{name} reads {item}, which is missing; git checkout -- {item}")
    # Taken before the run: what is edited meanwhile must count as changed, not as what ran.
    parts, key = project.parts(name), project.key(name)
    job = Job(project, name, parts, key, beside, time.perf_counter())
    progress = not beside and sys.stderr.isatty()
    return job.start(_papermill, notebook.path, job.unfinished, progress)


def _papermill(source: Path, unfinished: Path, progress: bool) -> int:
    """In the child: execute a notebook; prints what went wrong."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    name = source.stem
    try:
        papermill.execute_notebook(
            str(source),
            str(unfinished),
            cwd=str(source.parent),
            progress_bar=progress,
            kernel_name="python3",
            start_timeout=START_TIMEOUT,
            # No notice about local sockets per kernel, none about being asked to end.
            extra_arguments=["--log-level=CRITICAL"],
        )
        return 0
    except PapermillExecutionError as error:
        where, cell = f"{name} failed in cell [{error.exec_count}]", error.source
        traceback = "\n".join(error.traceback)
    except DeadKernelError:
        where, cell = f"{name}: the kernel died (out of memory?) in the cell", _last(unfinished)
        traceback = ""
    if not sys.stderr.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    cell = "\n".join(f"    {line}" for line in cell.splitlines())
    print(f"{where}\n\n{cell}\n\n{traceback}\n")
    print(f"All until there is in {unfinished}; no good result was replaced.")
    return 1


def _last(unfinished: Path) -> str:
    """The source of the last cell that papermill began."""
    cells = json.loads(unfinished.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    started = [cell for cell in code if cell["metadata"]["papermill"]["status"] != "pending"]
    return "".join(started[-1]["source"]) if started else "(none was started)"


def begin_check(project: Project, name: str, beside: int) -> Job:
    """Begin to execute a notebook through nbval, which compares the cells that are marked."""
    job = Job(project, name, {}, project.key(name), beside, time.perf_counter())
    return job.start(_nbval, project.notebooks[name].path, project.root)


def _nbval(notebook: Path, root: Path) -> int:
    """In the child: one pytest run."""
    import pytest

    os.chdir(root)
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={root}", "--durations=2"]
    options += ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    options += [f"--nbval-kernel-startup-timeout={START_TIMEOUT}"]
    return int(pytest.main([*options, str(notebook)]))


def out_of_reach(notebook: Notebook) -> str | None:
    """Why what a notebook downloads cannot be had; None once it is here, or if it needs nothing.

    Raises:
        CompendiumError: it is here, but missing in part or damaged.
    """
    if not notebook.fetch:
        return None
    try:
        importlib.import_module(notebook.fetch).fetch()
    except ConnectionError as error:
        return str(error)
    except (OSError, ValueError) as error:
        raise CompendiumError(f"{notebook.name} reads what is not whole: {error}") from error
    return None


def keep(project: Project, name: str) -> None:
    """Let a notebook's committed figures stand for those of this profile: later ones read them.

    Raises:
        CompendiumError: none are committed.
    """
    committed = project.root / "figures"
    rows = [row for row in read_manifest(committed) if row["notebook"] == name]
    if not rows:
        raise CompendiumError(f"{name} cannot run, and {committed} has nothing of it")
    if project.figures != committed:
        _replace_figures(project.figures, name, rows, committed)


# --------------------------------------------------------------------------------------------------
# What is kept of a run


def finish(job: Job) -> dict:
    """Put a notebook and its figures in their places, if its process ended well.

    Returns:
        What is recorded: ``parts, outputs_sha256, files`` (sha256 by name), ``seconds``.

    Raises:
        CompendiumError: a cell raised, the kernel died, or an output shows a path of this
            machine although the notebook is to be committed.
    """
    report, project = job.report(), job.project
    seconds = round(time.perf_counter() - job.started, 1)
    if status := job.process.exitcode:
        raise CompendiumError(report or f"{job.name}: its process ended with status {status}")
    text = _settle(job, project.notebooks[job.name])
    state = {
        "parts": job.parts,
        "outputs_sha256": outputs_digest(text),
        "files": publish_figures(job),
        "seconds": seconds,
    }
    store.write_atomically(project.executed(job.name), text)
    store.write_atomically(project.state_file(job.name), json.dumps(state, indent=1) + "\n")
    return state


def publish_figures(job: Job) -> dict[str, str]:
    """Move staged figures into place; what the notebook wrote once and no longer does, goes.

    Returns:
        The sha256 of each file by its name.
    """
    place = job.project.figures
    files = _replace_figures(place, job.name, read_manifest(job.staging), job.staging)
    shutil.rmtree(job.staging)
    return {file: contents(place / file) for file in files}


def _replace_figures(place: Path, name: str, new: list[dict], source: Path) -> list[str]:
    """Copy the files of manifest rows from ``source``, in place of the notebook's former ones."""
    old, files = read_manifest(place), [file for row in new for file in row["files"]]
    for file in files:  # copied, not renamed: the build folder may be on another disk
        store.write_atomically(place / file, (source / file).read_bytes())
    kept = [row for row in old if row["notebook"] != name]
    if new or kept != old:
        write_manifest(place, [*kept, *new])
    gone = {file for row in old if row not in kept for file in row["files"]} - set(files)
    for file in sorted(gone):
        (place / file).unlink(missing_ok=True)
        print(f"    removed {file}: {name} no longer writes it")
    return files


def _settle(job: Job, notebook: Notebook) -> str:
    """The executed notebook as it is kept: the source's cells with normalised outputs."""
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor
    from nbstripout import strip_output

    executed = nbformat.read(job.unfinished, as_version=nbformat.NO_CONVERT)
    # Outputs go into the source as it is now: prose edited during a long run is not lost.
    settled = nbformat.read(notebook.path, as_version=nbformat.NO_CONVERT)
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    sources = [cell for cell in settled.cells if cell.cell_type == "code"]
    if [cell.source for cell in sources] != [cell.source for cell in ran]:
        raise CompendiumError(
            f"{notebook.path} was edited while it ran, so its results are not kept; they are "
            f"in {job.unfinished}. Run it again"
        )
    for cell, result in zip(sources, ran, strict=True):
        cell.outputs = _without_progress_bars(result.outputs)
        cell.execution_count = result.execution_count
    # What a stream printed in a row is one output: kernels cut it where the clock says so.
    settled, _ = CoalesceStreamsPreprocessor().preprocess(settled, {})
    about_this_run = ["metadata.papermill", "metadata.widgets"]
    about_this_run += ["cell.metadata.papermill", "cell.metadata.execution"]
    settled = strip_output(
        settled, keep_output=True, keep_count=True, keep_id=True, extra_keys=about_this_run
    )
    text = nbformat.writes(settled, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"
    if leak := _machine_path(job.project.root, json.loads(text)):
        message = f"an output of {notebook.name} shows a path of this machine: {leak}"
        if job.project.published:
            raise CompendiumError(
                f"{message}\nIt is not committed so. Print paths relative to the compendium, or "
                f"silence the warning; the executed notebook is {job.unfinished}"
            )
        print(f"    note: {message}")
    return text


def _without_progress_bars(outputs: list) -> list:
    """A progress bar is for whoever waits; its timings would differ at every run."""
    bar = re.compile(r"\d+%\||\d+[a-z]*(/\?)? \[\d+:\d\d")
    kept = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.output_type == "stream" and output.name == "stderr":
            lines = (line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
            lines = [f"{line}\n" for line in lines if line.strip() and not bar.search(line)]
            output.text = "".join(lines)
            if not lines:
                continue
        kept.append(output)
    return kept


def _machine_path(root: Path, notebook: dict) -> str | None:
    """The first line of output with a path of the checkout, environment, home or a kernel."""
    folders = {str(root), sys.prefix, str(Path.home())} - {"/"}
    alternatives = [rf"(?<![\w.-]){re.escape(folder)}(?![\w-])" for folder in folders]
    pattern = re.compile("|".join([*alternatives, r"ipykernel_\d+"]))
    # A line of text is a line of JSON here. In the base64 of a picture no such path stands.
    outputs = [cell.get("outputs", []) for cell in notebook["cells"]]
    lines = json.dumps(outputs, indent=0, ensure_ascii=False).splitlines()
    found = next(filter(pattern.search, lines), None)
    return found and found[:200]
