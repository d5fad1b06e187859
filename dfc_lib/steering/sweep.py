"""The sweep of arXiv 2606.26474: 48 crosscoders, each trained, evaluated and put down as one row.

``grid`` is the published design as data, ``train_config`` scales a run to a profile. ``run_one`` is
the task: train (through ``training.get_or_train``), pass both models through the crosscoder at the
last prompt token, score what they do. ``sweep`` runs the tasks in process or on a Ray cluster.
Finished runs are on disk, whole or not at all: killing a sweep loses the run in flight and no
other. ``python -m dfc_lib.steering.sweep`` is ``make sweep``.

Conditions: ``calibrated`` (through the stored Normaliser); ``raw`` (raw activations in, raw out, as
in the published evaluation); for the base also ``own`` (calibrated, encoded from the base alone,
A's stream at its mean).
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dfc_lib import paths, profiles, store
from dfc_lib.crosscoder import training
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Partition
from dfc_lib.crosscoder.training import TrainConfig
from dfc_lib.data import corpora, prompts
from dfc_lib.data.activations import Activations
from dfc_lib.data.pair import fingerprint, load_pair
from dfc_lib.profiles import Profile
from dfc_lib.steering import evaluation, interventions
from dfc_lib.steering.generation import PrefixCache
from dfc_lib.steering.interventions import Codec, Intervention, Reconstruction, Site

SWEEP_VERSION = 2  # raise it when the same run would give another row
PUBLISHED = {"d_model": 2_048, "k": 90, "steps": 9_000, "batch": 1_024, "vectors": 80_000}
WIDTHS, KS, SHARES, COEF = (4, 8), (45, 90, 160), (0.03, 0.05, 0.10), 1e-3
CONDITIONS = {"A": ("calibrated", "raw"), "B": ("calibrated", "raw", "own")}
RATES = ("lenient", "strict", "format", "name")
RATIOS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # ||delta|| / ||h|| of the random patches
N_DRAWS = 8  # random directions per ratio
N_GENERATED = 128  # prompts that are generated for, at most; the margin is read on all
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
    """

    width: int
    k: int
    share: float
    shared_coef: float
    exclusive_coef: float
    seed: int = 0
    tie_shared: bool = False

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
        tied = "-tied" if self.tie_shared else ""
        return f"D{self.width}x-k{self.k}-excl{100 * self.share:g}-{penalties}{tied}"


def grid() -> list[Run]:
    """The 48 runs. As published, only the plain one without L1 leaves the shared block free."""
    regimes = [(0.0, 0.0, 0.0), (0.0, COEF, 0.0)]
    regimes += [(share, COEF, exclusive) for share in SHARES for exclusive in (0.0, COEF)]
    return [Run(width, k, *regime) for width in WIDTHS for k in KS for regime in regimes]


def train_config(run: Run, profile: Profile, d_model: int) -> TrainConfig:
    """A run scaled to a profile, in the calibrated protocol.

    D follows d_model as published; k is scaled so that the published middle value, 90, becomes the
    profile's. A CPU gets half the steps: one training then stays within five seconds on two cores.
    """
    size = run.width * d_model
    return TrainConfig(
        Partition.dedicated(size, run.share) if run.share else Partition.plain(size),
        k=max(1, round(run.k * profile.k / PUBLISHED["k"])),
        tie_shared=run.tie_shared,
        steps=profile.steps // (2 if profile.device == "cpu" else 1),
        batch_size=profile.batch_size,
        lr=profile.learning_rate,
        shared_coef=run.shared_coef,
        exclusive_coef=run.exclusive_coef,
        device=profile.device,
        seed=run.seed,
    )


def design(run: Run, profile: Profile, d_model: int) -> dict[str, Any]:
    """What a run is here and, with ``_published`` in the name, what it is in the study."""
    config = train_config(run, profile, d_model)
    sizes = {"": config.partition.dict_size, "_published": run.width * PUBLISHED["d_model"]}
    row = {"run": run.name, "regime": run.regime, "share": run.share, "seed": run.seed}
    row |= {"shared_coef": run.shared_coef, "exclusive_coef": run.exclusive_coef}
    row |= {f"D{which}": size for which, size in sizes.items()}
    row |= {"k": config.k, "k_published": run.k}
    row |= {f"exclusive{which}": int(size * run.share) for which, size in sizes.items()}
    return row | {"steps": config.steps, "batch": config.batch_size}


# -- what all runs share, read once per process


class Bench:
    """A profile's models, training vectors and evaluation prompts (gold call, tools seen)."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.build = profile, paths.build(profile.name)
        sources = {"A": profile.location(profile.model_a), "B": profile.location(profile.model_b)}
        dtype = getattr(torch, profile.dtype)
        self.pair = load_pair(sources, profile.layer, dtype=dtype, device=profile.device)
        self.vectors = Activations.open(self.build / "activations" / "train_last")
        records = corpora.records(profile, "evaluation")
        calls = [r for r in records if r.kind == "call" and not r.held_out]
        self.records = calls[: profile.n_evaluation]
        self.n_generated = min(N_GENERATED, profile.n_steering, len(self.records))
        tokenizer, style = self.pair.tokenizer, prompts.FIXED_STYLE
        texts = [prompts.chat_text(tokenizer, record, style) for record in self.records]
        self.ids = prompts.encode(tokenizer, texts)
        settings = [SWEEP_VERSION, THREADS, RATIOS, N_DRAWS, self.n_generated, profile.layer]
        settings += [profile.dtype, profile.max_new_tokens, self.vectors.key, self.ids]
        settings += [fingerprint(model) for model in self.pair.models.values()]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.folder = self.build / "sweep" / key  # named by all that a result depends on

    @cached_property
    def x(self) -> Float[Tensor, "vector model d_model"]:
        """What the crosscoders learn from: the last tokens of tool prompts and of neutral texts."""
        return self.vectors.to_tensor()

    @cached_property
    def prefix_cache(self) -> PrefixCache:
        """The evaluation prompts, read once for all runs."""
        return PrefixCache(self.pair, self.ids, self.profile.batch_generation)

    @property
    def h(self) -> Float[Tensor, "prompt model d_model"]:
        """Residuals at the last token of the evaluation prompts."""
        return self.prefix_cache.h

    def path(self, run: Run) -> Path:
        """The file that says that a run is finished; its outcomes lie beside it as parquet."""
        config = train_config(run, self.profile, self.pair.d_model)
        key = training.config_key(config, self.vectors.key)
        return self.folder / f"{run.name}-{key}.json"


@cache
def open_bench(profile: Profile) -> Bench:
    """One per process and profile."""
    return Bench(profile)


# -- the task

Result = tuple[dict[str, Any], pd.DataFrame, dict[str, float]]


def measure(bench: Bench, target: str, cells: Mapping[str, Intervention]) -> pd.DataFrame:
    """What a model does under interventions at the last prompt token.

    Returns:
        one line per (condition, prompt): ``target``, ``condition``, ``prompt``, ``margin`` (nats),
        ``delta`` (||delta|| / ||h||), and the rates, NaN where the prompt was not generated for.
    """
    n, frames = bench.n_generated, []
    for records, length in (
        (bench.records[:n], bench.profile.max_new_tokens),
        (bench.records[n:], 1),  # of these only the first token's margin is wanted
    ):
        if records:
            frame = evaluation.intervene(
                bench.pair,
                target,
                records,
                cells,
                max_new_tokens=length,
                batch_size=4 * bench.profile.batch_generation,
                prefix_cache=bench.prefix_cache,
                progress=False,
            )
            frames.append(frame)
    frames[1:] = [f.assign(prompt=f.prompt + n, **dict.fromkeys(RATES, np.nan)) for f in frames[1:]]
    found = pd.concat(frames).rename(columns={"cell": "condition"}).assign(target=target)
    columns = ["target", "condition", "prompt", "margin", "delta", *RATES]
    order = {name: i for i, name in enumerate(cells)}
    by_cell = found.sort_values("condition", key=lambda c: c.map(order), kind="stable")
    return by_cell[columns].reset_index(drop=True)


def reconstructions(crosscoder: Crosscoder, target: str) -> dict[str, Intervention]:
    """A model through the crosscoder, under each condition."""
    codecs = {"calibrated": Codec(crosscoder), "raw": Codec(crosscoder, "published")}
    codecs["own"] = Codec(crosscoder, encoding="own")
    return {name: Reconstruction(codecs[name]) for name in CONDITIONS[target]}


def trained(run: Run, bench: Bench, progress: bool = False) -> Crosscoder:
    """The crosscoder of a run, by ``training.get_or_train``."""
    config = train_config(run, bench.profile, bench.pair.d_model)
    key = bench.vectors.key
    return training.get_or_train(config, lambda: bench.x, bench.build, key, progress=progress)


@training.fixed_threads(THREADS)
def run_one(run: Run, bench: Bench) -> Result:
    """Train and evaluate one run.

    Returns:
        its row (``design``, ``fidelity``, and the mean of every measure as
        ``<target>_<condition>_<measure>``), its outcomes prompt by prompt (``measure``), seconds.
    """
    start = time.perf_counter()
    crosscoder = trained(run, bench)
    ready = time.perf_counter()
    frames = [measure(bench, t, reconstructions(crosscoder, t)) for t in bench.pair.names]
    outcomes = pd.concat(frames, ignore_index=True)
    row = design(run, bench.profile, bench.pair.d_model) | fidelity(crosscoder, bench)
    grouped = outcomes.groupby(["target", "condition"], sort=False)[["margin", "delta", *RATES]]
    for (target, condition), values in grouped.mean().iterrows():
        row |= {f"{target}_{condition}_{name}": value for name, value in values.items()}
    return row, outcomes, {"train": ready - start, "evaluate": time.perf_counter() - ready}


@torch.no_grad()
def fidelity(crosscoder: Crosscoder, bench: Bench) -> dict[str, float]:
    """``fve_<model>``, ``l0_<block>``, ``dead_<block>`` on the training vectors;
    ``prompt_fve_<model>``, ``mse_<model>`` (normalised units) on the evaluation prompts."""
    found, partition = {}, crosscoder.partition
    on_vectors = training.fidelity(crosscoder, bench.x).set_index("name")
    found |= {f"fve_{name}": on_vectors.fve[name] for name in partition.model_names}
    found |= {f"l0_{name}": on_vectors.l0[name] for name in partition.names}
    found |= {f"dead_{name}": on_vectors.dead_share[name] for name in partition.names}
    z, z_hat = (crosscoder.normaliser.apply(h) for h in (bench.h, crosscoder.reconstruct(bench.h)))
    error = (z_hat - z).square()
    fve = 1 - error.sum((0, 2)) / (z - z.mean(0)).square().sum((0, 2))
    for t, name in enumerate(bench.pair.names):
        found |= {f"prompt_fve_{name}": float(fve[t]), f"mse_{name}": float(error[:, t].mean())}
    return found


# -- what no crosscoder enters


@dataclass(frozen=True, eq=False)
class Scaled(Intervention):
    """h + ratio h: gives random patches a length, ||delta|| / ||h|| = ratio."""

    ratio: float
    reads_others = False

    def delta(self, site: Site) -> Tensor:
        return self.ratio * site.own


@training.fixed_threads(THREADS)
def baselines(bench: Bench) -> pd.DataFrame:
    """Outcomes (``measure``) of both models left alone (``clean``), under the ``other model``'s
    activation, under mean patches (``tool mean``, ``neutral mean``: of the training vectors) and
    under random patches, ``random|<ratio>|<draw>``. Made once, then read.
    """
    path, d_model = bench.folder / "baselines.parquet", bench.pair.d_model
    if path.is_file():
        return pd.read_parquet(path)
    frames = []
    for t, target in enumerate(bench.pair.names):
        cells = {"clean": interventions.Clean(), "other model": interventions.OtherModel(1 - t)}
        for source in ("tool", "neutral"):
            mean = bench.x[bench.vectors.where(source=source), t].mean(0)
            cells[f"{source} mean"] = interventions.Patch(mean)
        for ratio in RATIOS:
            drawn = interventions.random_directions(Scaled(ratio), N_DRAWS, d_model)
            cells |= {f"random|{ratio:g}|{i}": cell for i, cell in enumerate(drawn)}
        frames.append(measure(bench, target, cells))
    found = pd.concat(frames, ignore_index=True)
    store.write_atomically(path, found.to_parquet(index=False))
    return found


# -- many runs

Runner = Callable[[Sequence[Run], Profile], Iterator[tuple[Run, Result]]]


def in_process(runs: Sequence[Run], profile: Profile) -> Iterator[tuple[Run, Result]]:
    """Here: as many as there are cores are trained side by side, then evaluated in turn.

    The seconds of training that it gives are the time that passed, shared out among those runs.
    """
    bench, at_once = open_bench(profile), profile.side_by_side
    for i in range(0, len(runs), at_once):
        some, start = runs[i : i + at_once], time.perf_counter()
        makers = {run: partial(trained, run, bench) for run in some}
        training.get_all(makers, at_once, progress=False)
        each = (time.perf_counter() - start) / len(some)
        for run in some:
            row, outcomes, seconds = run_one(run, bench)
            yield run, (row, outcomes, seconds | {"train": each + seconds["train"]})


def on_ray(runs: Sequence[Run], profile: Profile) -> Iterator[tuple[Run, Result]]:
    """On the Ray cluster at ``RAY_ADDRESS``, or a local one; the tasks of a lost node run again.

    Every node needs this compendium, its environment and its build folder at the same paths (a
    shared file system): a task that runs again finds there how far its training had come.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("the Ray runner needs: pip install -e '.[cluster]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A task that fits on no node would wait for ever.
    most = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    needs = {"num_cpus": min(THREADS, most), "num_gpus": int(profile.device == "cuda")}
    remote = ray.remote(max_retries=5, **needs)(in_worker)
    waiting = {remote.remote(run, profile, str(paths.build_root())): run for run in runs}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)


def in_worker(run: Run, profile: Profile, build_root: str) -> Result:
    """``run_one`` in a process of Ray's, which reads what runs share when its first task comes."""
    os.environ["DFC_BUILD"] = build_root
    return run_one(run, open_bench(profile))


def sweep(
    runs: Sequence[Run], profile: Profile, runner: Runner = in_process, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Run what is not finished, read everything, in the order of ``runs``.

    Returns:
        the rows; the outcomes (``measure``, with a column ``run``); the seconds of each run.
    """
    path = open_bench(profile).path
    todo = [run for run in runs if not path(run).is_file()]
    done = len(runs) - len(todo)
    with tqdm(total=len(runs), initial=done, unit=" runs", disable=not progress) as bar:
        for run, (row, outcomes, seconds) in runner(todo, profile) if todo else ():
            table = outcomes.to_parquet(index=False)
            store.write_atomically(path(run).with_suffix(".parquet"), table)
            content = json.dumps({"row": row, "seconds": seconds}, indent=1)
            store.write_atomically(path(run), content + "\n")  # last: it marks the run as finished
            bar.update()
    finished = [json.loads(path(run).read_text()) for run in runs]
    outcomes = [pd.read_parquet(path(run).with_suffix(".parquet")) for run in runs]
    return (
        pd.DataFrame([one["row"] for one in finished]),
        pd.concat(outcomes, keys=[run.name for run in runs], names=["run"]).reset_index(level=0),
        pd.DataFrame([{"run": one["row"]["run"], **one["seconds"]} for one in finished]),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dfc_lib.steering.sweep", description=__doc__)
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--ray", action="store_true", help="on the cluster at RAY_ADDRESS, or here")
    options, start = parser.parse_args(arguments), time.perf_counter()
    try:
        bench = open_bench(profiles.load(options.profile))
        print("about ten minutes at toy on two cores; finished runs are skipped", flush=True)
        baselines(bench)
        rows, _, seconds = sweep(grid(), bench.profile, on_ray if options.ray else in_process)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    minutes = (time.perf_counter() - start) / 60
    means = seconds[["train", "evaluate"]].mean().round(1).to_dict()
    print(f"{len(rows)} runs, {minutes:.1f} minutes this time; mean seconds per run: {means}")
    print(f"results: {bench.folder}")
    return 0


if __name__ == "__main__":
    from dfc_lib.steering import sweep as module

    sys.exit(module.main())
