"""The published penalty (arXiv 2606.26474 and its code), see ``losses``."""

from typing import TYPE_CHECKING

from dfc_lib.crosscoder.partition import Block, Partition

if TYPE_CHECKING:
    from dfc_lib.crosscoder.model import Crosscoder

AUXILIARY = False  # no help for dead features


def exclusive_groups(partition: Partition) -> list[list[Block]]:
    """The groups of blocks whose means ``l1_exclusive`` averages: what each model has."""
    return [[b for b in partition.blocks if m in b.models] for m in range(partition.n_models)]


def weight(crosscoder: "Crosscoder", features: slice) -> float:
    """What an activation counts."""
    return 1.0
