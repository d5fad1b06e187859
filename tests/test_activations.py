"""The activation cache: the right vectors, on disk, checked, resumable."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfc_lib.data import activations as acts
from dfc_lib.data.activations import Activations, CacheError, Tokens, cache, lint, residual
from dfc_lib.data.pair import Pair
from tests.test_pair import qwen


@pytest.fixture(scope="module")
def pair():
    return Pair({"A": qwen(0), "B": qwen(1)}, None, 1)


@pytest.fixture(scope="module")
def texts():
    draw = np.random.default_rng(0)
    return [draw.integers(3, 64, n).tolist() for n in draw.integers(2, 30, 37)]


def reference(pair, text, positions):
    """(position, model, d_model) by the plain way: all hidden states, one text, no padding."""
    ids = torch.tensor([text])
    out = []
    for model in pair.models.values():
        with torch.no_grad():
            out.append(model(ids, output_hidden_states=True).hidden_states[pair.layer + 1][0])
    return torch.stack(out, 1)[-1:] if positions == "last" else torch.stack(out, 1)[1:]


def test_residual_equals_hidden_states_bitwise_and_stops(pair):
    """Stopping at the site must change no bit, and must not run the blocks above."""
    model, ids = pair.models["A"], torch.randint(3, 64, (4, 11))
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states[2]
    ran = []
    hook = model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    hooks = len(model.model.layers[1]._forward_hooks)
    assert torch.equal(residual(model, 1, ids), want)
    hook.remove()
    assert not ran
    assert len(model.model.layers[1]._forward_hooks) == hooks


@pytest.mark.parametrize("positions", ["last", "all"])
def test_cache_equals_plain_forward(pair, texts, positions, tmp_path, monkeypatch):
    """Bucketing, padding, sharding: each row must be its own text's vector at its position."""
    meta = {"split": ["x" if i % 2 else "y" for i in range(len(texts))], "label": range(37)}
    monkeypatch.setattr(acts, "_ROWS_PER_SHARD", 40)
    got = cache(pair, texts, tmp_path, positions, 5, meta=meta, progress=False)
    want = torch.cat([reference(pair, text, positions) for text in texts])
    assert got.n == len(want)
    torch.testing.assert_close(got.to_tensor(), want, rtol=1e-4, atol=1e-5)
    assert len(got._shards[0]) > 1 or positions == "last"
    pick = torch.randperm(got.n)[:20]
    assert torch.equal(got.gather(pick), got.to_tensor()[pick])
    for row in got.rows.itertuples():
        assert texts[row.sequence][row.position] == row.token
        assert row.label == row.sequence
    assert set(got.rows["sequence"][got.where(split="x").numpy()] % 2) == {1}


def test_reading_is_memory_mapped(pair, texts, tmp_path):
    """A shard larger than memory must open: its tensor has to view the file, not a copy of it."""
    got = cache(pair, texts, tmp_path, progress=False)
    address = got._shards[0][0].data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    lines = [line.split() for line in maps.read_text().splitlines()]
    ranges = [(*(int(x, 16) for x in line[0].split("-")), line[-1]) for line in lines]
    assert any(a <= address < b and path.endswith("A-00000.safetensors") for a, b, path in ranges)


def test_bfloat16_storage(pair, texts, tmp_path):
    """Kept as the model gives them, half the size, and read in float32."""
    half = Pair({name: deepcopy(model).bfloat16() for name, model in pair.models.items()}, None, 1)
    got = cache(half, texts, tmp_path, progress=False)
    assert {h.dtype for shards in got._shards for h in shards} == {torch.bfloat16}
    want = torch.cat([reference(half, text, "last") for text in texts]).float()
    torch.testing.assert_close(got.to_tensor(), want, rtol=5e-2, atol=5e-2)


def test_key_follows_content(pair, texts, tmp_path):
    """Whatever changes the vectors must change the key by which crosscoders are addressed."""
    key = cache(pair, texts, tmp_path / "0", progress=False).key
    assert cache(pair, texts, tmp_path / "1", batch_size=3, progress=False).key == key
    others = [
        cache(pair, texts[:-1], tmp_path / "2", progress=False),
        cache(pair, texts, tmp_path / "3", "all", progress=False),
        cache(Pair(pair.models, None, 0), texts, tmp_path / "4", progress=False),
        cache(Pair({"A": qwen(0), "B": qwen(2)}, None, 1), texts, tmp_path / "5", progress=False),
        cache(pair, texts, tmp_path / "6", meta={"split": ["x"] * 37}, progress=False),
    ]
    assert len({key, *(other.key for other in others)}) == 6
    with pytest.raises(CacheError, match="holds another cache"):
        cache(pair, texts[:-1], tmp_path / "0", progress=False)


def test_other_code_makes_the_vectors_anew(pair, texts, tmp_path, monkeypatch):
    """Vectors that another version of the code made must not pass for this one's."""
    key = cache(pair, texts, tmp_path, progress=False).key
    shard = tmp_path / "A-00000.safetensors"
    made = shard.stat().st_mtime_ns
    assert cache(pair, texts, tmp_path, progress=False).key == key
    assert shard.stat().st_mtime_ns == made
    monkeypatch.setattr(acts, "code_hash", lambda *modules: "another")
    assert cache(pair, texts, tmp_path, progress=False).key != key
    assert shard.stat().st_mtime_ns > made
    monkeypatch.undo()  # the code may also describe its request otherwise: that is no other cache
    fewer = cache(pair, texts[1:], tmp_path, progress=False)
    assert fewer.key == cache(pair, texts[1:], tmp_path / "apart", progress=False).key


def test_damaged_shards_are_named_and_redone(pair, texts, tmp_path, monkeypatch):
    """Truncated or flipped: opening must refuse with the file's name; caching again must repair."""
    monkeypatch.setattr(acts, "_ROWS_PER_SHARD", 10)
    want = cache(pair, texts, tmp_path, progress=False).to_tensor()
    shard = tmp_path / "B-00002.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-7])
    with pytest.raises(CacheError, match=r"B-00002.safetensors: truncated or altered .* again"):
        Activations.open(tmp_path)
    flipped = bytearray(sound)
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(CacheError, match=r"B-00002.safetensors: truncated or altered"):
        Activations.open(tmp_path)
    shard.unlink()
    with pytest.raises(CacheError, match=r"B-00002.safetensors: missing"):
        Activations.open(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"x")
    before = (tmp_path / "A-00000.safetensors").stat().st_mtime_ns
    assert torch.equal(cache(pair, texts, tmp_path, progress=False).to_tensor(), want)
    assert (tmp_path / "A-00000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CacheError, match=r"manifest.json: missing"):
        Activations.open(tmp_path / "nowhere")


def test_killed_run_resumes(tmp_path):
    """kill -9 in the middle: the same call goes on after the last shard, to the same values."""
    script = textwrap.dedent(
        """
        import sys, time
        import numpy as np
        from dfc_lib.data import activations
        from dfc_lib.data.pair import Pair
        from tests.test_pair import qwen
        draw = np.random.default_rng(0)
        texts = [draw.integers(3, 64, 12).tolist() for _ in range(60)]
        pair = Pair({"A": qwen(0), "B": qwen(1)}, None, 1)
        plain, pause = activations.residual, float(sys.argv[2])
        activations.residual = lambda *a: (time.sleep(pause), plain(*a))[1]
        activations._ROWS_PER_SHARD = 100
        activations.cache(pair, texts, sys.argv[1], "all", 5, progress=False)
        """
    )
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}

    def run(folder, pause):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(pause)], cwd=root, env=env
        )

    process = run(tmp_path / "killed", 0.3)
    third = tmp_path / "killed" / "A-00002.safetensors"
    while process.poll() is None and not third.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(CacheError, match=r"not finished, its run was interrupted"):
        Activations.open(tmp_path / "killed")
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    done = [s["file"] for s in manifest["shards"] if s["sha256"]]
    assert 1 <= len(done) < len(manifest["shards"])
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done}
    assert run(tmp_path / "killed", 0).wait() == 0
    assert run(tmp_path / "whole", 0).wait() == 0
    assert times == {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done}
    resumed, whole = Activations.open(tmp_path / "killed"), Activations.open(tmp_path / "whole")
    assert torch.equal(resumed.to_tensor(), whole.to_tensor())
    assert resumed.key == whole.key


def checks(*args, **kwargs):
    return lint(*args, **kwargs).set_index("check")["passed"].to_dict()


def test_lint_passes_a_sound_cache(pair, texts, tmp_path):
    got = cache(pair, texts, tmp_path, meta={"split": ["x"] * 37}, progress=False)
    table = lint(got, pair, steps=10, batch_size=37)
    assert table["passed"].all(), table
    assert table.set_index("check").loc["passes", "value"] == 10
    assert set(checks(got, pair)) >= {"last token", "from scratch", "split overlap", "non-finite"}
    assert not checks(got, pair, steps=1000, batch_size=37)["passes"]


def test_lint_catches_rows_that_stand_on_another_token(pair, texts, tmp_path):
    """As those of the first study do: the index of its code is right for the longest text alone."""
    got = cache(pair, texts, tmp_path, progress=False)
    slipped = got.rows.assign(position=(got.rows.position - 1).clip(lower=0))
    object.__setattr__(got, "rows", slipped)
    passed = checks(got, pair)
    assert not passed["last token"]
    assert not passed["token ids"]


def test_lint_catches_duplicates_overlap_and_nan(pair, texts, tmp_path):
    """Each fault planted alone must fail its own check."""
    double = [*texts, texts[0], texts[1]]
    meta = {"split": ["train"] * 37 + ["train", "test"]}
    passed = checks(cache(pair, double, tmp_path / "double", meta=meta, progress=False), pair)
    assert not passed["duplicate vectors"]
    assert not passed["duplicate sequences"]
    assert not passed["split overlap"]
    table = lint(acts.Activations.open(tmp_path / "double"), pair).set_index("check")
    assert table.loc["split overlap", "value"] == 1

    broken = qwen(0)
    broken.model.embed_tokens.weight.data[texts[3][0]] = torch.nan
    bad = Pair({"A": broken, "B": pair.models["B"]}, None, 1)
    passed = checks(cache(bad, texts, tmp_path / "nan", progress=False), bad)
    assert not passed["non-finite"]


def test_lint_from_scratch_catches_a_shuffled_shard(pair, texts, tmp_path):
    """Vectors in the wrong order have right positions and ids; only recomputing finds it."""
    got = cache(pair, texts, tmp_path, progress=False)
    shuffled = tuple((h[0].roll(1, 0),) for h in got._shards)
    object.__setattr__(got, "_shards", shuffled)
    passed = checks(got, pair)
    assert passed["last token"]
    assert not passed["from scratch"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8))
def test_prefix_hashes_are_equal_exactly_for_equal_prefixes(texts):
    """Duplicates are counted by these: a false match or a miss would miscount."""
    hashes = Tokens.of(texts).prefix_hashes()
    prefixes = [tuple(text[: i + 1]) for text in texts for i in range(len(text))]
    assert len(set(hashes.tolist())) == len(set(prefixes))
    by_prefix = dict(zip(prefixes, hashes.tolist(), strict=True))
    assert [by_prefix[p] for p in prefixes] == hashes.tolist()


def test_bad_arguments_are_named(pair, tmp_path):
    with pytest.raises(ValueError, match="positions='first'"):
        cache(pair, [[1, 2]], tmp_path, "first")
    with pytest.raises(ValueError, match=r"sequences\[1\] has 1 tokens"):
        cache(pair, [[1, 2], [1]], tmp_path, "all")
    with pytest.raises(ValueError, match="meta has 1 entries for 2"):
        cache(pair, [[1, 2], [1, 3]], tmp_path, meta={"split": ["x"]})
    with pytest.raises(ValueError, match="empty"):
        cache(pair, [], tmp_path)
    got = cache(pair, [[1, 2], [1, 3]], tmp_path, progress=False)
    with pytest.raises(ValueError, match="no column 'split'"):
        got.where(split="x")
    with pytest.raises(IndexError, match=r"0\.\.1"):
        got.gather([2])
