"""Executes the notebooks that need it, and only those: the small program behind ``make``.

    python -m tools.runner run     what is stale, in order; --notebook 05, --profile smoke, --jobs 1
    python -m tools.runner status  which notebooks and figures are stale, and why
    python -m tools.runner check   the whole sequence through nbval, marked cells compared

A notebook is *fresh* while its key (see :mod:`tools.freshness`) and everything it wrote last time
are unchanged. Results go to ``notebooks/`` and ``figures/`` at the published profile, to
``build/<profile>/`` at the others (see :mod:`tools.execute`). Notebooks that do not need each other
run side by side if the profile gives one of them fewer threads than the machine has cores. A
notebook that has to download what it reads, and cannot, keeps its committed results.
"""

import argparse
import contextlib
import filecmp
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

from dfc_lib import paths, profiles, store
from dfc_lib.results.figures import read_manifest
from tools import execute
from tools.execute import Job
from tools.freshness import CompendiumError, Notebook, Project, select, with_needs


def run(project: Project, wanted: Iterable[str] = (), jobs: int = 0) -> list[str]:
    """Execute what is stale among ``wanted`` (default: all) and what those need.

    As many as ``jobs`` (default: ``Profile.side_by_side``) run at a time, those first on which the
    longest work waits.

    Returns:
        The names of the notebooks that were executed, in the order in which they were done.

    Raises:
        CompendiumError: as :mod:`tools.execute`, once those that had begun are done; or another run
            in progress.
    """
    notebooks = project.notebooks
    order = with_needs(notebooks, select(notebooks, wanted) or notebooks)
    executed, kept = [], []
    started, jobs = time.perf_counter(), jobs or project.profile.side_by_side

    def why(name: str) -> str | None:
        reason = project.why_stale(name)
        if reason and _kept(project, name):
            kept.append(name)
            return None
        return reason

    def begin(name: str, reason: str, beside: int) -> Job:
        print(f"[{order.index(name) + 1}/{len(order)}] {name} ({reason})", flush=True)
        return execute.begin(project, name, beside)

    def finish(job: Job) -> None:
        state = execute.finish(job)
        executed.append(job.name)
        figures = ", ".join(sorted({Path(file).stem for file in state["files"]}))
        of = f"{job.name}: " if jobs > 1 else ""
        print(f"    {of}{state['seconds']:.0f} s, figures: {figures or 'none'}", flush=True)

    with _alone(project):
        _in_order(notebooks, order, why, begin, finish, jobs)
    fresh = len(order) - len(executed) - len(kept)
    print(
        f"profile {project.profile.name}: {len(executed)} run, "
        + (f"{len(kept)} kept, " if kept else "")
        + f"{fresh} already fresh, {time.perf_counter() - started:.1f} s"
    )
    return executed


def _kept(project: Project, name: str) -> bool:
    """Whether a notebook stays as it is committed, because what it downloads is out of reach."""
    why = execute.out_of_reach(project.notebooks[name])
    if why:
        execute.keep(project, name)
        print(f"    {name} keeps its committed results: {why}", flush=True)
    return bool(why)


def _in_order(
    notebooks: dict[str, Notebook],
    order: list[str],
    why: Callable[[str], str | None],
    begin: Callable[[str, str, int], Job],
    finish: Callable[[Job], None],
    jobs: int,
) -> None:
    """Start each notebook once what it needs has ended, at most ``jobs`` at a time.

    Args:
        why: is called when a notebook could begin; gives the reason for it, None if there is none.
        begin: gets the name, the reason, and how many others run beside it.
        finish: is called when the process has ended. A ``CompendiumError`` of one of the three lets
            those that run come to their end, and nothing more begins.
    """
    needs = {name: set(notebooks[name].declared("needs")) for name in order}

    def urgency(name: str) -> float:
        after = (other for other in order if name in needs[other])
        return notebooks[name].minutes + max(map(urgency, after), default=0.0)

    waiting = sorted(order, key=urgency, reverse=True)  # stable: otherwise by number
    ready: dict[str, str] = {}  # with the reason
    running: list[Job] = []
    failure: CompendiumError | None = None

    def next_fit() -> str | None:
        pending = {*waiting, *ready, *(job.name for job in running)}
        return next((name for name in waiting if pending.isdisjoint(needs[name])), None)

    try:
        while True:
            try:
                while not failure and (name := next_fit()):
                    waiting.remove(name)
                    if reason := why(name):
                        ready[name] = reason
                together = min(jobs, len(running) + len(ready))
                while not failure and ready and len(running) < jobs:
                    name = max(ready, key=urgency)
                    running.append(begin(name, ready.pop(name), together - 1))
            except CompendiumError as error:
                failure = error
            if not running:
                break
            ended = multiprocessing.connection.wait([j.process.sentinel for j in running])
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


def status(project: Project) -> str:
    """A table of the notebooks (fresh or not, and why) and one of the figures."""
    rows = read_manifest(project.figures)
    lines = [f"{'profile ' + project.profile.name:28}{'':8}{'seconds':>8}  why"]
    stale: dict[str, bool] = {}
    for name in project.notebooks:
        state, why = project.state(name), project.why_stale(name)
        stale[name] = why is not None
        mine = [row["code_hash"] for row in rows if row["notebook"] == name]
        if state is None and mine and set(mine) == {project.key(name)}:
            why = "never run here; the committed figures come from this very code"
        condition = "fresh" if why is None else "stale" if state else "new"
        seconds = f"{state['seconds']:.0f}" if state else "-"
        lines.append(f"{name:28}{condition:8}{seconds:>8}  {why or ''}".rstrip())
    lines += ["", f"{'figure or table':36}{'made':18}from"]
    for row in rows:
        files = [project.figures / file for file in row["files"]]
        if all(file.exists() for file in files):
            latest = max(file.stat().st_mtime for file in files)
            made = f"{datetime.fromtimestamp(latest):%Y-%m-%d %H:%M}"
            condition = "stale" if stale.get(row["notebook"]) else "fresh"
        else:
            made, condition = "-", "missing"
        if row["notebook"] not in stale:
            condition = "orphan: there is no such notebook"
        lines.append(f"{row['id']:36}{made:18}{row['notebook']} ({condition})")
    return "\n".join(lines if rows else [*lines, "none yet; make figures"])


def check(project: Project, wanted: Iterable[str] = (), jobs: int = 0) -> int:
    """Execute the notebooks through nbval, each in a pytest process; returns the first bad status.

    Cells marked ``# NBVAL_CHECK_OUTPUT`` are compared with their stored output at every profile,
    those marked ``# REGRESS`` at the published one (``conftest.py``). Figures go to
    ``build/<profile>/check/figures``. What hangs is ended by the limits of :mod:`tools.execute`.

    Raises:
        CompendiumError: another run is in progress.
    """
    notebooks = project.notebooks
    targets = with_needs(notebooks, select(notebooks, wanted) or notebooks)
    checked = Project(project.root, project.profile, output=project.build / "check")
    codes: list[int] = []

    def why(name: str) -> str | None:
        return None if _kept(checked, name) else "checked"

    def begin(name: str, _: str, beside: int) -> Job:
        return execute.begin_check(checked, name, beside)

    def finish(job: Job) -> None:
        print(job.report(), flush=True)
        codes.append(job.process.exitcode)
        execute.publish_figures(job)  # all that it made, for those that need it

    with _alone(project):
        shutil.rmtree(checked.results, ignore_errors=True)
        jobs = jobs or project.profile.side_by_side
        _in_order(notebooks, targets, why, begin, finish, jobs)
    if project.published:
        made = sorted(path.name for path in checked.figures.glob("*.csv"))
        both = checked.figures, project.figures
        same, other, absent = filecmp.cmpfiles(*both, made, shallow=False)
        print(f"{len(same)} of {len(made)} CSVs are byte-identical to figures/")
        print("".join(f"    differs: {name}\n" for name in other + absent), end="")
    return next(filter(None, codes), 0)


@contextlib.contextmanager
def _alone(project: Project) -> Iterator[None]:
    """One run per profile; a file beside the lock says whose it is, or was if it was cut off."""
    holder = project.build / "running"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.lock(project.build / "lock", wait=False))
        except TimeoutError:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "holder unknown"
            raise CompendiumError(
                f"profile {project.profile.name} is being run already ({who}); wait or stop it"
            ) from None
        if holder.exists():
            left = holder.read_text(encoding="utf-8")
            print(f"note: an earlier run ({left}) was cut off; taking over")
        now = datetime.now()
        store.write_atomically(holder, f"process {os.getpid()} since {now:%Y-%m-%d %H:%M}")
        stack.callback(holder.unlink)
        yield


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
    parser.add_argument("--jobs", type=int, default=0, help="notebooks at a time")
    parser.add_argument("--root", type=Path, default=paths.ROOT, help="another compendium")
    options = parser.parse_args(arguments)
    try:
        project = Project(options.root.resolve(), profiles.get(options.profile))
        if options.command == "status":
            print(status(project))
        elif options.command == "check":
            return check(project, options.notebook, options.jobs)
        else:
            run(project, options.notebook, options.jobs)
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
