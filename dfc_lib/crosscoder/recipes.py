"""The crosscoders that the notebooks share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from dfc_lib import paths
from dfc_lib.crosscoder.loop import METRICS_FILE
from dfc_lib.crosscoder.partition import Partition
from dfc_lib.crosscoder.training import Job, TrainConfig, run_directory
from dfc_lib.data.activations import Activations
from dfc_lib.profiles import Profile


def train_config(profile: Profile, partition: Partition, **fields: Any) -> TrainConfig:
    """A configuration with a profile's budget; ``fields`` come on top, or instead."""
    budget = {
        "k": profile.k,
        "steps": profile.steps,
        "batch_size": profile.batch_size,
        "lr": profile.learning_rate,
        "device": profile.device,
    }
    return TrainConfig(partition, **budget | fields)


def anchored(steps: int, reference: str = "B") -> dict[str, Any]:
    """What sets an anchored DFC apart (see :class:`Recipe`), as fields of ``TrainConfig``."""
    return {
        "tie_shared": True,
        "tie_bias": True,
        "normalise": "pooled_scalar",
        "reference": reference,
        "difference_coef": 0.1,
        "reserved_steps": steps // 2,
    }


@dataclass(frozen=True)
class Recipe:
    """The crosscoders that the notebooks share: a protocol, trained on one of the shared caches.

    >>> tied = Recipe(profiles.get("toy"), tie_shared=True)
    >>> dfc = study.crosscoders({"tied": tied}, seeds=[0])["tied", 0]  # trained once, then loaded

    Attributes:
        profile: sets the sizes and the budget.
        protocol: ``calibrated``, a stored Normaliser, the exclusive-only penalty and the auxiliary
            loss; or ``published`` (arXiv 2606.26474), z-scores per dataset and model that are not
            stored, the published loss and no auxiliary term.
        vectors: which cache it learns from: ``all`` token positions but the first, or the ``last``
            token of each text.
        partition: by default a DFC with the profile's exclusive share.
        tie_shared: one decoder row per shared feature for both models.
        anchored: shared features mean the same in both models in every respect (decoder rows, bias,
            normaliser), the loss weighs the difference A - B, and for the first half of training
            A's exclusive block has one of the k places for itself; B is the anchor. What the
            models differ in is then written by exclusive features, A's first.
        setting: whose activations it learns from; see :meth:`Study.at`.
    """

    profile: Profile
    protocol: Literal["calibrated", "published"] = "calibrated"
    vectors: Literal["all", "last"] = "all"
    partition: Partition | None = None
    tie_shared: bool = False
    anchored: bool = False
    setting: str = "threshold"

    def __post_init__(self):
        if self.protocol not in ("calibrated", "published"):
            raise ValueError(f"protocol={self.protocol!r}: 'calibrated' or 'published'")
        if self.anchored and self.protocol == "published":
            raise ValueError("anchored=True goes with protocol='calibrated' only")

    @cached_property
    def activations(self) -> Activations:
        """The cache it learns from."""
        folder = paths.activations(self.profile.name, self.setting)
        return Activations.open(folder / f"train_{self.vectors}")

    def config(self, seed: int = 0) -> TrainConfig:
        """The configuration of one run."""
        p, fields = self.profile, {"tie_shared": self.tie_shared}
        if self.protocol == "published":
            fields |= {"variant": "published", "aux_coef": 0.0, "normalise": "zscore_unstored"}
        if self.anchored:
            fields |= anchored(p.steps)
        partition = self.partition or Partition.dedicated(p.dict_size, p.exclusive_share)
        return train_config(p, partition, seed=seed, **fields)

    def job(self, seed: int = 0) -> Job:
        """What :func:`training.get_all` trains, or finds trained."""
        labels = None
        if self.protocol == "published":
            labels = self.activations.rows["source"].factorize(sort=True)[0]
        return Job(self.config(seed), self.activations, self.activations.key, labels)

    def metrics(self, seed: int = 0) -> pd.DataFrame:
        """The metrics of the run of a seed, one row per logged step.

        Columns: ``step`` (from 1), ``loss`` and those of its terms that count (see ``losses``), per
        model ``fve_<model>``, per block ``l0_<block>`` (mean active features per sample) and
        ``dead_<block>`` (share of features silent for ``dead_steps``). All measured on the step's
        own batch, before its update.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        build = paths.build(self.profile.name)
        path = run_directory(self.config(seed), build, self.activations.key) / METRICS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; train the run first")
        return pd.read_csv(path)


def recipes(profile: Profile, setting: str = "threshold") -> dict[str, Recipe]:
    """The DFCs that the notebooks compare, by name: what they learn from, and whether the shared
    decoder rows are free, tied, or anchored; and the published recipe.
    """
    kinds = {"untied": {}, "tied": {"tie_shared": True}, "anchored": {"anchored": True}}
    order = [(vectors, kind) for vectors in ("all", "last") for kind in ("untied", "tied")]
    order += [("all", "anchored"), ("last", "anchored")]
    return {
        f"{vectors} {kind}": Recipe(profile, vectors=vectors, setting=setting, **kinds[kind])
        for vectors, kind in order
    } | {"published": Recipe(profile, "published", "last", setting=setting)}
