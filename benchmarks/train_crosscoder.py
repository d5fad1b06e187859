"""How fast does a crosscoder train? Ours, a plain dense loop, SAELens, and the least work there is.

    python benchmarks/train_crosscoder.py                      # toy size
    python benchmarks/train_crosscoder.py --size paper         # the sizes of arXiv 2606.26474
    python benchmarks/train_crosscoder.py --size all --quick   # one paper size, few rounds

Paper sizes: d_model 2048, D 8192 and 16384, k 45, 90 and 160, batch 1024. Contenders, all in
float32 on the same random activations of two models, auxiliary loss off:

- ``ours``: ``dfc_lib.crosscoder.training.train`` as the notebooks call it, with its batches,
  normaliser, gradient clipping and logging.
- ``dense``: the plain loop of the published code: einsum, ReLU, top-k, scatter, einsum, Adam,
  clipping, and a second forward pass for the metrics. Masks are applied after each step only,
  which is cheaper than the published product in every forward pass.
- ``saelens``: ``TopKTrainingSAE`` over the concatenated streams, driven by ``SAETrainer``.
- ``floor``: one encoder product and one fused Adam step over all parameters.

A step is timed from one request for a batch to the next. The contenders take turns for some rounds,
so that a busy moment of the machine meets all of them; a round's time is the median over its steps
after a warm-up, and medians over the rounds are reported: of the times, and of the ratios within a
round (with their quartiles in ``--json``).
Peak memory is what the process (or the GPU) holds beyond what it held before the contender
started. A GPU is used if there is one. Nothing is written unless ``--json`` asks for it.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from dfc_lib.crosscoder.partition import Partition
from dfc_lib.crosscoder.training import TrainConfig, train


@dataclass(frozen=True)
class Size:
    name: str
    d_model: int
    d_dict: int
    k: int
    batch: int

    @property
    def partition(self) -> Partition:
        return Partition.dedicated(self.d_dict, 0.05)


TOY = [Size("toy", 192, 1024, 16, 512)]
PAPER = [Size("paper", 2048, D, k, 1024) for D in (8192, 16384) for k in (45, 90, 160)]


@dataclass
class Stopwatch:
    """Ticks at every request for a batch; counts as an activation source for ``train``."""

    activations: torch.Tensor
    batch: int
    device: str
    ticks: list[float] = field(default_factory=list)
    peak: float = float("nan")

    def __post_init__(self):
        self.n = len(self.activations)
        gc.collect()
        self._before = common.memory_now(self.device)
        common.reset_peak(self.device)

    def gather(self, indices) -> torch.Tensor:
        if len(indices) == self.batch:
            self.tick()
        return self.activations[torch.as_tensor(np.asarray(indices))]

    def tick(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        self.peak = common.peak_now(self.device) - self._before

    def batches(self, steps: int):
        """``steps`` batches of random samples, with a tick before each."""
        generator = np.random.default_rng(0)
        for _ in range(steps):
            yield self.gather(np.sort(generator.permutation(self.n)[: self.batch])).to(self.device)

    def seconds_per_step(self, warm_up: int) -> float:
        intervals = np.diff(self.ticks)[warm_up:]
        return statistics.median(intervals.tolist())


# --------------------------------------------------------------------------------------------------
# Contenders: each runs some steps and returns the stopwatch that they were timed with


def run_ours(size: Size, activations: torch.Tensor, steps: int, device: str) -> Stopwatch:
    watch = Stopwatch(activations, size.batch, device)
    config = TrainConfig(
        size.partition,
        size.k,
        steps=steps,
        batch_size=size.batch,
        lr=1e-4,
        aux_coef=0.0,
        device=device,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, watch, Path(folder) / "run", progress=False)
    return watch


class DenseCrosscoder(nn.Module):
    """The published layout, every product dense."""

    def __init__(self, size: Size):
        super().__init__()
        self.k, self.partition = size.k, size.partition
        self.W_enc = nn.Parameter(torch.randn(2, size.d_model, size.d_dict) / size.d_model**0.5)
        self.b_enc = nn.Parameter(torch.zeros(size.d_dict))
        self.W_dec = nn.Parameter(torch.randn(size.d_dict, 2, size.d_model) / size.d_dict**0.5)
        self.b_dec = nn.Parameter(torch.zeros(2, size.d_model))
        self.mask()

    @torch.no_grad()
    def mask(self):
        self.partition.zero_forbidden_(self.W_enc.permute(2, 0, 1))
        self.partition.zero_forbidden_(self.W_dec)

    def forward(self, x):
        preactivations = F.relu(torch.einsum("bmd,mdf->bf", x, self.W_enc) + self.b_enc)
        values, indices = preactivations.topk(self.k, dim=-1)
        f = torch.zeros_like(preactivations).scatter(-1, indices, values)
        return torch.einsum("bf,fmd->bmd", f, self.W_dec) + self.b_dec, f


def run_dense(size: Size, activations: torch.Tensor, steps: int, device: str) -> Stopwatch:
    watch = Stopwatch(activations, size.batch, device)
    model = DenseCrosscoder(size).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    slices = model.partition.slices
    for x in watch.batches(steps):
        optimiser.zero_grad()
        reconstruction, _ = model(x)
        F.mse_loss(reconstruction, x).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        model.mask()
        with torch.no_grad():
            _, f = model(x)
            _ = [float((f[:, features] > 0).sum(-1).float().mean()) for features in slices.values()]
    return watch


def run_saelens(size: Size, activations: torch.Tensor, steps: int, device: str) -> Stopwatch:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    watch = Stopwatch(activations, size.batch, device)
    cfg = TopKTrainingSAEConfig(
        d_in=2 * size.d_model, d_sae=size.d_dict, k=size.k, aux_loss_coefficient=0.0, device=device
    )
    trainer_cfg = SAETrainerConfig(
        total_training_samples=steps * size.batch,
        train_batch_size_samples=size.batch,
        lr=1e-4,
        lr_end=1e-5,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = (x.flatten(1) for x in watch.batches(steps))
    SAETrainer(cfg=trainer_cfg, sae=TopKTrainingSAE(cfg), data_provider=batches).fit()
    return watch


def run_floor(size: Size, activations: torch.Tensor, steps: int, device: str) -> Stopwatch:
    watch = Stopwatch(activations, size.batch, device)
    width = 2 * size.d_model
    shapes = [(size.d_dict, width), (size.d_dict, width), (size.d_dict,), (width,)]
    params = [nn.Parameter(torch.randn(shape, device=device) / 64) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) / 64
    optimiser = torch.optim.Adam(params, lr=1e-4, fused=True)
    x = activations[: size.batch].flatten(1).to(device)
    out = torch.empty(size.batch, size.d_dict, device=device)
    with torch.no_grad():
        for _ in range(steps):
            watch.tick()
            torch.mm(x, params[0].T, out=out)
            optimiser.step()
    return watch


COLUMNS = (
    "{size:>6} {d_model:>7} {D:>6} {k:>4} {contender:>9} {ms_per_step:9.2f} {samples_per_s:10.0f} "
    "{time_vs_ours:7.2f} {time_vs_floor:7.2f} {peak_MB:8.0f}"
)
CONTENDERS = {"ours": run_ours, "dense": run_dense, "saelens": run_saelens, "floor": run_floor}


def measure(size: Size, rounds: int, steps: int, warm_up: int, device: str) -> list[dict]:
    """One row per contender: time per step, also relative to ours and to the floor, peak memory."""
    torch.manual_seed(0)
    activations = torch.randn(4 * size.batch, 2, size.d_model)
    seconds = {name: [] for name in CONTENDERS}  # one value a round
    peaks = dict.fromkeys(CONTENDERS, 0.0)
    for _ in range(rounds):
        for name, contender in CONTENDERS.items():
            watch = contender(size, activations, steps + warm_up + 1, device)
            seconds[name].append(watch.seconds_per_step(warm_up))
            peaks[name] = max(peaks[name], watch.peak)
    rows = []
    for name, times in seconds.items():
        row = {"size": size.name, "d_model": size.d_model, "D": size.d_dict, "k": size.k}
        row |= {"batch": size.batch, "contender": name, "rounds": rounds}
        row |= {"ms_per_step": 1e3 * statistics.median(times), "peak_MB": peaks[name] / 2**20}
        row |= {"samples_per_s": size.batch / statistics.median(times)}
        for other in ("ours", "floor"):
            ratios = np.array(times) / seconds[other]
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
            row |= {f"time_vs_{other}": middle, f"time_vs_{other}_quartiles": [low, high]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("toy", "paper", "all"), default="toy")
    parser.add_argument("--quick", action="store_true", help="smallest paper size only, few rounds")
    common.add_options(parser)
    args = parser.parse_args()
    device = common.set_up(args)

    sizes = {"toy": TOY, "paper": PAPER, "all": TOY + PAPER}[args.size]
    if args.quick:
        sizes = [size for size in sizes if size in (TOY[0], PAPER[0])]
    processor = f"CPU, {torch.get_num_threads()} thread(s)"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {processor}, float32")
    print("  size d_model      D    k contender   ms/step  samples/s  x ours x floor  peak MB")
    table = []
    for size in sizes:
        small = size.d_model < 1024 or device == "cuda"
        rounds, steps, warm_up = (11, 30, 5) if small else (5, 3, 1)
        for row in measure(size, 3 if args.quick else rounds, steps, warm_up, device):
            table.append(row)
            print(COLUMNS.format(**row), flush=True)
    if args.json:
        content = {"torch": torch.__version__, "processor": processor, "rows": table}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
