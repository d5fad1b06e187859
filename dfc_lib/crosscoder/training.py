"""One training run: a configuration and activations in, a checkpoint and a table of metrics out.

``get_or_train`` is the one way to get a crosscoder: runs are stored under a name that is a hash of
the configuration and the data, so nothing is trained twice. ``train`` does the work. It can be
killed at any moment and called again: the order of the data is a pure function of (seed, step),
everything else that changes is in one state file that is replaced whole, and on a CPU the final
weights come out identical to the last bit (same machine, and for large crosscoders same number of
threads; see ``_threads``). ``get_all`` gets many, several side by side.

A run's folder holds ``sae_weights.safetensors`` + ``cfg.json`` (the crosscoder, see
``dfc_lib.crosscoder.load``), ``metrics.csv``, ``run.json`` (the configuration) and, while it is
unfinished, ``state.safetensors``.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from dfc_lib.crosscoder.checkpoint import load
from dfc_lib.crosscoder.model import (
    VARIANTS,
    Crosscoder,
    Forward,
    TrainingCrosscoder,
    Variant,
    save_tensors,
    weigh,
)
from dfc_lib.crosscoder.partition import Normaliser, Partition, iterate_batches
from dfc_lib.store import lock, write_atomically

TRAINING_VERSION = 2  # raise it when the same configuration would train to different weights
# Up to this many multiplications per encoder product, one thread is as good as two: see _threads.
ONE_THREAD = 2**28
STATE_FILE, RUN_FILE, METRICS_FILE = "state.safetensors", "run.json", "metrics.csv"


@runtime_checkable
class ActivationSource(Protocol):
    """Activations that are not one array: ``n`` samples by index (a cache of ``activations``)."""

    n: int

    def gather(
        self, indices: Int64[np.ndarray, " batch"]
    ) -> Float[Tensor, "batch model d_model"]: ...


AnyActivations = (
    Float[Tensor, "n model d_model"] | Float[np.ndarray, "n model d_model"] | ActivationSource
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights of a run, given the activations.

    Attributes:
        partition: blocks of features and the models they belong to; its size is the dictionary's.
        k: active features per sample.
        batchtopk: select ``k * batch_size`` features over the batch, not ``k`` per sample.
        tie_shared: one decoder row per shared feature for all models; the encoder stays free.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding.
        steps, batch_size: length of the run; an epoch is a fresh permutation, and batches run
            across its end.
        lr, warmup_steps, decay_steps: of Adam; linear from 0 at the start, linear to 0 at the end.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        shared_coef, exclusive_coef, variant: sparsity penalties, see ``Crosscoder.loss``.
        aux_coef, aux_k: auxiliary loss for dead features (none in ``published``); ``aux_k`` dead
            features per sample take part, 0 means ``2 * k``.
        dead_steps: a feature that has not fired for this many steps counts as dead.
        decoder_init_norm: initial norm of a feature's decoder row, over all models.
        normalise: ``per_model_scalar`` fits a ``Normaliser`` and stores it (calibrated protocol);
            ``zscore_unstored`` z-scores every dimension per dataset and model in training and
            stores nothing (published protocol).
        seed: of the initial weights and of the order of the data.
        log_every: steps between rows of ``metrics.csv`` (the first and the last step always have
            one).
        checkpoint_every: steps between writes of the state file; does not change the weights.
        dtype: ``float32`` or ``float64``.
        device: where to train; the checkpoint can be loaded anywhere.
    """

    partition: Partition
    k: int
    batchtopk: bool = False
    tie_shared: bool = False
    apply_b_dec_to_input: bool = False
    steps: int = 1500
    batch_size: int = 512
    lr: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int = 0
    clip_norm: float = 1.0
    shared_coef: float = 0.0
    exclusive_coef: float = 0.0
    variant: Variant = "exclusive_only"
    aux_coef: float = 1 / 32
    aux_k: int = 0
    dead_steps: int = 250
    decoder_init_norm: float = 0.3
    normalise: Literal["per_model_scalar", "zscore_unstored"] = "per_model_scalar"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"

    def __post_init__(self):
        choices = {
            "variant": VARIANTS,
            "normalise": ("per_model_scalar", "zscore_unstored"),
            "dtype": ("float32", "float64"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)!r}; use one of {allowed}"
                )
        for name in ("k", "steps", "batch_size", "dead_steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.k > self.partition.dict_size:
            raise ValueError(
                f"TrainConfig.k is {self.k}, more than the {self.partition.dict_size} features"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self) | {"partition": self.partition.to_dict()}

    def learning_rate(self, step: int) -> float:
        """Adam's learning rate at a step, counted from 0."""
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        down = min(1.0, (self.steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return self.lr * up * down


def config_key(config: TrainConfig, data_key: str) -> str:
    """The name of a run: a hash of everything that decides its result."""
    content = config.to_dict()
    for name in ("device", "checkpoint_every"):
        del content[name]
    text = json.dumps([TRAINING_VERSION, content, data_key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def get_or_train(
    config: TrainConfig,
    activations: AnyActivations | Callable[[], AnyActivations],
    build_dir: str | Path,
    data_key: str,
    labels: Int[np.ndarray, " n"] | None = None,
    progress: bool = True,
) -> Crosscoder:
    """The crosscoder of a configuration: loaded if it was trained, resumed if it was interrupted.

    Args:
        activations: as in ``train``, or a function that returns them, called only if needed.
        build_dir: runs live in ``<build_dir>/crosscoders/<key>``, see ``run_directory``.
        data_key: identifies activations *and* labels, such as the checksum in a cache's manifest.
    """
    directory = run_directory(config, build_dir, data_key)
    if (directory / "cfg.json").is_file() and not (directory / STATE_FILE).is_file():
        return load(directory, device=config.device)
    return train(
        config, activations() if callable(activations) else activations, directory, labels, progress
    )


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

    def run(self, build_dir: str | Path, progress: bool = True) -> Crosscoder:
        """The crosscoder, by ``get_or_train``."""
        return get_or_train(
            self.config, self.activations, build_dir, self.data_key, self.labels, progress
        )


Name = TypeVar("Name", bound=Hashable)


def get_all(
    jobs: Mapping[Name, Job], build_dir: str | Path, workers: int = 1, progress: bool = True
) -> dict[Name, Crosscoder]:
    """Many crosscoders, by name; ``workers`` are trained at a time.

    Small products do not gain from a second core, whole runs do. Each small run uses the one thread
    that it would use alone, so its weights are the same (``_threads``).

    Raises:
        what a run raises, once the runs that had begun have stopped; the others are not begun.
    """
    done = {}
    with (
        ThreadPoolExecutor(
            max(1, min(workers, len(jobs))),
            initializer=torch.set_num_threads,  # else a new thread's are what another one has set
            initargs=(torch.get_num_threads(),),
        ) as pool,
        tqdm(total=len(jobs), unit=" crosscoders", disable=not progress) as bar,
    ):
        waiting = {pool.submit(job.run, build_dir, False): name for name, job in jobs.items()}
        try:
            for future in as_completed(waiting):
                done[waiting[future]] = future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(torch.get_num_threads())  # a worker's became all new threads'
    return {name: done[name] for name in jobs}


def run_directory(config: TrainConfig, build_dir: str | Path, data_key: str) -> Path:
    """Where ``get_or_train`` keeps a run."""
    return Path(build_dir) / "crosscoders" / config_key(config, data_key)


def load_metrics(directory: str | Path) -> pd.DataFrame:
    """The metrics of a run, one row per logged step.

    Columns: ``step`` (from 1), ``lr``, ``loss``, ``mse``, ``l1_shared``, ``l1_exclusive``, ``aux``,
    per model ``fve_<model>``, per block ``l0_<block>`` (mean active features per sample) and
    ``dead_<block>`` (share of features silent for ``dead_steps``). All measured on the step's own
    batch, before its update.
    """
    path = Path(directory) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; train the run first")
    return pd.read_csv(path)


# -------------------------------------------------------------------------------------------------
# The run


def train(
    config: TrainConfig,
    activations: AnyActivations,
    out_dir: str | Path,
    labels: Int[np.ndarray, " n"] | None = None,
    progress: bool = True,
) -> Crosscoder:
    """Train a crosscoder, or finish a run that was interrupted; returned as ``load`` reads it.

    Args:
        activations: raw, ``(n, n_models, d_model)``: a tensor, array, memory map, or
            ``ActivationSource``.
        out_dir: the run's folder. A finished run of the same configuration is returned as it is.
        labels: the dataset of each sample, whole numbers; used by ``zscore_unstored`` only.

    Raises:
        ValueError: the shapes do not fit, or ``out_dir`` holds another run or another's data.
        FloatingPointError: the loss is no longer finite.
    """
    directory = Path(out_dir)
    data = _Data(config, activations, labels)
    with _locked(directory):
        _claim(directory, config, data)
        if not (directory / "cfg.json").is_file():
            with _threads(config, data.d_model):
                _train(config, data, directory, progress)
        _discard_state(directory)
    return load(directory, device=config.device)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process a run: a second one waits, and then finds the run finished."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("a") as stream:
        lock(stream)
        yield


def _train(config: TrainConfig, data: "_Data", directory: Path, progress: bool) -> None:
    run = _Run(config, data, directory)
    run.resume()
    name = f"crosscoder {config.partition.dict_size} k={config.k}"
    todo = range(run.step, config.steps)
    bar = tqdm(todo, name, total=config.steps, initial=run.step, disable=not progress)
    for step in bar:
        run.train_step(data.batch(step))
        if run.rows[-1]["step"] == run.step:
            bar.set_postfix(mse=f"{run.rows[-1]['mse']:.4f}", refresh=False)
        if run.step % config.checkpoint_every == 0 and run.step < config.steps:
            run.checkpoint()
    run.finish()


def _threads(config: TrainConfig, d_model: int) -> AbstractContextManager[None]:
    """One thread for a small crosscoder on a CPU, whatever the machine has.

    So it gives the same weights whether two cores are free or eight, alone or beside others
    (``get_all``).
    """
    product = config.batch_size * config.partition.n_models * d_model * config.partition.dict_size
    small = config.device == "cpu" and product <= ONE_THREAD
    return fixed_threads(1) if small else nullcontext()


@contextmanager
def fixed_threads(n: int) -> Iterator[None]:
    """The last bits of a sum, and after a training many more, depend on how many threads did it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """The state of a run: weights, optimiser, and what has been silent for how long."""

    def __init__(self, config: TrainConfig, data: "_Data", directory: Path):
        self.config, self.data, self.directory = config, data, directory
        self.crosscoder = TrainingCrosscoder.create(
            data.d_model,
            config.partition,
            config.k,
            batchtopk=config.batchtopk,
            tie_shared=config.tie_shared,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            dtype=getattr(torch, config.dtype),
            device=config.device,
            metadata={"normalise": config.normalise, "seed": config.seed, "steps": config.steps},
            shared_coef=config.shared_coef,
            exclusive_coef=config.exclusive_coef,
            variant=config.variant,
            aux_coef=config.aux_coef,
            aux_k=config.aux_k,
            init_seed=config.seed,
            decoder_init_norm=config.decoder_init_norm,
        )
        self.params = dict(self.crosscoder.named_parameters())
        for param in self.params.values():
            # Kept for the whole run, see accumulate_into in dfc_lib.crosscoder.kernels.
            param.grad = torch.zeros_like(param)
        fused = torch.device(config.device).type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(self.params.values(), lr=config.lr, fused=fused)
        d_dict = config.partition.dict_size
        self.steps_silent = torch.zeros(d_dict, dtype=torch.int64, device=config.device)
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.coefs = (config.shared_coef, config.exclusive_coef, config.aux_coef)
        named = zip(("l1_shared", "l1_exclusive", "aux"), self.coefs, strict=True)
        self.unused_terms = {name for name, coef in named if not coef}

    def train_step(self, x: Float[Tensor, "batch model d_model"]) -> None:
        config, crosscoder = self.config, self.crosscoder
        self.optimiser.zero_grad(set_to_none=False)
        forward = crosscoder.forward_sparse(x, in_place=True)
        dead = self.steps_silent >= config.dead_steps
        terms = crosscoder.loss_terms(
            forward, config.variant, dead, in_place=True, skip=self.unused_terms
        )
        total = weigh(terms, *self.coefs)
        total.backward()
        crosscoder.constrain_grads_()
        self._clip()
        learning_rate = config.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate

        firings = forward.firings()
        self.steps_silent = torch.where(firings > 0, 0, self.steps_silent + 1)
        crosscoder.update_threshold_(forward, crosscoder.cfg.threshold_rate)
        last = self.step + 1 == config.steps
        if self.step == 0 or (self.step + 1) % config.log_every == 0 or last:
            self._log(forward, terms, total, firings, learning_rate)

        self.optimiser.step()
        crosscoder.tie_()
        self.step += 1

    def _clip(self) -> None:
        if self.config.clip_norm:
            grads = [param.grad for param in self.params.values()]
            # As clip_grad_norm_, less its pass over all gradients where that would change nothing.
            scale = self.config.clip_norm / (torch.nn.utils.get_total_norm(grads) + 1e-6)
            if scale < 1:
                torch._foreach_mul_(grads, scale)

    @torch.no_grad()
    def _log(
        self, forward: Forward, terms: dict, total: Tensor, firings: Tensor, learning_rate: float
    ) -> None:
        config, partition = self.config, self.config.partition
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {float(total)} at step {self.step + 1} of {self.directory}; "
                f"lower lr (now {config.lr})"
            )
        used = {"l1_shared", "l1_exclusive", "aux"} - self.unused_terms
        unused = self.crosscoder.loss_terms(forward, config.variant, skip=used)
        shape = (len(forward.z), partition.n_models, -1)
        z, reconstruction = forward.z.view(shape), forward.reconstruction.view(shape)
        fve = 1 - (z - reconstruction).square().sum((0, 2)) / (z - z.mean(0)).square().sum((0, 2))
        row = {"step": self.step + 1, "lr": learning_rate, "loss": float(total)}
        for name, term in terms.items():
            row[name] = float(unused[name] if name in self.unused_terms else term)
        for name, value in zip(partition.model_names, fve.tolist(), strict=True):
            row[f"fve_{name}"] = value
        dead = (self.steps_silent >= config.dead_steps).double()
        for block, features in partition.slices.items():
            row[f"l0_{block}"] = float(firings[features].sum()) / len(z)
            row[f"dead_{block}"] = float(dead[features].mean())
        self.rows.append(row)

    # -- stopping and going on

    def checkpoint(self) -> None:
        """Write metrics, then the state; rows that are ahead of the state are dropped on resume."""
        self._write_metrics()
        tensors = {f"model.{name}": tensor for name, tensor in self.crosscoder.state_dict().items()}
        tensors["steps_silent"] = self.steps_silent
        for name, param in self.params.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimiser.state[param][moment]
        save_tensors(tensors, self.directory / STATE_FILE, {"step": str(self.step)})

    def resume(self) -> None:
        """Continue from the state file; without one, start (and fit the normaliser)."""
        path = self.directory / STATE_FILE
        if not path.is_file():
            if self.config.normalise == "per_model_scalar":
                self.crosscoder.normaliser = Normaliser.fit(self.data.activations)
            return
        try:
            with safe_open(path, framework="pt", device=self.config.device) as state:
                # Copied into what is already allocated: memory alignment, and with it the last bit
                # of every product, is the same as in a run that was never interrupted.
                for name, tensor in self.crosscoder.state_dict().items():
                    tensor.copy_(state.get_tensor(f"model.{name}"))
                self.steps_silent.copy_(state.get_tensor("steps_silent"))
                self.step = int(state.metadata()["step"])
                for name, param in self.params.items():
                    moments = {m: torch.empty_like(param) for m in ("exp_avg", "exp_avg_sq")}
                    for moment, tensor in moments.items():
                        tensor.copy_(state.get_tensor(f"{moment}.{name}"))
                    count = torch.tensor(float(self.step), device=param.device)
                    self.optimiser.state[param] = {"step": count, **moments}
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to start again") from error
        with open(self.directory / METRICS_FILE, newline="") as file:  # pandas may round
            rows = [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]
        self.rows = [row | {"step": int(row["step"])} for row in rows if row["step"] <= self.step]

    def finish(self) -> None:
        self._write_metrics()
        self.crosscoder.check_integrity()
        self.crosscoder.save(self.directory)  # cfg.json comes last and marks the run as finished

    def _write_metrics(self) -> None:
        text = io.StringIO()
        pd.DataFrame(self.rows).to_csv(text, index=False, lineterminator="\n")
        write_atomically(self.directory / METRICS_FILE, text.getvalue())


def _discard_state(directory: Path) -> None:
    """What a finished run no longer needs, and what a kill in the middle of a write left behind."""
    for path in (directory / STATE_FILE, *directory.glob(f".{STATE_FILE}.*.tmp")):
        path.unlink(missing_ok=True)


def _claim(directory: Path, config: TrainConfig, data: "_Data") -> None:
    """Make the folder this run's, or check that it is."""
    ignored = ("device", "checkpoint_every")
    content = {
        "training_version": TRAINING_VERSION,
        "data": data.fingerprint(),
        "config": config.to_dict(),
    }
    path = directory / RUN_FILE
    if not path.is_file():
        if (directory / "cfg.json").is_file():
            raise ValueError(
                f"{directory} already holds a crosscoder of unknown origin; choose another out_dir"
            )
        write_atomically(path, json.dumps(content, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
        other = [name for name in ("training_version", "data") if found[name] != content[name]]
        other += [
            f.name
            for f in fields(config)
            if f.name not in ignored and found["config"].get(f.name) != content["config"][f.name]
        ]
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); delete {directory} to start the run again"
        ) from error
    if other:
        raise ValueError(
            f"{directory} holds another run (it differs in: {', '.join(other)}); choose another "
            "out_dir or delete it"
        )


# -------------------------------------------------------------------------------------------------
# Data


class _Data:
    """Activations in the order of a run, which is a pure function of (seed, step)."""

    def __init__(self, config: TrainConfig, activations: AnyActivations, labels: np.ndarray | None):
        self.activations, self.config = activations, config
        self.is_source = hasattr(activations, "n")
        self.n = int(activations.n) if self.is_source else len(activations)
        if self.n < 1:
            raise ValueError("there are no activations to train on")
        shape = tuple(self._gather(np.arange(1)).shape)
        if len(shape) != 3 or shape[1] != config.partition.n_models:
            raise ValueError(
                f"activations have shape {(self.n, *shape[1:])}, the partition asks for "
                f"(n, {config.partition.n_models}, d_model)"
            )
        self.d_model = shape[2]
        self._epoch, self._order = -1, np.arange(0)
        self.labels, self.n_labels = None, 0
        if config.normalise == "zscore_unstored":
            self.labels = np.zeros(self.n, dtype=np.int64) if labels is None else np.asarray(labels)
            if self.labels.shape != (self.n,):
                raise ValueError(f"labels have shape {self.labels.shape}, expected ({self.n},)")
            names, self.labels = np.unique(self.labels, return_inverse=True)
            self.n_labels = len(names)

    def indices(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The samples of a step, ascending (kinder to a memory map than the drawn order)."""
        size, parts = self.config.batch_size, []
        position, end = step * size, (step + 1) * size
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n)
                self._epoch, self._order = epoch, order
            part = self._order[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.sort(np.concatenate(parts))

    def batch(self, step: int) -> Float[Tensor, "batch model d_model"]:
        """The activations of a step, on the device; raw, or z-scored in the published protocol."""
        indices = self.indices(step)
        x = self._gather(indices).to(self.config.device, getattr(torch, self.config.dtype))
        if self.labels is not None:
            label = torch.as_tensor(self.labels[indices], device=x.device)
            mean, deviation = (s.to(x) for s in self.statistics)
            x = (x - mean[label]) / deviation[label]
        return x

    def fingerprint(self) -> str:
        """A cheap check (16 samples) that a run goes on with the data that it began with."""
        rows = self._gather(np.unique(np.linspace(0, self.n - 1, 16).astype(np.int64)))
        rows = rows.float().cpu().contiguous()
        digest = hashlib.sha256(f"{self.n} {tuple(rows.shape)}".encode() + rows.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _gather(self, indices: np.ndarray) -> Tensor:
        if self.is_source:
            return torch.as_tensor(self.activations.gather(indices))
        if isinstance(self.activations, Tensor):
            return self.activations[torch.as_tensor(indices, device=self.activations.device)]
        return torch.from_numpy(np.ascontiguousarray(self.activations[indices]))

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per label, model and dimension."""
        shape = (self.n_labels, self.config.partition.n_models, self.d_model)
        count = torch.zeros(self.n_labels, 1, 1, dtype=torch.float64)
        total = torch.zeros(shape, dtype=torch.float64)
        squares = torch.zeros_like(total)
        start = 0
        for batch in iterate_batches(self.activations):
            batch = batch.double().cpu()
            label = torch.as_tensor(self.labels[start : start + len(batch)])
            start += len(batch)
            count.index_add_(0, label, torch.ones(len(batch), 1, 1, dtype=torch.float64))
            total.index_add_(0, label, batch)
            squares.index_add_(0, label, batch.square())
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1).clamp(min=1)
        deviation = variance.clamp(min=0).sqrt().clamp(min=1e-6)  # the published floor
        return mean.float(), deviation.float()
