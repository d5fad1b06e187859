"""The crosscoder: one sparse dictionary over the residual streams of several models.

With ``z_m`` the normalised activation of model ``m``::

    f     = TopK(ReLU(sum_m z_m @ W_enc[m] + b_enc))    # (batch, d_dict), k features per sample
    z^_m  = f @ W_dec[:, m] + b_dec[m]                  # (batch, d_model)

A *Dedicated Feature Crosscoder* (arXiv 2606.26474) gives every model a block of features of its
own: an exclusive feature may read and write one model only, its other weights are exactly zero at
all times. Here that is a ``Partition``; a plain crosscoder is the partition with one shared block.
Raw activations enter and leave through a ``Normaliser``, which is part of the checkpoint: a
dictionary without the scale that it was trained in is not the same dictionary.

``W_enc`` is ``(n_models, d_model, d_dict)`` and ``W_dec`` ``(d_dict, n_models, d_model)``; both are
views of feature-major storage, see ``kernels``. The class is registered with SAELens as
``dfc_crosscoder``: once this module is imported, ``sae_lens.SAE.load_from_disk`` reads a checkpoint
back. The loss is in ``losses``, the training loop in ``loop``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor, nn

from dfc_lib.crosscoder import kernels, losses
from dfc_lib.crosscoder.losses import Scalar, Variant
from dfc_lib.crosscoder.partition import Normaliser, Partition, Raw, Rows
from dfc_lib.store import save_tensors, write_atomically

ARCHITECTURE = "dfc_crosscoder"
# Of a feature's decoder row over all models. Adam's fixed step turns a short row faster: 0.3
# explained more variance than 1 in short runs.
INIT_NORM = 0.3
Flat = Float[Tensor, "batch model*d_model"]  # the same in normalised units, concatenated
Code = Float[Tensor, "batch d_dict"]  # features
Streams = Sequence[str | int] | None  # models by name or index
Means = Float[Tensor, "model d_model"] | None  # raw units


@dataclass(kw_only=True)
class CrosscoderConfig(SAEConfig):
    """As SAELens stores it. ``d_in`` is ``n_models * d_model``, ``d_sae`` is ``d_dict``.

    Args:
        k: active features per sample (on average over the batch if ``batchtopk``).
        partition: ``Partition.to_dict()``.
        batchtopk: select over the batch in training (arXiv 2412.06410), by a threshold afterwards.
        tie_shared: a shared feature's decoder rows are equal in all models (normalised units).
        tie_bias: so is the decoder's bias.
    """

    k: int
    partition: dict[str, Any]
    batchtopk: bool = False
    tie_shared: bool = False
    tie_bias: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class Forward(NamedTuple):
    """One forward pass in normalised units, with the code kept sparse."""

    z: Flat
    reconstruction: Flat
    preactivations: Code  # detached
    pattern: kernels.Pattern
    activations: Float[Tensor, " entries"]  # of the entries of ``pattern``, after ReLU

    def firings(self) -> Int64[Tensor, " d_dict"]:
        """In how many samples each feature is active."""
        return self.pattern.feature[self.activations > 0].bincount(minlength=self.pattern.d_dict)


class Crosscoder(SAE[CrosscoderConfig]):
    """A crosscoder, in training (``training``) or trained (``checkpoint``).

    It is made in evaluation mode. The mode matters to BatchTopK alone: in training it selects over
    the batch, in use by its threshold.

    Gradients are with respect to its weights alone, and are added to a weight's ``.grad`` where
    there is one. They obey the partition and the ties after ``constrain_grads_``.
    """

    @classmethod
    def create(
        cls,
        d_model: int,
        partition: Partition,
        k: int,
        normaliser: Normaliser | None = None,
        *,
        init_seed: int = 0,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> "Crosscoder":
        """A crosscoder with initial weights and, unless one is given, the identity normaliser.

        Initial weights: one random direction per feature, the same in every model that the feature
        belongs to, so that no model starts with an advantage; the encoder is the decoder's
        transpose; biases are zero.

        ``tie_shared`` ties the decoder rows only. A feature *means* what it writes. A tied encoder
        could read nothing but the mean of the streams, which would cost fidelity and push no
        difference into the exclusive blocks. ``tie_bias``: without it the biases hold the mean
        difference of two models, and a feature that fires where the difference is *absent* explains
        it as well as one that fires where it is present.

        Args:
            options: of ``CrosscoderConfig``: ``batchtopk``, ``tie_shared``, ``tie_bias``,
                ``dtype`` (such as ``"float64"``) and ``device``.

        Raises:
            ValueError: ``k`` is not between 1 and the dictionary size.
        """
        cfg = CrosscoderConfig(
            d_in=partition.n_models * d_model,
            d_sae=partition.dict_size,
            k=k,
            partition=partition.to_dict(),
            metadata=SAEMetadata(**(metadata or {})),
            **options,
        )
        crosscoder = cls(cfg)
        generator = torch.Generator().manual_seed(init_seed)
        directions = torch.randn(partition.dict_size, 1, d_model, generator=generator)
        with torch.no_grad():
            rows = crosscoder.W_dec
            rows.copy_(directions.expand_as(rows))
            partition.zero_forbidden_(rows)
            rows *= INIT_NORM / rows.norm(dim=(1, 2), keepdim=True)
            crosscoder.encoder.copy_(crosscoder.decoder)
        if normaliser is not None:
            crosscoder.normaliser = normaliser
        return crosscoder

    def initialize_weights(self) -> None:  # called by SAELens' constructor
        cfg = self.cfg
        self.partition = Partition.from_dict(cfg.partition)
        self.n_models, self.d_dict = self.partition.n_models, self.partition.dict_size
        self.d_model = cfg.d_in // self.n_models
        if not 1 <= cfg.k <= self.d_dict:
            raise ValueError(f"k={cfg.k} must lie between 1 and the {self.d_dict} features")

        options = {"dtype": self.dtype, "device": self.device}
        self.encoder = nn.Parameter(torch.zeros(self.d_dict, cfg.d_in, **options))
        self.decoder = nn.Parameter(torch.zeros(self.d_dict, cfg.d_in, **options))
        self.b_enc = nn.Parameter(torch.zeros(self.d_dict, **options))
        self.b_dec = nn.Parameter(torch.zeros(self.n_models, self.d_model, **options))
        mean, scale = torch.zeros_like(self.b_dec), torch.ones(self.n_models, **options)
        self.register_buffer("normaliser_mean", mean.detach())
        self.register_buffer("normaliser_scale", scale)
        self.register_buffer("threshold", torch.zeros((), **options))
        self.reserved: list[slice] = []  # blocks with a place of their own among the top k
        self.eval()

    # -- weights and their constraints

    @property
    def W_enc(self) -> Float[Tensor, "model d_model d_dict"]:
        """Encoder weights, normalised units: a view of the parameter ``encoder``."""
        return self._rows(self.encoder).permute(1, 2, 0)

    @property
    def W_dec(self) -> Rows:
        """Decoder weights, normalised units: a view of the parameter ``decoder``."""
        return self._rows(self.decoder)

    def _rows(self, flat: Float[Tensor, "d_dict model*d_model"]) -> Rows:
        return flat.unflatten(1, (self.n_models, self.d_model))

    @property
    def normaliser(self) -> Normaliser:
        return Normaliser(self.normaliser_mean, self.normaliser_scale)

    @normaliser.setter
    def normaliser(self, value: Normaliser) -> None:
        # New tensors, not copies into the old: a normaliser that was read before stays what it was.
        self.normaliser_mean = value.mean.to(self.normaliser_mean, copy=True)
        self.normaliser_scale = value.scale.to(self.normaliser_scale, copy=True)

    def decoder_rows(
        self, model: str | int, features: Any = slice(None)
    ) -> Float[Tensor, "features d_model"]:
        """``s_m * W_dec[features, m]``: what a unit of a feature adds to the stream, raw units."""
        m = self.partition.model(model)
        return (self.W_dec[features, m] * self.normaliser_scale[m]).detach()

    @torch.no_grad()
    def integrity(self) -> dict[str, float]:
        """The largest forbidden weights and the largest gap between tied rows; all must be 0."""
        tied = [self.W_dec[features] for features in self._tied()]
        tied += [self.b_dec[None]] if self.cfg.tie_bias else []
        return {
            "encoder": self.partition.largest_forbidden(self._rows(self.encoder)),
            "decoder": self.partition.largest_forbidden(self._rows(self.decoder)),
            "tied": max((float((r - r[:, :1]).abs().amax()) for r in tied), default=0.0),
        }

    def check_integrity(self) -> None:
        """Raises ``ValueError`` unless forbidden weights are 0 and tied rows equal, exactly."""
        if broken := {name: value for name, value in self.integrity().items() if value != 0.0}:
            raise ValueError(
                f"the partition is violated (largest absolute value that must be 0: {broken}); "
                f"the features are not in the order {list(self.partition.names)}, or the file is "
                "damaged"
            )

    def _tied(self) -> list[slice]:
        blocks = self.partition.shared_blocks if self.cfg.tie_shared else []
        return [self.partition.slices[block.name] for block in blocks]

    def constrain_grads_(self) -> None:
        """Make ``.grad`` obey the partition and the ties; after every ``backward``."""
        self.partition.zero_forbidden_(self._rows(self.encoder.grad))
        rows = self.partition.zero_forbidden_(self._rows(self.decoder.grad))
        for features in self._tied():  # one parameter in several places: each gets the whole sum
            rows[features] = rows[features].sum(dim=1, keepdim=True)
        if self.cfg.tie_bias:
            self.b_dec.grad[:] = self.b_dec.grad.sum(0, keepdim=True)

    @torch.no_grad()
    def tie_(self) -> None:
        """Copy model 0's rows of tied features to the other models.

        Equal gradients keep them equal but for the rounding of the optimiser's last lane.
        """
        for features in self._tied():
            self.W_dec[features, 1:] = self.W_dec[features, :1]
        if self.cfg.tie_bias:
            self.b_dec[1:] = self.b_dec[:1]

    # -- encode and decode, raw units

    def encode(self, x: Raw, streams: Streams = None, fill: Means = None) -> Code:
        """Raw activations to features.

        Args:
            streams: the models to read from (default: all). The others are set to
                their mean, so ``["B"]`` is base-only encoding; ``x`` is not looked at for them.
            fill: what replaces the other streams (default: the normaliser's mean).

        Raises:
            ValueError: ``x`` has another shape; or a mean is needed and the normaliser is the
                identity, which knows none.
        """
        return self.hook_sae_acts_post(self.select(self.preactivations(x, streams, fill)))

    def select(self, preactivations: Code) -> Code:
        """The code that pre-activations give: ReLU and top-k (or BatchTopK's threshold)."""
        pattern = self._select(preactivations.detach())
        return pattern.dense(preactivations[pattern.sample, pattern.feature].relu())

    def preactivations(self, x: Raw, streams: Streams = None, fill: Means = None) -> Code:
        """What ``encode`` selects from, before ReLU and top-k. Arguments as there."""
        z = self._normalise(x, streams, fill)
        return self.hook_sae_acts_pre(z @ self.encoder.T + self.b_enc)

    def decode(self, f: Code, blocks: str | Sequence[str] | None = None) -> Raw:
        """Features to raw activations of all models.

        Args:
            blocks: use the features of these blocks only (``"shared"``, ``["A_exclusive"]``).
        """
        if blocks is not None:
            keep = torch.zeros(self.d_dict, dtype=torch.bool, device=f.device)
            for block in [blocks] if isinstance(blocks, str) else blocks:
                keep[self.partition.slice(block)] = True
            f = f * keep
        z = self._rows(f.to(self.dtype) @ self.decoder) + self.b_dec
        return self.hook_sae_recons(self.normaliser.invert(z))

    def reconstruct(self, x: Raw) -> Raw:
        """``decode(encode(x))``, raw to raw."""
        return self.decode(self.encode(x))

    def error(self, x: Raw) -> Raw:
        """What the crosscoder leaves out: ``x - reconstruct(x)``, raw units."""
        return x - self.reconstruct(x)

    def _normalise(self, x: Raw, streams: Streams = None, fill: Means = None) -> Flat:
        if x.ndim != 3 or x.shape[1:] != (self.n_models, self.d_model):
            raise ValueError(
                f"expected activations of shape (batch, {self.n_models}, {self.d_model}), got "
                f"{tuple(x.shape)}"
            )
        x = x.to(self.encoder.device, self.dtype)  # wherever the cache was read to
        if streams is not None:
            read = {self.partition.model(stream) for stream in streams}
            if fill is None and self.normaliser.is_identity:
                raise ValueError(
                    "the identity normaliser knows no mean for the streams that are left out: pass "
                    "fill=, the mean raw activation of each model"
                )
            fill = (self.normaliser_mean if fill is None else fill).to(x).expand_as(x)
            models = range(self.n_models)
            x = torch.stack([(x if m in read else fill)[:, m] for m in models], dim=1)
        return self.hook_sae_input(self.normaliser.apply(x).flatten(1))

    def _select(self, preactivations: Code) -> kernels.Pattern:
        if self.reserved:
            return kernels.reserved_top_k(preactivations, self.cfg.k, self.reserved)
        if not self.cfg.batchtopk:
            return kernels.top_k(preactivations, self.cfg.k)
        if self.training:
            return kernels.batch_top_k(preactivations, self.cfg.k)
        return kernels.above(preactivations, float(self.threshold))

    # -- loss

    def loss(
        self,
        x: Raw,
        shared_coef: float = 0.0,
        exclusive_coef: float = 0.0,
        variant: Variant = "published",
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """``mse + shared_coef * l1_shared + exclusive_coef * l1_exclusive``.

        See ``losses`` for the terms, and for what ``variant`` decides. Who differentiates it calls
        ``constrain_grads_`` before the optimiser's step.

        Returns:
            The total, and all terms before weighting.
        """
        terms = losses.terms(self, self.forward_sparse(x), variant)
        return losses.weigh(terms, shared_coef, exclusive_coef), terms

    def forward_sparse(self, x: Raw) -> Forward:
        """Forward pass that touches only active rows after the encoder's product."""
        z = self._normalise(x)
        with torch.no_grad():
            preactivations = torch.addmm(self.b_enc, z, self.encoder.T)
            pattern = self._select(preactivations)
        encoded = kernels.Encode.apply(z, self.encoder, self.b_enc, preactivations, pattern)
        values = encoded.relu()
        reconstruction = kernels.Decode.apply(values, self.decoder, pattern)
        return Forward(z, reconstruction + self.b_dec.flatten(), preactivations, pattern, values)

    @torch.no_grad()
    def update_threshold_(self, forward: Forward, rate: float) -> None:
        """BatchTopK: move the threshold towards the smallest activation that was selected."""
        if not self.cfg.batchtopk:
            return
        positive = forward.activations[forward.activations > 0]
        if positive.numel():
            moved = self.threshold.lerp(positive.min(), rate)
            self.threshold.copy_(torch.where(self.threshold > 0, moved, positive.min()))

    # -- disk

    def save(self, directory: str | Path) -> Path:
        """Write the inference checkpoint: ``sae_weights.safetensors`` and ``cfg.json``.

        Never half written: each file is replaced at once, the configuration last.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.cfg.to_dict()
        config["device"] = "cpu"  # where it was trained says nothing about where it will be used
        save_tensors(self.state_dict(), directory / SAE_WEIGHTS_FILENAME)
        write_atomically(directory / SAE_CFG_FILENAME, json.dumps(config, indent=2) + "\n")
        return directory

    def process_state_dict_for_loading(self, state_dict: dict[str, Tensor]) -> None:
        """Called by every SAELens loader: refuse what is not whole and intact."""
        for name, expected in self.state_dict().items():
            if name not in state_dict:
                raise ValueError(
                    f"the checkpoint has no {name}, it is not a whole {ARCHITECTURE}; without the "
                    "scale that it was trained in (normaliser_*) its features would be wrong. "
                    "Train it again; a published checkpoint is read by load_published"
                )
            found = state_dict[name]
            if found.shape != expected.shape:
                raise ValueError(
                    f"{name} has shape {tuple(found.shape)}, {SAE_CFG_FILENAME} asks for "
                    f"{tuple(expected.shape)}"
                )
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"{name} contains NaN or infinity")
        for name in ("encoder", "decoder"):
            if largest := self.partition.largest_forbidden(self._rows(state_dict[name])):
                raise ValueError(f"{name} violates the partition: a forbidden weight is {largest}")

    def _not_for_a_crosscoder(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "what SAELens folds into an SAE's weights would change which features are among the "
            "top k; the scale of each model is in crosscoder.normaliser"
        )

    fold_W_dec_norm = fold_activation_norm_scaling_factor = _not_for_a_crosscoder
    fold_activation_whitening = _not_for_a_crosscoder


# A notebook's autoreload executes this module again; SAELens refuses to register a name twice.
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
register_sae_class(ARCHITECTURE, Crosscoder, CrosscoderConfig)
