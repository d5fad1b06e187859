"""What is done to one residual stream at the site: reconstruct, steer, clamp, patch, and controls.

An intervention sees the raw activations ``h`` of all models at some tokens and gives back new ones
for one model, the *target*. It is a small frozen value, so a grid is a dictionary of them, and any
one can be looked at without running a model::

    codec = Codec(crosscoder)                                 # calibrated, joint encoding
    grid = {"clean": Clean(), "reconstruction": Reconstruction(codec),
            "alpha=4": Steer(codec, (17,), alpha=4.0)}
    new, ratio = apply(grid["alpha=4"], h, target=0)          # (batch, d_model), (batch,)

==========================  ======================================================================
``Clean``                   nothing
``Reconstruction``          decode(encode(h)); ``blocks`` restricts the decoder (shared-only, ...)
``Steer``                   h + (alpha - 1) sum_i f_i d_i   (alpha = 1 no-op, alpha = 0 ablation)
``Clamp``                   h + sum_i (c - f_i) d_i         (works also where f_i = 0)
``Patch``                   a fixed vector instead of h: the tool mean, the neutral mean
``AddVector``               h + alpha v: the difference in means
``OtherModel``              another model's activation on the same tokens
``RandomDirection``         h + ||delta of another intervention|| u
``RandomFeatures``          random active features of a block, scaled to ||delta|| of another one
``Dose``                    the change of another intervention, made equally long on every row
==========================  ======================================================================

``d_i`` is the decoder row in raw units, ``s_m W_dec[i, m]`` with the Normaliser's scale ``s_m``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dfc_lib import store
from dfc_lib.crosscoder.model import Code, Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Raw
from dfc_lib.data.pair import fingerprint
from dfc_lib.provenance import code_text

Own = Float[Tensor, "batch d_model"]  # raw activations of the target alone

# ---------------------------------------------------------------------------------------------
# how a crosscoder is applied


@dataclass(frozen=True, eq=False)
class Codec:
    """A crosscoder together with the two choices that the protocols differ in.

    Attributes:
        crosscoder: raw activations in, raw activations out, through its Normaliser.
        protocol: ``"calibrated"`` goes through the Normaliser; ``"published"`` feeds raw
            activations to the weights and takes their output as raw, as S1's evaluation does.
        encoding: ``"joint"`` reads all models; ``"own"`` reads the target alone, every other stream
            standing at its mean (base-only encoding, where the target is the base).
        fill: (n_models, d_model), those means in raw units; default: the Normaliser's.

    Make one and share it between the interventions of a grid: its codes are computed once.
    """

    crosscoder: Crosscoder
    protocol: Literal["calibrated", "published"] = "calibrated"
    encoding: Literal["joint", "own"] = "joint"
    fill: Float[Tensor, "model d_model"] | None = None

    def __post_init__(self) -> None:
        if self.protocol not in ("calibrated", "published"):
            raise ValueError(f"protocol={self.protocol!r}: 'calibrated' or 'published'.")
        if self.encoding not in ("joint", "own"):
            raise ValueError(f"encoding={self.encoding!r}: 'joint' or 'own'.")

    @property
    def reads_others(self) -> bool:
        """Whether the code depends on other models than the target."""
        return self.encoding == "joint"

    @cached_property
    def used(self) -> Crosscoder:
        """The crosscoder with the Normaliser that the protocol says."""
        if self.protocol == "calibrated":
            return self.crosscoder
        twin = copy.copy(self.crosscoder)  # shares the weights
        twin._buffers = self.crosscoder._buffers.copy()
        own = twin.normaliser
        twin.normaliser = Normaliser(own.mean * 0, own.scale * 0 + 1)
        return twin

    def _streams(self, target: int) -> dict[str, Any]:
        if self.encoding == "joint":
            return {}
        means = self.crosscoder.normaliser
        fill = means.mean if self.fill is None and not means.is_identity else self.fill
        return {"streams": [target], "fill": fill}

    def encode(self, h: Raw, target: int) -> Code:
        """The code f of raw activations."""
        return self.used.encode(h, **self._streams(target))

    def preactivations(self, h: Raw, target: int) -> Code:
        """What top-k selects from."""
        return self.used.preactivations(h, **self._streams(target))

    def select(self, preactivations: Code) -> Code:
        """The code that these pre-activations give: ReLU and top-k (or BatchTopK's threshold)."""
        return self.used.select(preactivations)

    def decode(self, f: Code, target: int, blocks: Sequence[str] | None = None) -> Own:
        """The target's reconstruction, raw units; ``blocks`` restricts the features that count."""
        return self.used.decode(f, blocks)[:, target]

    def rows(
        self, features: Sequence[int], target: int, rows_of: str | int | None = None
    ) -> Float[Tensor, "features d_model"]:
        """s_target W_dec[features, rows_of]: what one unit of each feature adds to the target.

        ``rows_of`` another model than the target is how an exclusive feature, whose row for the
        target is zero, is tried on the target all the same (A's rows written into the base).
        """
        of = target if rows_of is None else self.used.partition.model(rows_of)
        scale = self.used.normaliser.scale[target]
        return (self.used.W_dec[list(features), of] * scale).detach()


# ---------------------------------------------------------------------------------------------
# the vocabulary


@dataclass(eq=False)
class Site:
    """Raw activations of all models at some tokens, and which model is the target.

    Codes are kept, so a grid over one crosscoder encodes once.
    """

    h: Raw
    target: int
    _codes: dict[Codec, Tensor] = field(default_factory=dict, repr=False)

    @property
    def own(self) -> Own:
        """The target's own activations."""
        return self.h[:, self.target]

    def code(self, codec: Codec) -> Code:
        if codec not in self._codes:
            self._codes[codec] = codec.encode(self.h, self.target)
        return self._codes[codec]


class Intervention:
    """Gives new activations for the target. ``reads_others``: whether it looks at other models."""

    reads_others: bool = True

    def new(self, site: Site) -> Own:
        """New raw activations of the target."""
        return site.own + self.delta(site)

    def delta(self, site: Site) -> Own:
        """What is added to the target's activations."""
        return self.new(site) - site.own


@torch.no_grad()
def apply(
    intervention: Intervention, h: Raw | Site, target: int = 0
) -> tuple[Own, Float[Tensor, " batch"]]:
    """New activations of model ``target`` (an index), float32, and ||delta|| / ||h|| per row."""
    site = h if isinstance(h, Site) else Site(h.float(), target)
    new = intervention.new(site)
    return new, (new - site.own).norm(dim=-1) / site.own.norm(dim=-1).clamp_min(1e-30)


def apply_where(
    acted: Bool[Tensor, "prompt token"], intervention: Intervention, site: Site
) -> tuple[Float[Tensor, "prompt token d_model"], Float[Tensor, " prompt"]]:
    """The target's new activations where ``acted``, the old ones elsewhere, and the mean ||delta||
    / ||h|| over the former. ``site`` holds all tokens of all prompts as one batch.
    """
    new, ratio = apply(intervention, site)
    new = torch.where(acted.reshape(-1, 1), new, site.own).view(*acted.shape, -1)
    ratio = torch.where(acted, ratio.view(acted.shape), 0.0).sum(1)
    return new, ratio / acted.sum(1).clamp_min(1)


class Composed(Intervention):
    """One that sees other models through the codecs and interventions that it is made of alone."""

    @property
    def reads_others(self) -> bool:  # type: ignore[override]
        made_of = vars(self).values()
        return any(it.reads_others for it in made_of if isinstance(it, Codec | Intervention))


@dataclass(frozen=True, eq=False)
class Clean(Composed):
    """Nothing is changed."""

    def new(self, site: Site) -> Tensor:
        return site.own


@dataclass(frozen=True, eq=False)
class Reconstruction(Composed):
    """decode(encode(h)), with the features of ``blocks`` alone (default: all).

    ``("shared",)`` and ``("A_exclusive",)`` are the shared-only and exclusive-only reconstructions;
    the decoder bias (and the mean, when calibrated) stays in each.
    """

    codec: Codec
    blocks: tuple[str, ...] | None = None

    def new(self, site: Site) -> Tensor:
        return self.codec.decode(site.code(self.codec), site.target, self.blocks)


@dataclass(frozen=True, eq=False)
class Steer(Composed):
    """h + sum over ``features`` of (alpha - 1) f_i s_m W_dec[i, m], f after the top-k.

    alpha = 1 changes nothing, alpha = 0 ablates. ``rows_of``: write another model's decoder rows
    (by name or index) into the target.
    """

    codec: Codec
    features: tuple[int, ...]
    alpha: float
    rows_of: str | int | None = None

    def delta(self, site: Site) -> Tensor:
        f = site.code(self.codec)[:, list(self.features)]
        return (self.alpha - 1.0) * f @ self.codec.rows(self.features, site.target, self.rows_of)


@dataclass(frozen=True, eq=False)
class Clamp(Composed):
    """Set each of ``features`` to ``value`` (in units of the code): h + sum (value - f_i) s_m d_i.

    Acts also where the feature is silent, which scaling cannot.
    """

    codec: Codec
    features: tuple[int, ...]
    value: float
    rows_of: str | int | None = None

    def delta(self, site: Site) -> Tensor:
        f = site.code(self.codec)[:, list(self.features)]
        return (self.value - f) @ self.codec.rows(self.features, site.target, self.rows_of)


@dataclass(frozen=True, eq=False)
class Patch(Composed):
    """One vector in the place of every activation: a mean patch (of tool or of neutral text)."""

    vector: Float[Tensor, " d_model"]

    def new(self, site: Site) -> Tensor:
        return self.vector.to(site.h).expand_as(site.own)


@dataclass(frozen=True, eq=False)
class AddVector(Composed):
    """h + alpha v; with v the mean on tool text minus the mean on neutral text, the difference in
    means."""

    vector: Float[Tensor, " d_model"]
    alpha: float = 1.0

    def delta(self, site: Site) -> Tensor:
        return (self.alpha * self.vector.to(site.h)).expand_as(site.own)


@dataclass(frozen=True, eq=False)
class OtherModel(Intervention):
    """The activation of model ``source`` (an index) on the same tokens."""

    source: int

    def new(self, site: Site) -> Tensor:
        return site.h[:, self.source]


# ---------------------------------------------------------------------------------------------
# controls of matched size


def _unit(direction: Tensor) -> Tensor:
    """``direction`` (rows or one vector) at length 1; what is zero stays so."""
    norm = direction.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, direction / norm.clamp_min(1e-30), 0.0)


def _length(like: Intervention, site: Site) -> Float[Tensor, "batch 1"]:
    return like.delta(site).norm(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class RandomDirection(Composed):
    """h + ||delta of ``like``|| u, with a fixed direction u: is it this direction, or any?

    Draw many with :func:`random_directions`.
    """

    like: Intervention
    direction: Float[Tensor, " d_model"]

    def delta(self, site: Site) -> Tensor:
        return _unit(self.direction.to(site.h)) * _length(self.like, site)


def random_directions(
    like: Intervention,
    n: int,
    d_model: int,
    seed: int = 0,
    covariance: Float[Tensor, "d_model d_model"] | None = None,
) -> list[RandomDirection]:
    """``n`` norm-matched controls for ``like``: isotropic, or with the activations' covariance.

    Draw i is the same whatever ``n`` is.
    """
    generator = torch.Generator().manual_seed(seed)
    # One call per draw: torch fills small and large tensors from one seed differently.
    rows = [torch.randn(d_model, generator=generator, dtype=torch.float64) for _ in range(n)]
    z = torch.stack(rows)
    if covariance is not None:
        c = covariance.double().cpu()
        # Not Cholesky: a covariance from fewer vectors than dimensions is singular, and rounding in
        # float32 makes some of its zero eigenvalues slightly negative.
        values, vectors = torch.linalg.eigh((c + c.T) / 2)
        # The symmetric root is unique, whatever signs and order the eigenvectors come in.
        z = z @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return [RandomDirection(like, (u / u.norm()).float()) for u in z]


@dataclass(frozen=True, eq=False)
class RandomFeatures(Composed):
    """``size`` random *active* features of ``block``, their summed output scaled to ||delta|| of
    ``like``: is it these features, or any that fire?

    Which ones is drawn by a random order of all features given by ``seed``; each row takes the
    first ``size`` that are active on it (fewer where fewer are; where none is, nothing is changed).
    ``exclude`` leaves out the features under test.
    """

    codec: Codec
    block: str
    like: Intervention
    size: int = 1
    seed: int = 0
    exclude: tuple[int, ...] = ()
    rows_of: str | int | None = None

    def delta(self, site: Site) -> Tensor:
        f = site.code(self.codec)
        block = self.codec.used.partition.slice(self.block)
        allowed = set(range(*block.indices(f.shape[1]))) - set(self.exclude)
        order = torch.randperm(f.shape[1], generator=torch.Generator().manual_seed(self.seed))
        order = [feature for feature in order.tolist() if feature in allowed]
        active = f[:, order] > 0
        chosen = active & (active.cumsum(1) <= self.size)
        rows = self.codec.rows(order, site.target, self.rows_of)
        if not bool(rows.any()):
            raise ValueError(
                f"block {self.block!r} has only zero rows for model {site.target}: nothing to add. "
                "Choose a block of that model, or set rows_of."
            )
        return _unit((f[:, order] * chosen) @ rows) * _length(self.like, site)


@dataclass(frozen=True, eq=False)
class Dose(Composed):
    """The change of ``of`` with its length set to ``length``, in raw units, on every row.

    What differs between two of the same length is the direction alone. A row that ``of`` does not
    change, where a feature is silent say, stays as it is.
    """

    of: Intervention
    length: float

    def delta(self, site: Site) -> Tensor:
        return _unit(self.of.delta(site)) * self.length


# ---------------------------------------------------------------------------------------------
# names for caches


def key(value: Any, _seen: dict[int, str] | None = None) -> str:
    """16 hex digits that name an intervention by its content: kind, parameters, weights, vectors.

    A kind that is defined elsewhere, in a notebook say, counts by its source code (comments and
    docstrings left out); functions and globals that this uses do not count.
    """
    return store.key(_content(value, {} if _seen is None else _seen))


def _content(value: Any, seen: dict[int, str]) -> str:
    if isinstance(value, nn.Module):
        if id(value) not in seen:
            # k and the like decide the code and are no weights.
            config = value.cfg.to_dict() if isinstance(value, Crosscoder) else {}
            settings = {k: v for k, v in config.items() if k not in ("device", "metadata")}
            seen[id(value)] = store.key(fingerprint(value), settings)
        return seen[id(value)]
    if isinstance(value, Tensor):
        return repr(value.tolist())  # every digit, which its own repr leaves out
    if isinstance(value, Intervention | Codec):
        names = [f.name for f in dataclasses.fields(value)]
        fields = ",".join(f"{name}={_content(getattr(value, name), seen)}" for name in names)
        elsewhere = [kind for kind in type(value).__mro__[:-1] if kind.__module__ != __name__]
        return f"{type(value).__name__}({fields}){''.join(map(_source, elsewhere))}"
    if isinstance(value, tuple | list):
        return f"[{','.join(_content(v, seen) for v in value)}]"
    return repr(value)


def _source(kind: type) -> str:
    """The code of a class's members: in Jupyter a class does not know its own."""
    texts = []
    for name, value in vars(kind).items():
        value = getattr(value, "fget", value)  # of a property
        if inspect.isfunction(value):
            with suppress(OSError):  # dataclass writes methods that have no source
                texts.append(code_text(textwrap.dedent(inspect.getsource(value))))
        elif isinstance(value, bool | int | float | str) and not name.startswith("__"):
            texts.append(f"{name}={value!r}")
    return "".join(texts)
