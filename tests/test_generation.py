"""The engine against plain loops: same tokens, whatever the batch, lengths or interruptions."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.reference import generate_reference
from dfc_lib import paths, profiles
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.crosscoder.training import TrainConfig, train
from dfc_lib.data.activations import residual
from dfc_lib.data.pair import Pair, PairError, load_pair
from dfc_lib.data.prompts import FIXED_STYLE, chat_text, encode, read_records
from dfc_lib.steering import generation as gen
from dfc_lib.steering import interventions as iv
from dfc_lib.steering import prefix, sampling
from dfc_lib.steering.evaluation import end_tokens
from dfc_lib.steering.interventions import Codec

EOS, VOCAB, WIDTH = 3, 96, 64
ENDS = list(range(8))  # several end tokens, so that rows of a random model stop at various steps
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # wide, so that no two logits are nearly equal
}


def tiny(seed, kind=Qwen2ForCausalLM, config=Qwen2Config, **more):
    torch.manual_seed(seed)
    return kind(config(**(SIZES | more))).eval().requires_grad_(False)


def make_pair(layer=1):
    return Pair({"A": tiny(0), "B": tiny(1)}, None, layer)


def make_prompts(n=12, seed=0):
    draw = np.random.default_rng(seed)
    lengths = [1, 2, *draw.integers(3, 30, n - 2)]
    return [draw.integers(4, VOCAB, length).tolist() for length in lengths]


def make_crosscoder(pair, prompts):
    with torch.no_grad():
        texts = [torch.tensor([p]) for p in prompts]
        h = [
            torch.stack([residual(m, pair.layer, ids)[0] for m in pair.models.values()], 1)
            for ids in texts
        ]
    normaliser = Normaliser.fit(torch.cat(h))
    return Crosscoder.create(WIDTH, Partition.dedicated(96, 0.2), 12, normaliser).requires_grad_(
        False
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PlusError(iv.Composed):
    """The reconstruction and what it leaves out: must behave as clean does."""

    codec: Codec

    def new(self, site):
        reconstruction = self.codec.decode(site.code(self.codec), site.target)
        return reconstruction + (site.own - reconstruction)


def make_grid(crosscoder):
    """One cell at least of every kind of intervention."""
    codec, own = Codec(crosscoder), Codec(crosscoder, encoding="own")
    published = Codec(crosscoder, "published")
    block = tuple(range(19))
    steer = iv.Steer(codec, block, 4.0)
    torch.manual_seed(5)
    mean, difference = torch.randn(2, crosscoder.d_model) * 10
    return {
        "clean": iv.Clean(),
        "reconstruction": iv.Reconstruction(codec),
        "reconstruction, published": iv.Reconstruction(published),
        "shared-only": iv.Reconstruction(codec, ("shared",)),
        "exclusive-only": iv.Reconstruction(codec, ("A_exclusive",)),
        "own encoding": iv.Reconstruction(own),
        "plus error": PlusError(codec),
        "alpha=1": iv.Steer(codec, block, 1.0),
        "alpha=4": steer,
        "rows of B": iv.Steer(codec, tuple(range(19, 38)), 4.0, rows_of="B"),
        "ablate": iv.Steer(codec, block, 0.0),
        "clamp": iv.Clamp(codec, block[:3], 20.0),
        "mean patch": iv.Patch(mean),
        "difference": iv.AddVector(difference, 2.0),
        "difference at a length": iv.Dose(iv.AddVector(difference), 40.0),
        "other model": iv.OtherModel(1),
        "random direction": iv.random_directions(steer, 1, crosscoder.d_model)[0],
        "random features": iv.RandomFeatures(codec, "shared", steer, size=3),
    }


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


@pytest.fixture(scope="module")
def grid(pair, prompts):
    return make_grid(make_crosscoder(pair, prompts))


def run(pair, prompts, grid, **kwargs):
    usual = {"progress": False, "eos": ENDS, "readout": range(VOCAB)}
    return gen.generate(pair, "A", prompts, grid, **(usual | kwargs))


@pytest.fixture(scope="module")
def table(pair, prompts, grid):
    return run(pair, prompts, grid, max_new_tokens=8)


def same(a, b):
    assert a["tokens"].tolist() == b["tokens"].tolist()
    assert a[["prompt", "cell"]].equals(b[["prompt", "cell"]])
    np.testing.assert_allclose(a["delta"], b["delta"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        np.stack(a["first_logprobs"]), np.stack(b["first_logprobs"]), rtol=1e-3, atol=1e-3
    )


def compare_with_reference(pair, prompts, grid, table, position, max_new_tokens):
    for row in table.itertuples():
        tokens, first = generate_reference(
            pair,
            "A",
            prompts[row.prompt],
            grid[row.cell],
            position=position,
            max_new_tokens=max_new_tokens,
            eos=ENDS,
        )
        assert row.tokens == tokens, (row.prompt, row.cell, position)
        np.testing.assert_allclose(row.first_logprobs, first.log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_engine_equals_the_plain_loop_at_the_last_token(pair, prompts, grid, table):
    """The headline: every kind of intervention, >= 200 pairs, token for token."""
    assert len(table) == len(prompts) * len(grid) >= 200
    lengths = table["tokens"].map(len)
    assert lengths.min() < 8 == lengths.max()  # early stops are exercised
    compare_with_reference(pair, prompts, grid, table, "last", 8)


def test_the_grid_has_every_kind(grid):
    """A new kind of intervention must join the grid that the tests here run on."""
    kinds, found = [iv.Intervention], set()
    while kinds:
        below = (kind := kinds.pop()).__subclasses__()
        kinds += below
        if not below and kind.__module__ == iv.__name__:
            found.add(kind)
    assert len(found) >= 10
    assert found == {type(cell) for cell in grid.values()} - {PlusError}


@pytest.mark.parametrize("position", ["every", "every_but_first"])
def test_engine_equals_the_plain_loop_at_every_token(pair, prompts, grid, position):
    """Here the intervention also acts on the tokens generated, through both models' streams."""
    few = prompts[:4] if position == "every" else prompts[1:3]
    table = run(pair, few, grid, max_new_tokens=5, position=position, batch_size=40)
    compare_with_reference(pair, few, grid, table, position, 5)


def test_interventions_matter_and_no_ops_do_not(table):
    """Equal outputs everywhere would also satisfy the tests above."""
    by_cell = {cell: rows["tokens"].tolist() for cell, rows in table.groupby("cell")}
    for cell in ("alpha=1", "plus error"):
        assert by_cell[cell] == by_cell["clean"], cell
    for cell in set(by_cell) - {"clean", "alpha=1", "plus error"}:
        assert by_cell[cell] != by_cell["clean"], cell
    assert len({str(tokens) for tokens in by_cell.values()}) >= len(by_cell) - 2
    delta = table.groupby("cell")["delta"].mean()
    assert delta["clean"] == delta["alpha=1"] == 0
    assert delta["random direction"] == pytest.approx(delta["alpha=4"], rel=1e-4)


def test_results_do_not_depend_on_the_batch(pair, prompts, grid, table):
    same(run(pair, prompts, grid, max_new_tokens=8, batch_size=7), table)
    backwards = run(pair, prompts[::-1], grid, max_new_tokens=8, batch_size=50)
    assert backwards["tokens"].tolist()[-len(grid) :] == table["tokens"].tolist()[: len(grid)]


def test_prompts_read_before_give_the_same(pair, prompts, grid, table):
    cache = prefix.PrefixCache(pair, prompts, batch_size=3)
    same(run(pair, prompts, grid, max_new_tokens=8, batch_size=50, prefix_cache=cache), table)
    some = run(pair, prompts[3:5], grid, max_new_tokens=8, prefix_cache=cache)
    assert some["tokens"].tolist() == table["tokens"][3 * len(grid) : 5 * len(grid)].tolist()
    for t, name in enumerate(pair.names):
        for i, prompt in enumerate(prompts):
            h = residual(pair.models[name], pair.layer, torch.tensor([prompt]))[0, -1]
            torch.testing.assert_close(cache.h[i, t], h, rtol=1e-3, atol=1e-4)


def test_a_prefix_cache_of_other_prompts_is_refused(pair, prompts):
    cache, clean = prefix.PrefixCache(pair, prompts[:2]), {"clean": iv.Clean()}
    with pytest.raises(ValueError, match=r"prompts\[2\]"):
        run(pair, prompts, clean, prefix_cache=cache)
    with pytest.raises(ValueError, match="another pair"):
        run(Pair({"A": tiny(7), "B": tiny(1)}, None, 1), prompts[:2], clean, prefix_cache=cache)
    with pytest.raises(ValueError, match="position"):
        run(pair, prompts[:2], clean, prefix_cache=cache, position="every")


def test_out_of_memory_backs_off(pair, prompts, grid, table, monkeypatch):
    """Memory running out in the middle must cost time, not results."""
    logits = prefix.Stream.logits

    def short_of_memory(self, hidden):
        if len(hidden) > 20:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return logits(self, hidden)

    monkeypatch.setattr(prefix.Stream, "logits", short_of_memory)
    with pytest.warns(UserWarning, match="out of memory: going on with batch_size="):
        same(run(pair, prompts, grid, max_new_tokens=8, batch_size=100), table)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The shipped pair, evaluation prompts with a gold call, and the grid of a quick crosscoder."""
    profile = profiles.get("toy")
    names = {"A": profile.model_a, "B": profile.model_b}
    pair = load_pair(
        {name: profile.location(where) for name, where in names.items()}, profile.layer
    )
    records = read_records(paths.DATA / "prompts" / "evaluation.jsonl")
    records = [record for record in records if record.kind == "call"][:40]
    prompts = encode(pair.tokenizer, [chat_text(pair.tokenizer, r, FIXED_STYLE) for r in records])
    texts = [torch.tensor([p]) for p in prompts]
    h = [
        torch.stack([residual(m, pair.layer, i)[0, 1:] for m in pair.models.values()], 1)
        for i in texts
    ]
    config = TrainConfig(Partition.dedicated(96, 0.2), 12, steps=150, batch_size=256, lr=3e-3)
    folder = tmp_path_factory.mktemp("crosscoder") / "run"
    crosscoder = train(config, torch.cat(h), folder, progress=False).requires_grad_(False)
    return pair, prompts, make_grid(crosscoder)


def test_engine_equals_the_plain_loop_on_the_shipped_pair(embedded):
    """Long prompts, real answers: every kind of intervention on both models."""
    pair, prompts, grid = embedded
    asked = {"max_new_tokens": 40, "eos": end_tokens(pair.models["A"], pair.tokenizer)}
    for target, some in (("A", prompts[:2]), ("B", prompts[2:4])):
        readout = range(len(pair.models[target].lm_head.weight))
        table = gen.generate(pair, target, some, grid, readout=readout, progress=False, **asked)
        assert table["tokens"].map(len).min() < 40
        for row in table.itertuples():
            prompt, ids = some[row.prompt], torch.tensor([some[row.prompt]])
            h = torch.stack([residual(m, pair.layer, ids)[0] for m in pair.models.values()], 1)
            args = pair, target, prompt, grid[row.cell]
            tokens, first = generate_reference(*args, hidden=h, **asked)
            assert row.tokens == tokens, (target, row.prompt, row.cell)
            np.testing.assert_allclose(row.first_logprobs, first.log_softmax(-1), atol=1e-3)


def test_no_ops_equal_clean_on_the_shipped_pair(embedded):
    """alpha = 1 and reconstruction + error: token for token, where other cells differ."""
    pair, prompts, grid = embedded
    some = {name: grid[name] for name in ("clean", "alpha=1", "plus error", "mean patch")}
    asked = {"eos": end_tokens(pair.models["A"], pair.tokenizer), "readout": []}
    for target in pair.names:
        args = pair, target, prompts, some
        table = gen.generate(*args, max_new_tokens=64, progress=False, **asked)
        tokens = {cell: rows["tokens"].tolist() for cell, rows in table.groupby("cell")}
        assert tokens["alpha=1"] == tokens["plus error"] == tokens["clean"] != tokens["mean patch"]


def spy_on_work(monkeypatch):
    """Count the (prompt, cell) pairs that are really generated."""
    done, plain = [], gen._Grid.__call__

    def counted(self, *args):
        found = plain(self, *args)
        done.append(len(found))
        return found

    monkeypatch.setattr(gen._Grid, "__call__", counted)
    return done


def test_finished_cells_are_not_redone(pair, prompts, grid, table, tmp_path, monkeypatch):
    """A grid with more cells or prompts does only what is new, and a rerun nothing."""
    done = spy_on_work(monkeypatch)
    first = dict(list(grid.items())[:4])
    run(pair, prompts[:6], first, max_new_tokens=8, out_dir=tmp_path)
    assert sum(done) == 24
    same(run(pair, prompts, grid, max_new_tokens=8, out_dir=tmp_path), table)
    assert sum(done) == len(table)
    gen._finished.cache_clear()  # as in another process
    again = run(pair, prompts, grid, max_new_tokens=8, out_dir=tmp_path)
    assert sum(done) == len(table)
    same(again, table)
    assert again["tokens"].map(type).eq(list).all()


def test_killed_grid_resumes(pair, prompts, grid, table, tmp_path, monkeypatch):
    """kill -9 in the grid: finished chunks are kept, the result is that of an unbroken run."""
    script = textwrap.dedent(
        """
        import sys, time
        from dfc_lib.steering import generation as gen
        from tests import test_generation as t
        pair, prompts = t.make_pair(), t.make_prompts()
        grid = t.make_grid(t.make_crosscoder(pair, prompts))
        plain = gen._Grid.__call__
        gen._Grid.__call__ = lambda *a: (time.sleep(0.5), plain(*a))[1]
        t.run(pair, prompts, grid, max_new_tokens=8, batch_size=40, out_dir=sys.argv[1])
        """
    )
    root, folder = Path(__file__).parents[1], tmp_path / "grid"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    while process.poll() is None and len(list(folder.rglob("*.parquet"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    done = spy_on_work(monkeypatch)
    same(run(pair, prompts, grid, max_new_tokens=8, batch_size=40, out_dir=folder), table)
    assert 0 < sum(done) < len(table)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_another_setting_model_or_code_is_another_folder(
    pair, prompts, table, tmp_path, monkeypatch
):
    """One root serves all: what was made otherwise must not be taken for what is asked."""
    clean, some = {"clean": iv.Clean()}, prompts[:2]
    first = run(pair, some, clean, max_new_tokens=8, out_dir=tmp_path)
    same(first.reset_index(drop=True), table[table.cell == "clean"][:2].reset_index(drop=True))
    done = spy_on_work(monkeypatch)
    run(pair, some, clean, max_new_tokens=4, out_dir=tmp_path)
    run(pair, some, clean, max_new_tokens=8, position="every", out_dir=tmp_path)
    run(pair, some, clean, max_new_tokens=8, readout=[3], out_dir=tmp_path)
    other = Pair({"A": tiny(7), "B": tiny(1)}, None, 1)
    run(other, some, clean, max_new_tokens=8, out_dir=tmp_path)
    assert sum(done) == 8
    run(pair, some, clean, max_new_tokens=8, out_dir=tmp_path)
    assert sum(done) == 8
    monkeypatch.setattr(gen.provenance, "code_hash", lambda *_: "edited")
    run(pair, some, clean, max_new_tokens=8, out_dir=tmp_path)
    assert sum(done) == 10
    assert len(list(tmp_path.iterdir())) == 6


def test_files_are_read_once_and_damage_is_named(pair, prompts, tmp_path):
    clean = {"clean": iv.Clean()}
    first = run(pair, prompts[:2], clean, max_new_tokens=3, out_dir=tmp_path)
    (shard,) = tmp_path.rglob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-20])
    same(run(pair, prompts[:2], clean, max_new_tokens=3, out_dir=tmp_path), first)
    gen._finished.cache_clear()
    with pytest.raises(gen.GenerationError, match=rf"{shard.name}: damaged .* Delete this file"):
        run(pair, prompts[:2], clean, max_new_tokens=3, out_dir=tmp_path)
    shard.unlink()
    same(run(pair, prompts[:2], clean, max_new_tokens=3, out_dir=tmp_path), first)


def test_cells_have_any_name(pair, prompts, grid):
    names = {("clean",): grid["clean"], ("steered", 0, 4.0): grid["alpha=4"], 7: grid["clamp"]}
    got = run(pair, prompts[:2], names, max_new_tokens=1)
    assert got["cell"].tolist() == list(names) * 2


def test_readout_keeps_the_asked_for_tokens(pair, prompts, table):
    got = run(pair, prompts, {"clean": iv.Clean()}, max_new_tokens=1, readout=[7, 3])
    want = np.stack(table[table["cell"] == "clean"]["first_logprobs"])[:, [7, 3]]
    np.testing.assert_allclose(np.stack(got["first_logprobs"]), want, rtol=1e-3, atol=1e-3)


def test_models_that_no_cell_reads_are_not_run(pair, prompts, grid):
    """Running the base beside A would double the cost of steering with A's own vectors."""
    ran = []
    hook = pair.models["B"].model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    alone = {name: grid[name] for name in ("clean", "mean patch", "own encoding")}
    for position in prefix.POSITIONS:
        run(pair, prompts[:3], alone, max_new_tokens=2, position=position)
    assert not ran
    run(pair, prompts[:3], {"other": grid["other model"]}, max_new_tokens=2)
    assert ran
    hook.remove()


def test_site_in_the_last_block_and_target_b(prompts):
    """No blocks above the site; and the second model as target."""
    pair = make_pair(layer=3)
    grid = make_grid(make_crosscoder(pair, prompts))
    some = {n: grid[n] for n in ("clean", "reconstruction", "alpha=4", "other model")}
    few, asked = prompts[:4], {"max_new_tokens": 6, "eos": ENDS}
    for row in gen.generate(pair, "B", few, some, readout=[], **asked).itertuples():
        args = pair, "B", few[row.prompt], some[row.cell]
        assert generate_reference(*args, **asked)[0] == row.tokens


def test_reference_with_known_activations(pair, prompts, grid):
    """The fair baseline of the benchmark computes the site's activations once per prompt."""
    prompt, ids = prompts[5], torch.tensor([prompts[5]])
    h = torch.stack([residual(m, 1, ids)[0] for m in pair.models.values()], 1)
    for cell in ("alpha=4", "reconstruction", "clean"):
        args = pair, "A", prompt, grid[cell]
        with_h = generate_reference(*args, max_new_tokens=8, hidden=h)
        assert with_h[0] == generate_reference(*args, max_new_tokens=8)[0]


def test_attention_is_put_back(pair, prompts, grid):
    """The engine swaps the attention kernel; leaving it swapped would break everything after."""
    before = pair.models["A"].config._attn_implementation
    run(pair, prompts[:2], {"clean": iv.Clean()}, max_new_tokens=1)
    with pytest.raises(KeyError):
        run(pair, prompts[:2], {"x": iv.Reconstruction(grid["alpha=4"].codec, ("no block",))})
    assert pair.models["A"].config._attn_implementation == before
    assert not pair.models["A"].model.layers[1]._forward_pre_hooks


def test_scoring_given_text_equals_a_hooked_forward(pair, prompts, grid):
    """KL on neutral text: against Hugging Face's forward with a plain hook."""
    texts, some = prompts[1:5], ("clean", "reconstruction", "alpha=4", "mean patch")
    cells = {name: grid[name] for name in some}
    table = sampling.score(pair, "A", texts, cells, progress=False)
    table, model = table.set_index(["text", "cell"]), pair.models["A"]
    for i, text in enumerate(texts):
        ids = torch.tensor([text])
        h = torch.stack([residual(m, 1, ids)[0] for m in pair.models.values()], 1)
        logprobs = {}
        for name, cell in cells.items():
            new, _ = iv.apply(cell, h[1:], 0)

            def hook(_module, _args, output, new=new):
                output[0, 1:] = new
                return output

            handle = model.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                logprobs[name] = model(ids).logits[0, :-1].log_softmax(-1)
            handle.remove()
            kl = (logprobs["clean"].exp() * (logprobs["clean"] - logprobs[name])).sum(1).mean()
            assert table.kl[i, name] == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
    assert table["kl"].groupby("cell").mean()["alpha=4"] > 0.01


# -- plain sampling


def huggingface_greedy(model, prompt, n):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=n,
        attention_mask=torch.ones_like(ids),
        eos_token_id=ENDS,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[:-1] if out[-1] in ENDS else out


@pytest.mark.parametrize(
    ("kind", "config"), [(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)]
)
def test_greedy_sampling_equals_huggingface(prompts, kind, config):
    model = tiny(2, kind, config)
    got = sampling.sample(model, prompts, max_new_tokens=12, eos=ENDS, batch_size=5).tokens
    assert got == [huggingface_greedy(model, p, 12) for p in prompts]
    assert len(set(map(len, got))) > 2  # rows left the batch at different steps


def test_first_logits_equal_huggingface(pair, prompts):
    model = pair.models["A"]
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts])
    sampled = sampling.sample(model, prompts, max_new_tokens=1, batch_size=6).first_logits
    torch.testing.assert_close(sampled, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_distribution(temperature):
    """First tokens must have the softmax's frequencies, second ones those given the first."""
    model = tiny(4, initializer_range=0.1)
    prompt = [5, 6, 7, 8]
    got = sampling.sample(
        model, [prompt] * 4000, temperature, max_new_tokens=2, batch_size=4000
    ).tokens
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    first = torch.bincount(torch.tensor([s[0] for s in got]), minlength=VOCAB) / 4000
    noise = (p * (1 - p) / 4000).sqrt()
    assert ((first - p).abs() <= 5 * noise + 1e-3).all()
    top = int(p.argmax())
    with torch.no_grad():
        p = (model(torch.tensor([[*prompt, top]])).logits[0, -1] / temperature).softmax(-1)
    second = torch.tensor([s[1] for s in got if s[0] == top])
    share = torch.bincount(second, minlength=VOCAB) / len(second)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(second)).sqrt() + 1e-3).all()


def test_samples_depend_on_the_seed_not_on_the_batch(pair, prompts):
    model = pair.models["A"]
    usual = {"temperature": 1.0, "max_new_tokens": 6, "eos": [EOS]}
    draw = lambda **k: sampling.sample(model, 3 * prompts, **usual, **k).tokens  # noqa: E731
    assert draw(seed=1) == draw(seed=1, batch_size=4)
    assert draw(seed=1) != draw(seed=2)
    several, n = draw(seed=1), len(prompts)
    assert several[:n] != several[n : 2 * n]
    assert all(EOS not in tokens for tokens in several)


def test_bad_arguments_are_named(pair, prompts):
    model, clean = pair.models["A"], {"clean": iv.Clean()}
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sampling.sample(model, [[5], []])
    with pytest.raises(ValueError, match="temperature=-1"):
        sampling.sample(model, prompts, temperature=-1)
    with pytest.raises(ValueError, match="position='all'"):
        run(pair, prompts, clean, position="all")
    with pytest.raises(ValueError, match="interventions: empty"):
        run(pair, prompts, {})
    with pytest.raises(ValueError, match="at least 1"):
        run(pair, prompts, clean, batch_size=0)
    with pytest.raises(PairError, match="no model 'C'"):
        gen.generate(pair, "C", prompts, clean, eos=ENDS, readout=[])
    windowed = tiny(0, MistralForCausalLM, MistralConfig, sliding_window=8)
    with pytest.raises(PairError, match="only full attention"):
        sampling.sample(windowed, prompts)
