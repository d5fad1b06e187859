"""Pretraining of the embedded base model: documents -> packed token rows -> a small Qwen2,
resumable at any step.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from dfc_lib import provenance
from dfc_lib.store import save_tensors, write_atomically
from tools.make_pair import world
from tools.make_pair.tokenizer import END_OF_TEXT, train_tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """Size, data and optimiser of the base model; lengths in tokens."""

    n_layers: int = 5
    d_model: int = 128
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2  # grouped queries, as in Qwen2.5
    row_length: int = 384
    batch_size: int = 16  # rows
    micro_batch: int = 4  # rows at a time: what fits into a core's cache is 1.2x faster
    steps: int = 3_300
    first_phase: int = 1_400  # steps on documents in which each tool has one name
    warmup: int = 100
    muon_lr: float = 4e-3  # hidden matrices
    adam_lr: float = 4e-3  # embeddings, norms and biases
    seed: int = 0
    save_every: int = 200


def make_tokenizer(directory: Path, seed: int, n_documents: int = 20_000) -> None:
    rng = random.Random(f"tokenizer-{seed}")
    train_tokenizer((world.document(rng, world.FIRST) for _ in range(n_documents)), directory)


def pack(
    tokenizer, config: PretrainConfig, phase: world.Phase, steps: int, path: Path
) -> np.ndarray:
    """Documents of a phase joined by the end-of-text token and cut into rows, cached at `path`.

    Returns:
        uint16 token ids, (steps * batch_size, row_length).
    """
    if path.exists():
        return np.load(path, mmap_mode="r")
    n_rows = steps * config.batch_size
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    rng = random.Random(f"documents-{config.seed}{'-aliases' if phase.aliases else ''}")
    flat = np.empty(n_rows * config.row_length, dtype=np.uint16)
    filled = 0
    with tqdm(total=len(flat), desc="documents", unit="token", mininterval=5) as bar:
        while filled < len(flat):
            batch = [world.document(rng, phase) for _ in range(1_000)]
            for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                ids = [*ids, end][: len(flat) - filled]
                flat[filled : filled + len(ids)] = ids
                filled += len(ids)
                bar.update(len(ids))
    partial = path.with_suffix(".partial.npy")
    np.save(partial, flat.reshape(n_rows, config.row_length))
    os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def new_model(config: PretrainConfig, tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=1024,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _optimizers(model, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    # Muon (orthogonalised momentum) reaches the same loss in markedly fewer tokens than AdamW at
    # this size.
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            hidden, lr=config.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=config.adam_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def _rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last 40 % of the steps."""
    decay = int(0.4 * config.steps)
    return min(1.0, (step + 1) / config.warmup, (config.steps - step) / decay)


def _loss_of(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mean cross-entropy of the next token over rows of token ids, (row, position).

    Compiled where there is a C++ compiler, and in bf16 where the processor computes in it: 1.3x
    each. The weights and the optimisers' state stay in fp32.
    """
    bf16 = torch.cpu._is_avx512_bf16_supported() and not any(provenance.arithmetic().values())

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=x, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()
        )

    # Compiled code adds up an embedding's gradient in the order in which threads arrive, unless:
    torch.use_deterministic_algorithms(True)
    return torch.compile(loss) if shutil.which("c++") else loss


def pretrain(config: PretrainConfig, tokenizer, directory: Path) -> Path:
    """Train the base model; resumes from the last save under `directory`. Returns the folder of the
    final model.
    """
    final = directory / "base"
    if (final / "model.safetensors").exists():
        return final
    directory.mkdir(parents=True, exist_ok=True)
    first, second = config.first_phase, config.steps - config.first_phase
    rows = np.concatenate(
        [
            pack(tokenizer, config, world.FIRST, first, directory / "rows_first.npy"),
            pack(tokenizer, config, world.SECOND, second, directory / "rows_second.npy"),
        ]
    )
    model = new_model(config, tokenizer).train()
    optimizers = _optimizers(model, config)
    state = directory / "pretrain.safetensors"
    start = 0
    if state.exists():
        start = _resume(state, model, optimizers)
        _cut_log(directory / "pretrain.jsonl", start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="pretraining")
    next_token_loss = _loss_of(model)
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * _rate(step, config)
        batch = rows[step * config.batch_size : (step + 1) * config.batch_size].astype(np.int64)
        loss = 0.0
        for x in torch.from_numpy(batch).split(config.micro_batch):
            share = next_token_loss(x) * len(x) / len(batch)
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
            with (directory / "pretrain.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": round(loss, 4)}) + "\n")
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            _save(state, model, optimizers, step + 1)
    torch.use_deterministic_algorithms(False)  # see _loss_of; what comes after knows nothing of it
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    return final


def _cut_log(path: Path, start: int) -> None:
    """Drop what a run logged after its last save: those steps are done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < start]
    write_atomically(path, "".join(kept))


def _save(path: Path, model, optimizers, step: int) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for key, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}.{n}": torch.as_tensor(v) for n, v in entry.items()}
    save_tensors(tensors, path, {"step": str(step)})


def _resume(path: Path, model, optimizers) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        entries: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, key, field = name.split(".")
                entries.setdefault(int(key), {})[field] = tensor
        optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
