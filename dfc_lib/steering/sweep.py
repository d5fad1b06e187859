"""The sweep of arXiv 2606.26474: 48 crosscoders, each trained, evaluated and put down as one row.

``grid`` is the published design as data, ``train_config`` scales a run to a profile. ``run_one`` is
the task: get the crosscoder, pass both models through it at the last prompt token, read how likely
they are to act. ``sweep`` runs the tasks. Finished runs are on disk, whole or not at all: killing a
sweep loses the run in flight and no other.

The outcome is the propensity, from the first generated token alone: nothing is generated, so a run
costs little more than its training.

Conditions: ``calibrated`` (through the stored Normaliser); ``raw`` (raw activations in, raw out, as
in the published evaluation); for the base also ``own`` (calibrated, encoded from the base alone,
A's stream at its mean).
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfc_lib import provenance, store
from dfc_lib.crosscoder import fidelity, recipes, training
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Partition
from dfc_lib.crosscoder.training import Job, TrainConfig
from dfc_lib.data.activations import Activations
from dfc_lib.data.pair import fingerprint
from dfc_lib.data.prompts import Record
from dfc_lib.profiles import Profile
from dfc_lib.steering import interventions
from dfc_lib.steering.interventions import Codec, Composed, Intervention, Reconstruction, Site
from dfc_lib.steering.prefix import PrefixCache
from dfc_lib.study import Study

PUBLISHED = {"d_model": 2_048, "k": 90, "steps": 9_000, "batch": 1_024, "vectors": 80_000}
WIDTHS, KS, SHARES, COEF = (4, 8), (45, 90, 160), (0.03, 0.05, 0.10), 1e-3
TESTED = (0.05, 0.10)  # the shares at which the study compares free with penalised
CONDITIONS = {"A": ("calibrated", "raw"), "B": ("calibrated", "raw", "own")}
OUTCOMES = ("propensity", "margin", "delta")
RATIOS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # ||delta|| / ||h|| of the random patches
N_DRAWS = 8  # random directions per ratio
THREADS = 1  # of one task, wherever it runs


# -- the grid


@dataclass(frozen=True)
class Run:
    """One crosscoder, in published units.

    Attributes:
        width: dictionary size / d_model.
        k: active features per vector, at d_model 2048.
        share: of the dictionary, for each model alone; 0 is the plain crosscoder.
        shared_coef, exclusive_coef: L1 penalties.
        seed: of the weights and of the order of the data.
        tie_shared: one decoder row per shared feature for both models (not in the published grid).
        anchored: by the recipe that gives an exclusive block something to do, see
            ``recipes.Recipe`` (not in the published grid either).
    """

    width: int
    k: int
    share: float
    shared_coef: float
    exclusive_coef: float
    seed: int = 0
    tie_shared: bool = False
    anchored: bool = False

    @property
    def regime(self) -> str:
        """What kind of crosscoder, and what is penalised."""
        if self.share:
            return "DFC, penalised" if self.exclusive_coef else "DFC, free"
        return "plain, L1" if self.shared_coef else "plain"

    @property
    def name(self) -> str:
        """For file names and tables; different for different runs."""
        penalties = f"s{self.shared_coef:g}-e{self.exclusive_coef:g}-seed{self.seed}"
        tied = "-anchored" if self.anchored else "-tied" if self.tie_shared else ""
        return f"D{self.width}x-k{self.k}-excl{100 * self.share:g}-{penalties}{tied}"


def grid() -> list[Run]:
    """The 48 runs. As published, only the plain one without L1 leaves the shared block free."""
    regimes = [(0.0, 0.0, 0.0), (0.0, COEF, 0.0)]
    regimes += [(share, COEF, exclusive) for share in SHARES for exclusive in (0.0, COEF)]
    return [Run(width, k, *regime) for width in WIDTHS for k in KS for regime in regimes]


def grid_in_final() -> list[Run]:
    """What the setting *final* gets of them, for its spillover: plain with L1 and DFCs with free
    exclusive blocks, the larger ones also with tied shared rows, which the published grid lacks.
    """
    runs = [r for r in grid() if r.regime == "plain, L1"]
    dfcs = [r for r in grid() if r.regime == "DFC, free" and r.share in TESTED]
    return runs + dfcs + [replace(r, tie_shared=True) for r in dfcs if r.share == max(TESTED)]


def train_config(run: Run, profile: Profile, d_model: int) -> TrainConfig:
    """A run scaled to a profile, in the calibrated protocol.

    D follows d_model as published; k is scaled so that the published middle value, 90, becomes the
    profile's. A CPU gets half the steps: one training then stays within five seconds on two cores.
    """
    size = run.width * d_model
    steps = profile.steps // (2 if profile.device == "cpu" else 1)
    tied = recipes.anchored(steps) if run.anchored else {"tie_shared": run.tie_shared}
    return recipes.train_config(
        profile,
        Partition.dedicated(size, run.share) if run.share else Partition.plain(size),
        k=max(1, round(run.k * profile.k / PUBLISHED["k"])),
        steps=steps,
        shared_coef=run.shared_coef,
        exclusive_coef=run.exclusive_coef,
        seed=run.seed,
        **tied,
    )


def design(run: Run, profile: Profile, d_model: int) -> dict[str, Any]:
    """What a run is here and, with ``_published`` in the name, what it is in the study."""
    config = train_config(run, profile, d_model)
    sizes = {"": config.partition.dict_size, "_published": run.width * PUBLISHED["d_model"]}
    row = {"run": run.name, "regime": run.regime, "share": run.share, "tied": run.tie_shared}
    row |= {"seed": run.seed}
    row |= {"shared_coef": run.shared_coef, "exclusive_coef": run.exclusive_coef}
    row |= {f"D{which}": size for which, size in sizes.items()}
    row |= {"k": config.k, "k_published": run.k}
    row |= {f"exclusive{which}": int(size * run.share) for which, size in sizes.items()}
    return row | {"steps": config.steps, "batch": config.batch_size}


# -- what all runs share, read once per process


def records(study: Study) -> list[Record]:
    """The prompts that runs are evaluated on: gold call, tools seen."""
    return study.calls("evaluation", study.profile.n_evaluation)


@cache
def prefix_cache(study: Study) -> PrefixCache:
    """The evaluation prompts, read once for all runs."""
    return PrefixCache(study.pair, study.ids(records(study)), study.profile.batch_reading)


@cache
def vectors(study: Study) -> Activations:
    """What the crosscoders learn from: the last tokens of tool prompts and of neutral texts."""
    return study.cache("train_last")


@cache
def folder(study: Study) -> Path:
    """Where results lie; named by all that they depend on, but for the run's own settings."""
    profile, pair = study.profile, study.pair
    key = [provenance.code_hash(__name__), pair.layer, profile.dtype]
    key += [vectors(study).key, study.ids(records(study))]
    key += [fingerprint(model) for model in pair.models.values()]
    return study.build / "sweep" / store.key(*key)


def job(run: Run, study: Study) -> Job:
    """How the crosscoder of a run is had."""
    config = train_config(run, study.profile, study.pair.d_model)
    return Job(config, vectors(study).to_tensor, vectors(study).key)


def result_path(run: Run, study: Study) -> Path:
    """The file that says that a run is finished; its outcomes lie beside it as parquet."""
    wanted = job(run, study)
    key = training.config_key(wanted.config, wanted.data_key)
    return folder(study) / f"{run.name}-{key}.json"


# -- the task

Result = tuple[dict[str, Any], pd.DataFrame]


def measure(
    study: Study,
    target: str,
    cells: Mapping[Hashable, Intervention],
    levels: Sequence[str] = ("condition",),
) -> pd.DataFrame:
    """How likely a model is to act under interventions at the last prompt token.

    Args:
        cells, levels: as for ``Study.run``.

    Returns:
        one line per (cell, prompt), cells outermost: ``target``, ``levels``, ``prompt``,
        ``propensity``, ``margin`` (nats), ``delta`` (||delta|| / ||h||).
    """
    options = {"prefix_cache": prefix_cache(study), "out_dir": None, "progress": False}
    outcomes = study.propensity(cells, records(study), target, levels=levels, **options)
    by_cell = outcomes.assign(target=target).groupby(list(levels), sort=False, dropna=False)
    columns = ["target", *levels, "prompt", *OUTCOMES]
    return pd.concat([part for _, part in by_cell], ignore_index=True)[columns]


def reconstructions(crosscoder: Crosscoder, target: str) -> dict[str, Intervention]:
    """A model through the crosscoder, under each condition."""
    codecs = {"calibrated": Codec(crosscoder), "raw": Codec(crosscoder, "published")}
    codecs["own"] = Codec(crosscoder, encoding="own")
    return {name: Reconstruction(codecs[name]) for name in CONDITIONS[target]}


@training.fixed_threads(THREADS)
def run_one(run: Run, study: Study) -> Result:
    """Train (or find trained) and evaluate one run.

    Returns:
        its row (``design``, ``describe``, and the mean of every measure as
        ``<target>_<condition>_<measure>``); its outcomes prompt by prompt (``measure``).
    """
    crosscoder = study.train({run: job(run, study)}, progress=False)[run]
    frames = [measure(study, t, reconstructions(crosscoder, t)) for t in study.pair.names]
    outcomes = pd.concat(frames, ignore_index=True)
    row = design(run, study.profile, study.pair.d_model) | describe(crosscoder, study)
    grouped = outcomes.groupby(["target", "condition"], sort=False)[list(OUTCOMES)]
    for (target, condition), values in grouped.mean().iterrows():
        row |= {f"{target}_{condition}_{name}": value for name, value in values.items()}
    return row, outcomes


@torch.no_grad()
def describe(crosscoder: Crosscoder, study: Study) -> dict[str, float]:
    """What a crosscoder explains, and how much its blocks are used.

    On the training vectors: ``mse`` (normalised units, both models), ``fve_<model>``,
    ``l0_<block>``, ``dead_<block>``. On the evaluation prompts: ``prompt_mse_<model>``,
    ``prompt_fve_<model>``, ``prompt_l0_<block>``.
    """
    x, row, partition = vectors(study).to_tensor(), {}, crosscoder.partition
    on_vectors = fidelity.fidelity(crosscoder, x).set_index("name")
    row |= {f"fve_{name}": on_vectors.fve[name] for name in partition.model_names}
    row |= {f"l0_{name}": on_vectors.l0[name] for name in partition.names}
    row |= {f"dead_{name}": on_vectors.dead_share[name] for name in partition.names}
    row["mse"] = float(_error(crosscoder, x)[1].square().mean())
    h = prefix_cache(study).h
    z, error = _error(crosscoder, h)
    fve = 1 - error.square().sum((0, 2)) / (z - z.mean(0)).square().sum((0, 2))
    for t, name in enumerate(study.pair.names):
        row[f"prompt_fve_{name}"] = float(fve[t])
        row[f"prompt_mse_{name}"] = float(error[:, t].square().mean())
    active = crosscoder.encode(h) > 0
    for block in partition.names:
        row[f"prompt_l0_{block}"] = float(active[:, partition.slice(block)].sum(1).float().mean())
    return row


def _error(crosscoder: Crosscoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and what a crosscoder misses of them, both in normalised units."""
    z, z_hat = (crosscoder.normaliser.apply(h) for h in (x, crosscoder.reconstruct(x)))
    return z, z_hat - z


# -- what no crosscoder enters


@dataclass(frozen=True, eq=False)
class Stretched(Composed):
    """Another intervention's change, ``factor`` times as long."""

    like: Intervention
    factor: float

    def delta(self, site: Site) -> Tensor:
        return self.factor * self.like.delta(site)


@training.fixed_threads(THREADS)
def baselines(study: Study) -> pd.DataFrame:
    """Outcomes (``measure``, levels ``condition``, ``ratio``, ``draw``) of both models left alone
    (``clean``), under the ``other model``'s activation, under mean patches (``tool mean``,
    ``neutral mean``: of the training vectors) and under ``random`` patches, N_DRAWS of each ratio
    ||delta|| / ||h||; ``ratio`` and ``draw`` are NaN elsewhere. Made once, then read.
    """
    path = folder(study) / "baselines.parquet"
    if path.is_file():
        return pd.read_parquet(path)
    x, frames = vectors(study).to_tensor(), []
    nothing_left = interventions.Patch(torch.zeros(study.pair.d_model))  # a change as long as h
    for t, target in enumerate(study.pair.names):
        cells = {"clean": interventions.Clean(), "other model": interventions.OtherModel(1 - t)}
        for source in ("tool", "neutral"):
            chosen = vectors(study).where(source=source)
            cells[f"{source} mean"] = interventions.Patch(x[chosen, t].mean(0))
        for ratio in RATIOS:
            like = Stretched(nothing_left, ratio)
            drawn = interventions.random_directions(like, N_DRAWS, study.pair.d_model)
            cells |= {("random", ratio, draw): cell for draw, cell in enumerate(drawn)}
        frames.append(measure(study, target, cells, ("condition", "ratio", "draw")))
    outcomes = pd.concat(frames, ignore_index=True)
    store.write_atomically(path, outcomes.to_parquet(index=False))
    return outcomes


# -- many runs

Runner = Callable[[Sequence[Run], Study], Iterator[tuple[Run, Result]]]


def in_process(runs: Sequence[Run], study: Study) -> Iterator[tuple[Run, Result]]:
    """Here: as many as there are cores are trained side by side, then evaluated in turn."""
    at_once = study.profile.side_by_side
    for i in range(0, len(runs), at_once):
        beside = runs[i : i + at_once]
        study.train({run: job(run, study) for run in beside}, progress=False)
        yield from ((run, run_one(run, study)) for run in beside)


def sweep(
    runs: Sequence[Run], study: Study, runner: Runner = in_process, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run what is not finished, read everything, in the order of ``runs``.

    Args:
        runner: yields every run that it is given with the result of ``run_one``, in any order.

    Returns:
        the rows; the outcomes (``measure``, with a column ``run``).
    """
    paths = {run: result_path(run, study) for run in runs}
    todo = [run for run, path in paths.items() if not path.is_file()]
    done = len(runs) - len(todo)
    with tqdm(total=len(runs), initial=done, unit=" runs", disable=not progress) as bar:
        for run, (row, outcomes) in runner(todo, study) if todo else ():
            table = outcomes.to_parquet(index=False)
            store.write_atomically(paths[run].with_suffix(".parquet"), table)
            # Last: it marks the run as finished.
            store.write_atomically(paths[run], json.dumps(row, indent=1) + "\n")
            bar.update()
    rows = pd.DataFrame([json.loads(path.read_text()) for path in paths.values()])
    outcomes = {run.name: pd.read_parquet(p.with_suffix(".parquet")) for run, p in paths.items()}
    return rows, pd.concat(outcomes, names=["run"]).reset_index(level=0)
