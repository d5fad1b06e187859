"""The models of the pair: loaded as they are, refused with a remedy where they are not sound."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dfc_lib.data import pair as pairs
from dfc_lib.data.pair import Pair, PairError
from tools.make_pair.card import write_checksums


def qwen(seed=0, width=32, vocab=64):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def word_tokenizer(vocab=64):
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w2")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder like data/pairs: two models in bf16, a tokenizer, SHA256SUMS over all."""
    folder = tmp_path_factory.mktemp("shipped") / "pair"
    for name, seed in {"model_a": 0, "base": 1}.items():
        qwen(seed).to(torch.bfloat16).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    write_checksums(folder)
    return folder


@pytest.fixture
def copy(shipped, tmp_path):
    return shutil.copytree(shipped, tmp_path / "pair")


def test_loads_frozen_in_float32(shipped):
    """bf16 files must be computed in float32, in eval mode, without gradients."""
    model = pairs.load_model(shipped / "model_a")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    want = qwen(0).to(torch.bfloat16).float()
    for name, value in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_load_pair_keeps_the_order_of_models(shipped):
    """The model axis of all activation arrays is the order of this mapping."""
    pair = pairs.load_pair({"A": shipped / "model_a", "B": shipped / "base"}, layer=1)
    assert pair.names == ("A", "B")
    assert (pair.index("B"), pair.d_model) == (1, 32)
    assert pair.tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert pairs.fingerprint(pair.models["A"]) != pairs.fingerprint(pair.models["B"])
    with pytest.raises(PairError, match="no model 'C'"):
        pair.index("C")


def test_sound_files_are_accepted(shipped):
    for folder in (shipped, shipped / "base"):
        pairs.verify(folder)


def test_truncated_weights_are_named(copy):
    """A half-copied file must be called truncated, with its size and the remedy."""
    weights = copy / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    size = f"{weights.stat().st_size:,} bytes"
    for check, folder in ((pairs.verify, copy), (pairs.load_model, copy / "base")):
        with pytest.raises(
            PairError, match=rf"base/model.safetensors: truncated.*{size}"
        ) as caught:
            check(folder)
        assert "git checkout -- " in str(caught.value)
        assert "make pair" in str(caught.value)
    pairs.load_model(copy / "model_a")  # the other model is sound


def test_flipped_byte_is_found_on_loading(copy):
    """One flipped bit loads without complaint and silently changes results: checked by SHA-256."""
    weights = copy / "model_a" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PairError, match=r"model_a/model.safetensors: truncated or altered"):
        pairs.load_model(copy / "model_a")


def test_truncated_weights_without_checksums(copy):
    """A user's own folder has no SHA256SUMS; the error must still name the file."""
    (copy / pairs.SUMS).unlink()
    weights = copy / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(PairError, match=r"model\.safetensors: truncated"):
        pairs.load_model(copy / "base")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_missing_file_is_named(copy, missing):
    (copy / "base" / missing).unlink()
    with pytest.raises(PairError, match="safetensors" if "model" in missing else "config.json"):
        pairs.load_model(copy / "base")
    with pytest.raises(PairError, match=rf"{missing}: missing"):
        pairs.verify(copy)


def test_missing_folder_says_what_to_do(tmp_path):
    for call in (pairs.load_model, pairs.load_tokenizer):
        with pytest.raises(PairError, match="no such") as caught:
            call(tmp_path / "nowhere")
        assert "make pair" in str(caught.value)


def test_pickled_weights_are_refused(tmp_path):
    """A .bin checkpoint can run code on loading; it must never be opened."""
    model = qwen()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PairError, match="Only safetensors"):
        pairs.load_model(tmp_path)


def test_hub_name_without_network(monkeypatch, tmp_path):
    """Offline, the error gives the way to download by hand."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PairError, match="hf download owner/name --local-dir downloads/name"):
        pairs.load_model("owner/name")


def test_other_width_or_vocabulary_is_refused():
    with pytest.raises(PairError, match=r"width \(hidden_size\) \(A: 32, B: 64\)"):
        Pair({"A": qwen(), "B": qwen(width=64)}, None, 1)
    with pytest.raises(PairError, match=r"vocabulary \(A: 64, B: 80\)"):
        Pair({"A": qwen(), "B": qwen(vocab=80)}, None, 1)
    with pytest.raises(PairError, match=r"layer 3: .* 0\.\.2"):
        Pair({"A": qwen(), "B": qwen()}, None, 3)


def test_fingerprint_sees_one_changed_weight():
    """A cache addressed by it must not be reused for another checkpoint."""
    model = qwen()
    before = pairs.fingerprint(model)
    assert pairs.fingerprint(qwen()) == before
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    assert pairs.fingerprint(model) != before


def test_the_site_has_this_name_in_transformer_lens():
    """What a reader looks up there under blocks.{L}.hook_out must be what is read here."""
    model, tokenizer = qwen(), word_tokenizer()
    ids = torch.randint(3, 64, (2, 9))
    want = model(ids, output_hidden_states=True).hidden_states[2]
    # It rewires the model that it wraps.
    bridge = TransformerBridge.boot_transformers("qwen2", hf_model=model, tokenizer=tokenizer)
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.hook_out")
    torch.testing.assert_close(cache["blocks.1.hook_out"], want, rtol=1e-4, atol=1e-4)


def test_in_chunks_halves_on_out_of_memory():
    """Running out of memory must cost a smaller batch, not the run, and lose or repeat nothing."""
    seen = []

    def work(items, batch_size):
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.extend(items)
        return len(items)

    with pytest.warns(UserWarning, match="batch_size=[24]"):
        sizes = list(pairs.in_chunks(list(range(10)), lambda _: 1, 8, work))
    assert seen == list(range(10))
    assert max(sizes) == 2

    def never(items, batch_size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(PairError, match="one row at a time"),
    ):
        list(pairs.in_chunks([0, 1], lambda _: 1, 2, never))
