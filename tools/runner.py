"""Executes the notebooks that need it, and only those: the small program behind ``make``.

    python -m tools.runner run     what is stale, in order; --notebook 05, --profile smoke,
                                     -p NAME=VALUE, --output DIR, --force, --jobs 1
    python -m tools.runner status  which notebooks and figures are stale, and why
    python -m tools.runner check   the whole sequence through nbval; --lax compares marked cells

A notebook is *fresh* while its key (see :mod:`tools.freshness`) and everything it wrote last time
are unchanged. Nothing good is replaced before a run has succeeded: the notebook is executed to
``<name>.partial.ipynb``, its figures are collected in a staging folder, and both move to their
places at the end: ``notebooks/`` and ``figures/`` at the published profile, ``build/<profile>/`` at
the others. Notebooks that do not need each other run side by side, each in a process of its own,
if the profile gives one of them fewer threads than the machine has cores.

Papermill and the like are imported where they are used, so finding nothing to do is quick.
"""

import argparse
import ast
import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dfc_lib import paths, profiles, store
from dfc_lib.results.figures import read_manifest, write_manifest
from tools.freshness import (
    CompendiumError,
    Contents,
    Keys,
    Notebook,
    digest,
    load_notebooks,
    select,
    with_needs,
)

MAX_NOTEBOOK_BYTES = 1_000_000
START_TIMEOUT = 300  # seconds for a kernel to start: a busy laptop can need minutes


@dataclass
class Project:
    """A compendium at one profile: where things go, and which notebooks are fresh."""

    root: Path
    profile: profiles.Profile
    output: Path | None = None  # a folder for results, instead of the profile's own places

    @cached_property
    def build(self) -> Path:
        if self.root == paths.ROOT or os.environ.get("DFC_BUILD"):
            return paths.build(self.profile.name)
        return self.root / "build" / self.profile.name

    @property
    def results(self) -> Path:
        """Where state and partial notebooks are, and finished ones unless they are published."""
        return self.output or self.build

    @property
    def published(self) -> bool:
        return self.profile.published and not self.output

    @property
    def figures(self) -> Path:
        return (self.root if self.published else self.results) / "figures"

    def executed(self, name: str) -> Path:
        """Where the executed notebook goes: over its own source if it is published."""
        return (self.root if self.published else self.results) / "notebooks" / f"{name}.ipynb"

    def partial(self, name: str) -> Path:
        return self.results / "notebooks" / f"{name}.partial.ipynb"

    @cached_property
    def notebooks(self) -> dict[str, Notebook]:
        return load_notebooks(self.root)

    @cached_property
    def contents(self) -> Contents:
        return Contents(self.build / "state" / "contents.json")

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.root, self.profile.identity, self.contents, self.notebooks)

    def state_file(self, name: str) -> Path:
        return self.results / "state" / f"{name}.json"

    def state(self, name: str) -> dict | None:
        """What the last successful run recorded, None if there was none."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.state_file(name).read_text(encoding="utf-8"))
        return None

    def why_stale(self, name: str, overrides: dict[str, Any] | None = None) -> str | None:
        """The first reason why the notebook must run, None when it is fresh."""
        state = self.state(name)
        if state is None:
            return "never run here"
        now, before = self.keys.parts(name, overrides), state["parts"]
        if changed := [part for part in {**before, **now} if now.get(part) != before.get(part)]:
            return f"changed: {', '.join(changed[:3])}" + (" ..." if len(changed) > 3 else "")
        executed = self.executed(name)
        if not executed.exists():
            return f"missing: {executed.name}"
        if _outputs_digest(executed.read_text(encoding="utf-8")) != state["outputs_sha256"]:
            return "altered: its stored outputs"
        for file, sha256 in state["files"].items():
            path = self.figures / file
            if not path.exists() or self.contents.file(path) != sha256:
                return f"{'altered' if path.exists() else 'missing'}: {file}"
        for item in self.notebooks[name].declared("outputs"):
            if not (self.build / item).exists():
                return f"missing: {item} in the build folder"
        return None

    def kernel_environment(self, **extra: str) -> contextlib.AbstractContextManager[None]:
        """The environment that kernels start in, for as long as the context lasts."""
        on_path = [str(self.root), os.environ.get("PYTHONPATH", "")]
        if self.profile.threads:  # the same on every machine: the last bits of a sum depend on it
            libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
            extra |= {f"{name}_NUM_THREADS": str(self.profile.threads) for name in libraries}
        return _environment(
            DFC_ROOT=str(self.root),
            DFC_PROFILE=self.profile.handle,
            PYTHONPATH=os.pathsep.join(filter(None, on_path)),
            PYTHONHASHSEED="0",
            SOURCE_DATE_EPOCH="1767225600",  # 2026-01-01, should anything want to write a date
            TOKENIZERS_PARALLELISM="false",  # forked workers otherwise warn into the notebook
            MPLBACKEND="module://matplotlib_inline.backend_inline",
            JUPYTER_PREFER_ENV_PATH="1",  # a kernel in the home folder must not shadow this one
            PYDEVD_DISABLE_FILE_VALIDATION="1",  # silences a debugger's notice at kernel start
            **extra,
        )


# --------------------------------------------------------------------------------------------------
# Executing one notebook


@dataclass
class Job:
    """A notebook that is being executed in a process of its own."""

    project: Project
    name: str
    keep_injected: bool
    key: str
    parts: dict[str, str]
    process: multiprocessing.process.BaseProcess
    started: float

    @property
    def partial(self) -> Path:
        return self.project.partial(self.name)

    @property
    def error(self) -> Path:
        return self.partial.with_suffix(".error")

    @property
    def staging(self) -> Path:
        return self.project.results / "staging" / self.name

    @classmethod
    def start(
        cls, project: Project, name: str, overrides: dict[str, Any] | None = None, beside: int = 0
    ) -> "Job":
        """Begin to execute a notebook, ``beside`` so many others that share the cores.

        Raises:
            CompendiumError: an input is missing.
        """
        notebook = project.notebooks[name]
        for item in notebook.declared("inputs"):
            if not (project.root / item).exists():
                raise CompendiumError(
                    f"{name} reads {item}, which is missing; git checkout -- {item}"
                )
        # Taken before the run: what is edited meanwhile must count as changed, not as what ran.
        parts, key = project.keys.parts(name, overrides), project.keys.key(name, overrides)
        partial = project.partial(name)
        partial.parent.mkdir(parents=True, exist_ok=True)
        task = {
            "input_path": str(notebook.path),
            "output_path": str(partial),
            "parameters": overrides or None,
            "cwd": str(notebook.path.parent),
            "progress_bar": not beside and sys.stderr.isatty(),
        }
        process = _SPAWN.Process(target=_papermill, args=(task,), name=name, daemon=True)
        job = cls(project, name, bool(overrides), key, parts, process, time.perf_counter())
        job.error.unlink(missing_ok=True)
        shutil.rmtree(job.staging, ignore_errors=True)
        job.staging.mkdir(parents=True)
        figures = {"DFC_FIGURES": str(project.figures), "DFC_STAGING": str(job.staging)}
        about = {"DFC_NOTEBOOK": name, "DFC_CODE_HASH": key, "DFC_CORES": _share(beside)}
        with project.kernel_environment(**about, **figures):
            process.start()
        return job

    def finish(self) -> dict:
        """Put the notebook and its figures in their places, if the process ended well.

        Returns:
            What is recorded: ``key, parts, outputs_sha256, files`` (sha256 by name), ``seconds``.

        Raises:
            CompendiumError: a cell raised, the kernel died, or an output shows a path of this
                machine although the notebook is to be committed.
        """
        self.process.join()
        seconds = round(time.perf_counter() - self.started, 1)
        if self.process.exitcode:
            message = f"{self.name}: its process ended with status {self.process.exitcode}"
            if self.error.exists():
                message = self.error.read_text(encoding="utf-8")
                self.error.unlink()
            raise CompendiumError(message)
        project, partial = self.project, self.partial
        notebook = project.notebooks[self.name]
        text = _settle(project, notebook, partial, keep_injected=self.keep_injected)
        files = _publish_figures(project, self.name, self.staging)
        store.write_atomically(project.executed(self.name), text)
        partial.unlink()
        state = {
            "key": self.key,
            "parts": self.parts,
            "outputs_sha256": _outputs_digest(text),
            "files": files,
            "seconds": seconds,
        }
        store.write_atomically(project.state_file(self.name), json.dumps(state, indent=1) + "\n")
        return state


def _share(beside: int) -> str:
    """The cores of a notebook with so many others beside it."""
    return str(max(1, paths.cores() // (1 + beside)))


_SPAWN = multiprocessing.get_context("spawn")


def _end_with_the_runner() -> None:
    """In a child: end, kernel included, when the runner says so and when it is gone."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runner = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([runner.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _papermill(task: dict[str, Any]) -> None:
    """In a child: execute a notebook; what went wrong is left in a file for :meth:`Job.finish`."""
    _end_with_the_runner()
    partial = Path(task["output_path"])
    name = partial.name.partition(".")[0]
    try:
        message = _why_papermill_failed(name, partial, task)
    except KeyboardInterrupt:
        sys.exit(130)
    if message:
        store.write_atomically(partial.with_suffix(".error"), message)
        sys.exit(1)


def _why_papermill_failed(name: str, partial: Path, task: dict[str, Any]) -> str | None:
    try:
        import papermill
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        return f"{error.name} is not installed for {sys.executable}; run: make setup"
    try:
        papermill.execute_notebook(
            **task,
            kernel_name="python3",
            start_timeout=START_TIMEOUT,
            # No notice about local sockets per kernel, none about being asked to end.
            extra_arguments=["--log-level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        where = f"{name} failed in cell [{error.exec_count}]"
        return _failure(where, error.source, "\n".join(error.traceback), partial)
    except DeadKernelError:
        where = f"{name}: the kernel died (out of memory?) in the cell"
        return _failure(where, _last_started(partial), "", partial)
    except RuntimeError as error:
        return f"{name}: its kernel could not be started: {error}"
    return None


def _settle(project: Project, notebook: Notebook, partial: Path, *, keep_injected: bool) -> str:
    """The executed notebook as it is kept: the source's cells with normalised outputs."""
    import nbformat
    from nbstripout import strip_output

    settled = executed = nbformat.read(partial, as_version=nbformat.NO_CONVERT)
    if not keep_injected:
        # Outputs go into the source as it is now: prose edited during a long run is not lost.
        settled = nbformat.read(notebook.path, as_version=nbformat.NO_CONVERT)
        sources = [cell for cell in settled.cells if cell.cell_type == "code"]
        ran = [cell for cell in executed.cells if cell.cell_type == "code"]
        if [cell.source for cell in sources] != [cell.source for cell in ran]:
            raise CompendiumError(
                f"{notebook.path} was edited while it ran, so its results are not kept; they are "
                f"in {partial}. Run it again"
            )
        for cell, result in zip(sources, ran, strict=True):
            cell.outputs, cell.execution_count = result.outputs, result.execution_count
    for cell in settled.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(_without_progress_bars(cell.outputs))
    about_this_run = [
        "metadata.papermill",
        "metadata.widgets",
        "cell.metadata.papermill",
        "cell.metadata.execution",
    ]
    settled = strip_output(
        settled, keep_output=True, keep_count=True, keep_id=True, extra_keys=about_this_run
    )
    text = nbformat.writes(settled, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"
    if leak := _machine_path(project.root, settled):
        message = f"an output of {notebook.name} shows a path of this machine: {leak}"
        if project.published:
            raise CompendiumError(
                f"{message}\nIt is not committed so. Print paths relative to the compendium, or "
                f"silence the warning; the executed notebook is {partial}"
            )
        print(f"    note: {message}")
    if len(text) > MAX_NOTEBOOK_BYTES:
        print(f"    note: {notebook.name} has {len(text) / 1e6:.1f} MB; 1 MB is the limit")
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


def _joined(outputs: list) -> list:
    """One output for what a stream printed in a row: kernels cut it where the clock says so."""
    kept: list = []
    for output in outputs:
        before = kept[-1] if kept else None
        if output.output_type == "stream" and before and before.get("name") == output.name:
            before.text += output.text
        else:
            kept.append(output)
    return kept


def _machine_path(root: Path, notebook: dict) -> str | None:
    """The first line of output with a path of the checkout, environment, home or a kernel."""
    folders = {str(root), sys.prefix, str(Path.home())} - {"/"}
    alternatives = [rf"(?<![\w.-]){re.escape(folder)}(?![\w-])" for folder in folders]
    pattern = re.compile("|".join([*alternatives, r"ipykernel_\d+"]))
    for cell in notebook["cells"]:
        lines = (line for text in _texts(cell.get("outputs", [])) for line in text.splitlines())
        if found := next(filter(pattern.search, lines), None):
            return found.strip()[:200]
    return None


def _texts(value: Any) -> Iterator[str]:
    """All text in a cell's outputs; pictures left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not key.startswith(("image/", "application/pdf")):
                yield from _texts(item)


def _publish_figures(project: Project, name: str, staging: Path) -> dict[str, str]:
    """Move staged figures into place; what the notebook wrote once and no longer does, goes.

    Returns:
        The sha256 of each file by its name.
    """
    new = read_manifest(staging)
    old = read_manifest(project.figures)
    files = [file for row in new for file in row["files"]]
    for file in files:  # copied, not renamed: the build folder may be on another disk
        store.write_atomically(project.figures / file, (staging / file).read_bytes())
    kept = [row for row in old if row["notebook"] != name]
    if new or kept != old:
        write_manifest(project.figures, [*kept, *new])
    gone = {file for row in old if row["notebook"] == name for file in row["files"]} - set(files)
    for file in sorted(gone):
        (project.figures / file).unlink(missing_ok=True)
        print(f"    removed {file}: {name} no longer writes it")
    shutil.rmtree(staging)
    return {file: project.contents.file(project.figures / file) for file in files}


def _failure(where: str, source: str, traceback: str, partial: Path) -> str:
    if not sys.stderr.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    cell = "\n".join(f"    {line}" for line in source.splitlines())
    return (
        f"{where}\n\n{cell}\n\n{traceback}\n\n"
        f"All until there is in {partial}; no good result was replaced."
    )


def _last_started(partial: Path) -> str:
    """The source of the last cell that papermill began."""
    cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    started = [cell for cell in code if cell["metadata"]["papermill"]["status"] != "pending"]
    return "".join(started[-1]["source"]) if started else "(none was started)"


def _outputs_digest(text: str) -> str:
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return digest([cell.get("execution_count"), cell.get("outputs")] for cell in cells)


# --------------------------------------------------------------------------------------------------
# The three commands


def run(
    project: Project,
    wanted: Iterable[str] = (),
    overrides: dict[str, Any] | None = None,
    *,
    force: bool = False,
    jobs: int = 0,
) -> list[str]:
    """Execute what is stale among ``wanted`` (default: all) and what those need.

    ``overrides`` and ``project.output`` apply to the wanted notebooks alone. As many as ``jobs``
    (default: ``Profile.side_by_side``) run at a time, those first on which the longest work waits.

    Returns:
        The names of the notebooks that were executed.

    Raises:
        CompendiumError: as :class:`Job`, once those that had begun are done; or an unknown
            parameter, or another run in progress.
    """
    notebooks = _some_notebooks(project)
    targets = select(notebooks, wanted) or list(notebooks)
    if (overrides or project.output) and not wanted:
        raise CompendiumError("parameters and an output folder go with a notebook: --notebook 05")
    if overrides and project.published:
        raise CompendiumError(
            "the committed notebooks keep their own parameters: name a folder with --output DIR, "
            "another profile, or edit the cell tagged 'parameters'"
        )
    for name in targets:
        check_overrides(notebooks[name], overrides or {})
    as_it_stands = Project(project.root, project.profile)
    order = with_needs(notebooks, targets)
    executed: list[str] = []
    started, jobs = time.perf_counter(), jobs or project.profile.side_by_side

    def prepare(name: str) -> Callable[[int], Job] | None:
        place, values = (project, overrides) if name in targets else (as_it_stands, None)
        why = place.why_stale(name, values)
        if force and name in targets:
            why = why or "forced"
        if why is None:
            return None

        def start(beside: int) -> Job:
            print(f"[{order.index(name) + 1}/{len(order)}] {name} ({why})", flush=True)
            return Job.start(place, name, values, beside)

        return start

    def finish(job: Job) -> None:
        state = job.finish()
        executed.append(job.name)
        figures = ", ".join(sorted({Path(file).stem for file in state["files"]}))
        of = f"{job.name}: " if jobs > 1 else ""
        print(f"    {of}{state['seconds']:.0f} s, figures: {figures or 'none'}", flush=True)

    with _lock(project):
        try:
            _in_order(notebooks, order, prepare, finish, jobs)
        finally:
            as_it_stands.contents.save() if project.output else project.contents.save()
    print(
        f"profile {project.profile.name}: {len(executed)} run, {len(order) - len(executed)} "
        f"already fresh, {time.perf_counter() - started:.1f} s"
    )
    return [name for name in order if name in executed]


def _in_order(
    notebooks: dict[str, Notebook],
    order: list[str],
    prepare: Callable[[str], Callable[[int], Any] | None],
    finish: Callable[[Any], None],
    jobs: int,
    timeout: float | None = None,
) -> None:
    """Start each notebook once what it needs has ended, at most ``jobs`` at a time.

    Args:
        prepare: is called when a notebook could begin and gives None where there is nothing to do,
            else a function that begins it beside so many others, and gives something with a
            ``process``.
        finish: is called when the process has ended. A ``CompendiumError`` of one of the three lets
            those that run come to their end, and nothing more begins.
        timeout: seconds for all.
    """
    after = {n: [m for m in order if n in notebooks[m].declared("needs")] for n in order}

    def urgency(name: str) -> float:
        return notebooks[name].minutes + max(map(urgency, after[name]), default=0.0)

    waiting = sorted(order, key=urgency, reverse=True)  # stable: otherwise by number
    ready: dict[str, Callable[[int], Any]] = {}
    running: list[Any] = []
    failure: CompendiumError | None = None
    deadline = None if timeout is None else time.monotonic() + timeout

    def next_fit() -> str | None:
        pending = {*waiting, *ready, *(job.name for job in running)}
        fit = (n for n in waiting if pending.isdisjoint(notebooks[n].declared("needs")))
        return next(fit, None)

    try:
        while True:
            try:
                while failure is None and (name := next_fit()):
                    waiting.remove(name)
                    if start := prepare(name):
                        ready[name] = start
                together = min(jobs, len(running) + len(ready))
                for name in sorted(ready, key=urgency, reverse=True):
                    if failure is None and len(running) < jobs:
                        running.append(ready.pop(name)(together - 1))
            except CompendiumError as error:
                failure = error
            if not running:
                break
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = multiprocessing.connection.wait([j.process.sentinel for j in running], left)
            if not ended:
                raise CompendiumError(f"not done after {timeout:g} s; see --timeout")
            for job in [job for job in running if job.process.sentinel in ended]:
                running.remove(job)
                try:
                    finish(job)
                except CompendiumError as error:
                    if failure or running:  # the first one is raised in the end; do not wait for it
                        names = ", ".join(other.name for other in running)
                        print(f"    {job.name} FAILED; still running: {names}\n{error}", flush=True)
                    failure = failure or error
        if failure:
            raise failure
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.join()


def check_overrides(notebook: Notebook, overrides: dict[str, Any]) -> None:
    """Papermill only warns of a parameter that does not exist; here it is an error.

    Raises:
        CompendiumError: a name is not assigned a literal in the cell tagged ``parameters``, or its
            new value is of another type.
    """
    known = notebook.parameters
    for name, value in overrides.items():
        if name not in known or name == "PROFILE":
            raise CompendiumError(
                f"{notebook.name} has no parameter {name!r} to override; it has: "
                f"{', '.join(sorted(set(known) - {'PROFILE'})) or 'none'} (and see --profile)"
            )
        old, new = type(known[name]), type(value)
        if known[name] is not None and new is not old and (old, new) != (float, int):
            raise CompendiumError(
                f"{notebook.name}: {name} is {known[name]!r}; {value!r} is of another type"
            )


def status(project: Project) -> str:
    """A table of the notebooks (fresh or not, and why) and one of the figures."""
    rows = read_manifest(project.figures)
    lines = [f"{'profile ' + project.profile.name:28}{'':8}{'seconds':>8}  why"]
    stale: dict[str, bool] = {}
    for name in project.notebooks:
        state, why = project.state(name), project.why_stale(name)
        stale[name] = why is not None
        mine = [row["code_hash"] for row in rows if row["notebook"] == name]
        if state is None and mine and set(mine) == {project.keys.key(name)}:
            why = "never run here; the committed figures come from this very code"
        condition = "fresh" if why is None else "stale" if state else "new"
        seconds = f"{state['seconds']:.0f}" if state else "-"
        lines.append(f"{name:28}{condition:8}{seconds:>8}  {why or ''}".rstrip())
    lines += ["", f"{'figure or table':36}{'age':>8}  from"]
    for row in rows:
        files = [project.figures / file for file in row["files"]]
        if all(file.exists() for file in files):
            age = _age(max(file.stat().st_mtime for file in files))
            condition = "stale" if stale.get(row["notebook"]) else "fresh"
        else:
            age, condition = "-", "missing"
        if row["notebook"] not in stale:
            condition = "orphan: there is no such notebook"
        lines.append(f"{row['id']:36}{age:>8}  {row['notebook']} ({condition})")
    project.contents.save()
    return "\n".join(lines if rows else [*lines, "none yet; make figures"])


def check(
    project: Project,
    wanted: Iterable[str] = (),
    *,
    lax: bool = True,
    timeout: float = 7200,
    cell_timeout: float = 1800,
    jobs: int = 0,
) -> int:
    """Execute the notebooks through nbval, each in a pytest process; returns the first bad status.

    Cells marked ``# NBVAL_CHECK_OUTPUT`` are compared with their stored output at every profile,
    those marked ``# REGRESS`` at the published one (``conftest.py``), without ``lax`` all others
    too. Figures go to ``build/<profile>/check/figures``; times are in seconds.

    Raises:
        CompendiumError: there is no notebook, another run is in progress, or time is up.
    """
    notebooks = _some_notebooks(project)
    targets = with_needs(notebooks, select(notebooks, wanted) or notebooks)
    figures = project.build / "check" / "figures"
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={project.root}"]
    options += ["--nbval-lax" if lax else "--nbval", "--nbval-current-env", "--durations=2"]
    options += [f"--nbval-kernel-startup-timeout={START_TIMEOUT}"]
    options += [f"--nbval-cell-timeout={cell_timeout:g}"]
    codes: list[int] = []

    def start(name: str, beside: int) -> Check:
        log, staging = figures.parent / f"{name}.log", figures.parent / "staging" / name
        staging.mkdir(parents=True)
        arguments = ([*options, str(notebooks[name].path)], project.root, log)
        process = _SPAWN.Process(target=_nbval, args=arguments, name=name, daemon=True)
        with _environment(DFC_CORES=_share(beside), DFC_STAGING=str(staging)):
            process.start()
        return Check(name, process, log, staging)

    def finish(job: Check) -> None:
        job.process.join()
        codes.append(job.process.exitcode or 0)
        _publish_figures(checked, job.name, job.staging)  # all that it made, for those that need it
        print(job.log.read_text(encoding="utf-8"), flush=True)

    checked = Project(project.root, project.profile, output=figures.parent)
    jobs = jobs or project.profile.side_by_side
    with _lock(project), project.kernel_environment(DFC_FIGURES=str(figures)):
        shutil.rmtree(figures.parent, ignore_errors=True)
        figures.parent.mkdir(parents=True)
        _in_order(notebooks, targets, lambda name: partial(start, name), finish, jobs, timeout)
    code = next(filter(None, codes), 0)
    if project.published:
        made = sorted(figures.glob("*.csv"))
        differing = [f for f in made if not _same(f, project.figures / f.name)]
        print(f"{len(made) - len(differing)} of {len(made)} CSVs are byte-identical to figures/")
        print("".join(f"    differs: {file}\n" for file in differing), end="")
    return code


@dataclass
class Check:
    """A notebook that nbval is executing."""

    name: str
    process: multiprocessing.process.BaseProcess
    log: Path
    staging: Path


def _nbval(arguments: list[str], root: Path, log: Path) -> None:
    """In a child: one pytest run, its output in a file so that two do not mix."""
    _end_with_the_runner()
    import pytest

    os.chdir(root)
    with log.open("w", encoding="utf-8") as stream:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(stream.fileno(), output.fileno())
        status = int(pytest.main(arguments))
        sys.stdout.flush()
    sys.exit(status)


def _some_notebooks(project: Project) -> dict[str, Notebook]:
    if not project.notebooks:
        raise CompendiumError(f"no numbered notebooks in {project.root / 'notebooks'}")
    return project.notebooks


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.read_bytes() == b.read_bytes()


def _age(moment: float) -> str:
    seconds = time.time() - moment
    units = (("d", 86400), ("h", 3600), ("min", 60))
    return next((f"{seconds / n:.0f} {unit}" for unit, n in units if seconds >= n), "now")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _lock(project: Project) -> Iterator[None]:
    """One run per profile; the system frees the lock when its holder ends, however it ends."""
    path = project.build / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        try:
            store.lock(stream, wait=False)
        except OSError:
            stream.seek(0)
            holder = stream.read().strip() or "holder unknown"
            raise CompendiumError(
                f"profile {project.profile.name} is being run already ({holder}); wait or stop it"
            ) from None
        stream.seek(0)
        if left := stream.read().strip():
            print(f"note: an earlier run ({left}) was cut off; taking over")
        stream.truncate(0)
        stream.write(f"process {os.getpid()} since {datetime.now():%Y-%m-%d %H:%M}")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["ALPHA=4", "BLOCK=shared"]`` by name: a Python literal where it is one, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise CompendiumError(f"-p takes NAME=VALUE, not {pair!r}")
        found[name] = text
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(text)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.runner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "status", "check"])
    parser.add_argument("--profile", default=os.environ.get("DFC_PROFILE") or "toy")
    parser.add_argument("--notebook", nargs="+", default=[], metavar="NB", help="default: all")
    parser.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a folder for the results")
    parser.add_argument("--force", action="store_true", help="run even what is fresh")
    parser.add_argument("--lax", action="store_true", help="check: compare marked cells only")
    parser.add_argument("--jobs", type=int, default=0, help="notebooks at a time")
    parser.add_argument("--timeout", type=float, default=7200, help="check: seconds for it all")
    parser.add_argument("--cell-timeout", type=float, default=1800, help="check: per cell")
    parser.add_argument("--root", type=Path, default=paths.ROOT, help="another compendium")
    options = parser.parse_args(arguments)
    try:
        output = options.output and options.output.resolve()
        project = Project(options.root.resolve(), profiles.get(options.profile), output)
        if options.command == "status":
            print(status(project))
        elif options.command == "check":
            limits = {"timeout": options.timeout, "cell_timeout": options.cell_timeout}
            return check(project, options.notebook, lax=options.lax, jobs=options.jobs, **limits)
        else:
            overrides = parse_overrides(options.overrides)
            run(project, options.notebook, overrides, force=options.force, jobs=options.jobs)
    except (CompendiumError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished notebooks are kept, the next run continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # Being told to stop must close the kernel just as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
