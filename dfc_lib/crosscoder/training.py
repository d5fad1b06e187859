"""Crosscoders that are trained once: asked for by configuration and data, found or made.

``get_all`` is the one way to get crosscoders: runs are stored under a name that is a hash of
the configuration, the data and the code that decides the weights, so nothing is trained twice and
nothing that would come out differently is kept. ``train`` does the work in a folder of your choice.

A run's folder holds ``sae_weights.safetensors`` + ``cfg.json`` (the crosscoder, see
``checkpoint.load``), ``metrics.csv`` (see ``recipes.Recipe.metrics``), ``run.json`` (the
configuration) and, while it is unfinished, ``state.safetensors`` instead of the first three.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import Timeout
from jaxtyping import Int
from tqdm.auto import tqdm

from dfc_lib import provenance, store
from dfc_lib.crosscoder import loop
from dfc_lib.crosscoder.batches import AnyActivations, Batches
from dfc_lib.crosscoder.checkpoint import load
from dfc_lib.crosscoder.loop import STATE_FILE, TrainConfig, fixed_threads
from dfc_lib.crosscoder.model import Crosscoder

RUN_FILE = "run.json"
LOOP = "dfc_lib.crosscoder.loop"
PENALTIES = {  # what `losses` loads for a configuration's variant
    "published": "dfc_lib.crosscoder.penalty_published",
    "exclusive_only": "dfc_lib.crosscoder.penalty_exclusive_only",
}
Name = TypeVar("Name", bound=Hashable)


def config_key(config: TrainConfig, data_key: str) -> str:
    """The name of a run: a hash of everything that decides its result, code included."""
    code = provenance.code_hash(LOOP, PENALTIES[config.variant])
    return store.key(code, config.to_dict(), data_key)


def run_directory(config: TrainConfig, build_dir: str | Path, data_key: str) -> Path:
    """Where ``get_all`` keeps a run."""
    return Path(build_dir) / "crosscoders" / config_key(config, data_key)


@dataclass(frozen=True, eq=False)
class Job:
    """A crosscoder to be had: what decides its weights, and where its activations come from.

    Attributes:
        activations: as in ``train``, or a function that returns them, called only if needed.
        data_key: identifies activations *and* labels, such as the ``key`` of a cache.
    """

    config: TrainConfig
    activations: AnyActivations | Callable[[], AnyActivations]
    data_key: str
    labels: Int[np.ndarray, " n"] | None = None


def _get(job: Job, build_dir: str | Path, wait: bool) -> Crosscoder:
    """A job's crosscoder: loaded if it was trained, resumed if it was interrupted.

    Raises:
        filelock.Timeout: another process trains it, and ``wait`` is false.
    """
    directory = run_directory(job.config, build_dir, job.data_key)
    if (directory / "cfg.json").is_file() and not (directory / STATE_FILE).is_file():
        return load(directory, device=job.config.device)
    activations = job.activations() if callable(job.activations) else job.activations
    return train(job.config, activations, directory, job.labels, progress=False, wait=wait)


def get_all(
    jobs: Mapping[Name, Job], build_dir: str | Path, workers: int = 1, progress: bool = True
) -> dict[Name, Crosscoder]:
    """Crosscoders by name, kept in ``<build_dir>/crosscoders``; ``workers`` are trained at a time.

    Small products do not gain from a second core, whole runs do. Each small run uses the one thread
    that it would use alone, so its weights are the same (``loop.run``).

    Raises:
        what a run raises, once the runs that had begun have stopped; the others are not begun.
    """
    done = {}
    threads = torch.get_num_threads()
    with (
        fixed_threads(threads),  # else new threads get what a worker has set, from here on too
        ThreadPoolExecutor(
            max(1, min(workers, len(jobs))), initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool,
        tqdm(total=len(jobs), unit=" crosscoders", disable=not progress) as bar,
    ):

        def get(names: Iterable[Name], wait: bool) -> list[Name]:
            """Fill ``done``; gives the names of those that another process is training."""
            asked, elsewhere = {}, []
            for name in names:
                asked[pool.submit(_get, jobs[name], build_dir, wait)] = name
            for future in as_completed(asked):
                try:
                    done[asked[future]] = future.result()
                    bar.update()
                except Timeout:
                    elsewhere.append(asked[future])
            return elsewhere

        try:
            # What another process is at comes last, so that two that want the same take turns.
            get(get(jobs, wait=False), wait=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: done[name] for name in jobs}


def train(
    config: TrainConfig,
    activations: AnyActivations,
    out_dir: str | Path,
    labels: Int[np.ndarray, " n"] | None = None,
    progress: bool = True,
    wait: bool = True,
) -> Crosscoder:
    """Train a crosscoder, or finish a run that was interrupted; returned as ``load`` reads it.

    One process at a time: a second one waits, and then finds the run finished.

    Args:
        activations: raw, ``(n, n_models, d_model)``: a tensor or an ``ActivationSource``.
        out_dir: the run's folder. A finished run of the same configuration is returned as it is.
        labels: the dataset of each sample, whole numbers; used by ``zscore_unstored`` only.
        wait: for another process in this folder.

    Raises:
        filelock.Timeout: there is such a process, and ``wait`` is false.
        ValueError: the shapes do not fit, or ``out_dir`` holds another run or is damaged.
        FloatingPointError: the loss is no longer finite.
    """
    directory = Path(out_dir)
    batches = Batches(config, activations, labels)
    with store.lock(directory.with_name(f".{directory.name}.lock"), wait):
        _claim(directory, config)
        if not (directory / "cfg.json").is_file():
            loop.run(config, batches, directory, progress)
        # What a finished run no longer needs, and what a kill in mid-write left behind.
        for path in (directory / STATE_FILE, *directory.glob(f".{STATE_FILE}.*.tmp")):
            path.unlink(missing_ok=True)
    return load(directory, device=config.device)


def _claim(directory: Path, config: TrainConfig) -> None:
    """Make the folder this configuration's, or check that it is."""
    path, content = directory / RUN_FILE, json.dumps(config.to_dict(), indent=2) + "\n"
    if not path.is_file() and not (directory / "cfg.json").is_file():
        store.write_atomically(path, content)
    elif not path.is_file() or path.read_text() != content:
        raise ValueError(
            f"{directory} holds another run, or its {RUN_FILE} is missing or damaged; choose "
            "another out_dir, or delete it to start again"
        )
