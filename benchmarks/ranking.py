"""How fast are features ranked? `dfc_lib.reading.ranking.discriminability` against a scipy loop.

    python benchmarks/ranking.py                   # 16,384 features x 8,000 prompts, k = 90
    python benchmarks/ranking.py --features 2048   # smaller

The codes are random: k non-zero activations per prompt, half of the features five times as
frequent as the other half. The loop over features computes the same five measures with numpy and
`scipy.stats`, once with `mannwhitneyu` (what one would write) and once with `rankdata` alone (the
least that scipy needs). It runs on a random sample of features, each already contiguous in memory;
its time for all features is *extrapolated* from that sample. The results are compared on the
sample. Nothing is written.
"""

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from dfc_lib.reading.ranking import discriminability


def codes(n_prompts: int, n_features: int, k: int, seed: int = 0) -> np.ndarray:
    """(n_prompts, n_features) float32 with about k non-zeros per row."""
    rng = np.random.default_rng(seed)
    frequency = np.where(rng.random(n_features) < 0.5, 5.0, 1.0)
    active = rng.choice(n_features, size=(n_prompts, k), p=frequency / frequency.sum())
    x = np.zeros((n_prompts, n_features), dtype=np.float32)
    x[np.arange(n_prompts)[:, None], active] = rng.exponential(size=(n_prompts, k))
    return x


def by_mannwhitneyu(p: np.ndarray, n: np.ndarray) -> float:
    return stats.mannwhitneyu(p, n, method="asymptotic").statistic / (p.size * n.size)


def by_rankdata(p: np.ndarray, n: np.ndarray) -> float:
    ranks = stats.rankdata(np.concatenate([p, n]))[: p.size]
    return (ranks.sum() - p.size * (p.size + 1) / 2) / (p.size * n.size)


def measures(p: np.ndarray, n: np.ndarray, auroc) -> tuple[float, ...]:
    difference = p.mean() - n.mean()
    spread = np.sqrt((p.var(ddof=1) + n.var(ddof=1)) / 2)
    d = difference / spread if spread else 0.0
    return d, auroc(p, n), (p > 0).mean(), (n > 0).mean(), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--prompts", type=int, default=8_000)
    parser.add_argument("--k", type=int, default=90, help="non-zero activations per prompt")
    parser.add_argument("--sample", type=int, default=200, help="features that the loop is run on")
    args = parser.parse_args()

    x = codes(args.prompts, args.features, args.k)
    positive, negative = x[: args.prompts // 2], x[args.prompts // 2 :]
    print(
        f"{args.features:,} features x {args.prompts:,} prompts, {(x != 0).mean():.2%} non-zero, "
        f"{x.nbytes / 2**20:,.0f} MiB"
    )
    discriminability(positive[:, :8], negative[:, :8])  # what is imported once is not timed

    # The CPU time of this process: other work on the machine must not count for either side.
    start = time.process_time()
    table = discriminability(positive, negative)
    ours = time.process_time() - start
    print(f"discriminability      {ours:9.2f} s, all features")

    tracemalloc.start()
    discriminability(positive, negative)
    print(f"  scratch memory      {tracemalloc.get_traced_memory()[1] / 2**20:9.0f} MiB")
    tracemalloc.stop()

    sample = np.random.default_rng(1).choice(args.features, min(args.sample, args.features), False)
    columns = [tuple(np.float64(side[:, i]) for side in (positive, negative)) for i in sample]
    for auroc in (by_mannwhitneyu, by_rankdata):
        start = time.process_time()
        rows = [measures(p, n, auroc) for p, n in columns]
        loop = (time.process_time() - start) * args.features / len(sample)
        np.testing.assert_allclose(table.iloc[sample], rows, rtol=1e-9, atol=1e-12)
        print(
            f"loop, {auroc.__name__:15s} {loop:9.2f} s, extrapolated from {len(sample)} features: "
            f"{loop / ours:.0f}x"
        )


if __name__ == "__main__":
    main()
