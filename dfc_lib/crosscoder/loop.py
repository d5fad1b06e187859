"""The training loop: a configuration and batches in, a checkpoint and a table of metrics out.

This module and what it imports decide the weights of a crosscoder; the name of a run holds a hash
of their code (``training.config_key``), so what does not decide them belongs elsewhere.

A run can be killed at any moment and called again: the order of the data is a pure function of
(seed, step), everything else that changes is in one state file that is replaced whole, and on a CPU
the final weights come out identical to the last bit (same machine, and for large crosscoders same
number of threads; see ``run``).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from dfc_lib.crosscoder import losses
from dfc_lib.crosscoder.batches import Batches
from dfc_lib.crosscoder.losses import VARIANTS, Variant
from dfc_lib.crosscoder.model import Crosscoder, Forward
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.store import save_tensors, write_atomically

STATE_FILE, METRICS_FILE = "state.safetensors", "metrics.csv"
CLIP_NORM = 1.0  # the largest norm of the whole gradient
THRESHOLD_RATE = 0.01  # of the moving average of BatchTopK's threshold
# Up to this many multiplications per encoder product, one thread is as good as two: see run.
ONE_THREAD = 2**28


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights of a run, given the activations.

    Attributes:
        partition: blocks of features and the models they belong to; its size is the dictionary's.
        k: active features per sample.
        batchtopk: select ``k * batch_size`` features over the batch, not ``k`` per sample.
        tie_shared: one decoder row per shared feature for all models; the encoder stays free.
        tie_bias: one decoder bias for all models.
        reference: the model that the others are compared with by the two settings that follow.
        difference_coef: of the loss on differences to the reference, see ``losses``.
        reserved_steps: so many steps at the start, every exclusive block but the reference's has
            one of the k places for itself. Reconstruction alone cannot tell what A has from what
            the reference lacks; whose block learns first decides, and it is not the reference's.
        steps, batch_size: length of the run; an epoch is a fresh permutation, and batches run
            across its end.
        lr: of Adam.
        shared_coef, exclusive_coef, variant: sparsity penalties, see ``losses``.
        aux_coef: of the auxiliary loss for dead features (none in ``published``).
        dead_steps: a feature that has not fired for this many steps counts as dead.
        normalise: ``per_model_scalar`` fits a ``Normaliser`` and stores it (calibrated protocol);
            ``pooled_scalar`` likewise, one for all models;
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
    tie_bias: bool = False
    reference: str = ""
    difference_coef: float = 0.0
    reserved_steps: int = 0
    steps: int = 1500
    batch_size: int = 512
    lr: float = 1e-3
    shared_coef: float = 0.0
    exclusive_coef: float = 0.0
    variant: Variant = "exclusive_only"
    aux_coef: float = 1 / 32
    dead_steps: int = 250
    normalise: Literal["per_model_scalar", "pooled_scalar", "zscore_unstored"] = "per_model_scalar"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"

    def __post_init__(self):
        choices = {
            "variant": VARIANTS,
            "normalise": ("per_model_scalar", "pooled_scalar", "zscore_unstored"),
            "dtype": ("float32", "float64"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"TrainConfig.{name} is {value!r}; use one of {allowed}")
        for name in ("k", "steps", "batch_size", "dead_steps", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"TrainConfig.{name} is {value}; it must be at least 1")
        names, compared = self.partition.model_names, self.difference_coef or self.reserved_steps
        if compared and self.reference not in names:
            raise ValueError(
                f"TrainConfig.reference is {self.reference!r}; difference_coef and reserved_steps "
                f"compare the models with one of them: use one of {names}"
            )
        if self.reserved_steps and self.k <= len(self.reserved):
            raise ValueError(
                f"TrainConfig.k is {self.k}; reserved_steps takes {len(self.reserved)} of them and "
                "leaves none for the others: raise k"
            )

    @cached_property
    def reserved(self) -> list[slice]:
        """The features of the exclusive blocks that are not the reference's."""
        partition = self.partition
        owned = [b for b in partition.blocks if len(b.models) == 1]
        names = [b.name for b in owned if partition.model_names[b.models[0]] != self.reference]
        return [partition.slices[name] for name in names]

    def to_dict(self) -> dict[str, Any]:
        """All fields that decide the weights, as plain JSON."""
        content = asdict(self) | {"partition": self.partition.to_dict()}
        return {k: v for k, v in content.items() if k not in ("checkpoint_every", "device")}


def run(config: TrainConfig, batches: Batches, directory: Path, progress: bool = True) -> None:
    """Train, or finish a run that was interrupted, in its folder.

    A small crosscoder gets one thread on a CPU, whatever the machine has. So it has the same
    weights whether two cores are free or eight, alone or beside others (``get_all``).

    Raises:
        ValueError: the state of the interrupted run is damaged.
        FloatingPointError: the loss is no longer finite.
    """
    partition = config.partition
    product = config.batch_size * partition.n_models * batches.d_model * partition.dict_size
    small = config.device == "cpu" and product <= ONE_THREAD
    with fixed_threads(1) if small else nullcontext():
        state = Run(config, batches, directory)
        state.resume()
        name = f"crosscoder {partition.dict_size} k={config.k}"
        todo = range(state.step, config.steps)
        bar = tqdm(todo, name, total=config.steps, initial=state.step, disable=not progress)
        for step in bar:
            state.train_step(batches.batch(step))
            if state.rows[-1]["step"] == state.step:
                bar.set_postfix(mse=f"{state.rows[-1]['mse']:.4f}", refresh=False)
            if state.step % config.checkpoint_every == 0 and state.step < config.steps:
                state.checkpoint()
        state.finish()


@contextmanager
def fixed_threads(n: int) -> Iterator[None]:
    """The last bits of a sum, and after a training many more, depend on how many threads did it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run:
    """The state of a run: weights, optimiser, and what has been silent for how long."""

    def __init__(self, config: TrainConfig, batches: Batches, directory: Path):
        self.config, self.batches, self.directory = config, batches, directory
        self.crosscoder = Crosscoder.create(
            batches.d_model,
            config.partition,
            config.k,
            batchtopk=config.batchtopk,
            tie_shared=config.tie_shared,
            tie_bias=config.tie_bias,
            dtype=config.dtype,
            device=config.device,
            metadata={"training": config.to_dict()},
            init_seed=config.seed,
        ).train()
        self.params = dict(self.crosscoder.named_parameters())
        for param in self.params.values():
            # Kept for the whole run, see dfc_lib.crosscoder.kernels.
            param.grad = torch.zeros_like(param)
        self.grads = [param.grad for param in self.params.values()]
        fused = torch.device(config.device).type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(self.params.values(), lr=config.lr, fused=fused)
        d_dict = config.partition.dict_size
        self.steps_silent = torch.zeros(d_dict, dtype=torch.int64, device=config.device)
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.coefs = (config.shared_coef, config.exclusive_coef, config.aux_coef)
        named = zip(("l1_shared", "l1_exclusive", "aux"), self.coefs, strict=True)
        self.unused_terms = {name for name, coef in named if not coef}
        self.differences: losses.Differences | None = None

    def train_step(self, x: Float[Tensor, "batch model d_model"]) -> None:
        config, crosscoder = self.config, self.crosscoder
        torch._foreach_zero_(self.grads)
        crosscoder.reserved = config.reserved if self.step < config.reserved_steps else []
        forward = crosscoder.forward_sparse(x)
        dead = self.steps_silent >= config.dead_steps
        compared, unused = self.differences, self.unused_terms
        terms = losses.terms(crosscoder, forward, config.variant, dead, compared, unused)
        total = losses.weigh(terms, *self.coefs, config.difference_coef)
        total.backward()
        crosscoder.constrain_grads_()
        # As clip_grad_norm_, less its pass over all gradients where that would change nothing.
        scale = CLIP_NORM / (torch.nn.utils.get_total_norm(self.grads) + 1e-6)
        if scale < 1:
            torch._foreach_mul_(self.grads, scale)

        firings = forward.firings()
        self.steps_silent = torch.where(firings > 0, 0, self.steps_silent + 1)
        crosscoder.update_threshold_(forward, THRESHOLD_RATE)
        last = self.step + 1 == config.steps
        if self.step == 0 or (self.step + 1) % config.log_every == 0 or last:
            self._log(forward, terms, total, firings)

        self.optimiser.step()
        crosscoder.tie_()
        self.step += 1

    @torch.no_grad()
    def _log(self, forward: Forward, terms: dict, total: Tensor, firings: Tensor) -> None:
        config, partition = self.config, self.config.partition
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {float(total)} at step {self.step + 1} of {self.directory}; "
                f"lower lr (now {config.lr})"
            )
        shape = (len(forward.z), partition.n_models, -1)
        z, reconstruction = forward.z.view(shape), forward.reconstruction.view(shape)
        fve = 1 - (z - reconstruction).square().sum((0, 2)) / (z - z.mean(0)).square().sum((0, 2))
        row = {"step": self.step + 1, "loss": float(total)}
        row |= {name: float(terms[name]) for name in terms if name not in self.unused_terms}
        for name, value in zip(partition.model_names, fve.tolist(), strict=True):
            row[f"fve_{name}"] = value
        dead = (self.steps_silent >= config.dead_steps).double()
        for block, features in partition.slices.items():
            row[f"l0_{block}"] = float(firings[features].sum()) / len(z)
            row[f"dead_{block}"] = float(dead[features].mean())
        self.rows.append(row)

    # -- stopping and going on

    def checkpoint(self) -> None:
        """Write the state: weights, optimiser, what has been silent, and the metrics so far."""
        tensors = {f"model.{name}": tensor for name, tensor in self.crosscoder.state_dict().items()}
        tensors["steps_silent"] = self.steps_silent
        for name, param in self.params.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimiser.state[param][moment]
        metadata = {"step": str(self.step), "metrics": json.dumps(self.rows)}
        save_tensors(tensors, self.directory / STATE_FILE, metadata)

    def resume(self) -> None:
        """Continue from the state file; without one, start (and fit the normaliser)."""
        self._restore(self.directory / STATE_FILE)
        if self.config.difference_coef:
            normaliser = self.crosscoder.normaliser
            reference = self.config.partition.model(self.config.reference)
            activations = self.batches.activations
            variance = normaliser.variance_of_differences(activations, reference)
            self.differences = losses.Differences(reference, variance)

    def _restore(self, path: Path) -> None:
        if not path.is_file():
            if self.config.normalise != "zscore_unstored":
                pooled = self.config.normalise == "pooled_scalar"
                self.crosscoder.normaliser = Normaliser.fit(self.batches.activations, pooled=pooled)
            return
        try:
            with safe_open(path, framework="pt", device=self.config.device) as state:
                # Copied into what is already allocated: memory alignment, and with it the last bit
                # of every product, is the same as in a run that was never interrupted.
                for name, tensor in self.crosscoder.state_dict().items():
                    tensor.copy_(state.get_tensor(f"model.{name}"))
                self.steps_silent.copy_(state.get_tensor("steps_silent"))
                self.step = int(state.metadata()["step"])
                self.rows = json.loads(state.metadata()["metrics"])
                for name, param in self.params.items():
                    moments = {m: torch.empty_like(param) for m in ("exp_avg", "exp_avg_sq")}
                    for moment, tensor in moments.items():
                        tensor.copy_(state.get_tensor(f"{moment}.{name}"))
                    count = torch.tensor(float(self.step), device=param.device)
                    self.optimiser.state[param] = {"step": count, **moments}
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to start again") from error

    def finish(self) -> None:
        text = pd.DataFrame(self.rows).to_csv(index=False, lineterminator="\n")
        write_atomically(self.directory / METRICS_FILE, text)
        self.crosscoder.reserved = []
        self.crosscoder.check_integrity()
        self.crosscoder.save(self.directory)  # cfg.json comes last and marks the run as finished
