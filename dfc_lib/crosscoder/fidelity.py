"""How well a crosscoder describes activations."""

import pandas as pd
import torch

from dfc_lib.crosscoder.batches import AnyActivations
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import iterate_batches


@torch.no_grad()
def fidelity(crosscoder: Crosscoder, activations: AnyActivations) -> pd.DataFrame:
    """How well a crosscoder describes raw activations, per model and per block.

    Returns:
        One row per model and per block; what does not apply is NaN. ``scope`` (``model`` or
        ``block``), ``name``, then per model ``fve``, the fraction of variance explained: 1 -
        squared error / squared distance from the mean over all samples (the same in raw and in
        normalised units); per block ``n_features``, ``l0``, mean active features per sample, and
        ``dead_share``, features that fire in no sample.
    """
    partition, crosscoder = crosscoder.partition, crosscoder.eval()
    n, mean, m2, residual = 0, 0.0, 0.0, 0.0
    firings = torch.zeros(partition.dict_size, dtype=torch.int64)
    for x in iterate_batches(activations):
        forward = crosscoder.forward_sparse(x.to(crosscoder.device))
        z = forward.z.unflatten(1, (partition.n_models, -1)).double().cpu()
        error = (forward.z - forward.reconstruction).unflatten(1, (partition.n_models, -1))
        residual = residual + error.double().square().sum((0, 2)).cpu()
        # Merge the batch's moments into the running ones (Chan et al. 1979): one pass, stable.
        delta, total = z.mean(0) - mean, n + len(z)
        m2 = m2 + (z - z.mean(0)).square().sum((0, 2)) + delta.square().sum(-1) * n * len(z) / total
        mean, n = mean + delta * len(z) / total, total
        firings += forward.firings().cpu()
    fve = (1 - residual / m2).tolist()
    rows = [
        {"scope": "model", "name": name, "fve": v}
        for name, v in zip(partition.model_names, fve, strict=True)
    ]
    for block in partition.blocks:
        fired = firings[partition.slices[block.name]]
        rows.append(
            {
                "scope": "block",
                "name": block.name,
                "n_features": block.size,
                "l0": float(fired.sum()) / n,
                "dead_share": float((fired == 0).double().mean()),
            }
        )
    return pd.DataFrame(rows, columns=["scope", "name", "fve", "n_features", "l0", "dead_share"])
