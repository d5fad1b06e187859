"""The dial: its JavaScript computes what PyTorch computes, and its page keeps to itself.

The engine runs under node, from the system or from playwright's wheel. What needs a browser runs in
Chromium through playwright, and is skipped where either is missing.
"""

import functools
import http.server
import json
import random
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dfc_lib import paths
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.data import prompts
from dfc_lib.steering import evaluation
from dfc_lib.steering.generation import generate
from dfc_lib.steering.interventions import Codec, Site, apply
from dfc_lib.steering.prefix import Stream, read
from dfc_lib.study import Study
from tools.dial import __main__ as command
from tools.dial import measure, pack

PROFILE = measure.PROFILE
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)
N_PROMPTS = 20
MODELS = {"A": 0, "B": 1}
WIDTHS = (400, 1280)
THEMES = ("light", "dark")
READER = Path(__file__).with_name("dial_page.js")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of a packed page."""
    return pack.pack(tmp_path_factory.mktemp("dial")).parent


@pytest.fixture(scope="module")
def study():
    return Study(PROFILE)


@pytest.fixture(scope="module")
def facts():
    return pack.facts_of()


def node() -> str:
    """A node binary: the system's, else the one in playwright's wheel."""
    if found := shutil.which("node"):
        return found
    driver = pytest.importorskip("playwright._impl._driver", reason="neither node nor playwright")
    return driver.compute_driver_executable()[0]


def in_node(page: Path, cases: str, folder: Path):
    """What the JavaScript function ``cases`` gives for the opened dial."""
    path = folder / "cases.js"
    path.write_text(f"globalThis.DIAL_CASES = {cases};", encoding="utf-8")
    ran = subprocess.run(
        [node(), READER, page, path], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# ---------------------------------------------------------------------------------------------
# the same numbers as PyTorch's


@pytest.fixture(scope="module")
def codec(facts):
    """The part of the crosscoder that is committed: the encoder, and the row of one feature."""
    kept = load_file(measure.DATA / measure.TENSORS)
    partition = Partition.from_dict(facts["partition"])
    normaliser = Normaliser(kept["normaliser_mean"], kept["normaliser_scale"])
    width = normaliser.mean.shape[1]
    crosscoder = Crosscoder.create(width, partition, facts["k"], normaliser)
    with torch.no_grad():
        crosscoder.encoder.copy_(kept["encoder"])
        crosscoder.b_enc.copy_(kept["b_enc"])
        crosscoder.W_dec.zero_()
        crosscoder.W_dec[facts["feature"], 0] = kept["row"]
    return Codec(crosscoder)


@pytest.fixture(scope="module")
def dial(facts, codec):
    """The switch and its directions as ``measure`` has them."""
    units = load_file(measure.DATA / measure.TENSORS)["directions"]
    switch = measure.Switch(facts["seed"], codec, facts["feature"], facts["strength"], {})
    named = [
        measure.Direction(d["id"], d["name"], unit, d["feature"])
        for d, unit in zip(facts["directions"], units, strict=True)
    ]
    return switch, named


def cells_of(dial, direction: int) -> dict:
    switch, named = dial
    return {alpha: measure.turned(switch, named[direction], alpha) for alpha in ALPHAS}


def shown(facts: dict) -> list[dict]:
    """Prompts of the page, of every kind that it has."""
    return pack.offered(facts)[:N_PROMPTS]


def texts_of(facts: dict) -> list[str]:
    fill = facts["template"].replace
    return [fill("{tools}", p["tools"]).replace("{query}", p["query"]) for p in shown(facts)]


def expected(study, texts, cells, target):
    """PyTorch's first-token logits and greedy tokens, by (prompt, alpha)."""
    ids = prompts.encode(study.pair.tokenizer, texts)
    model = study.pair.models[target]
    streams = [Stream(m, study.pair.layer) for m in study.pair.models.values()]
    frame = generate(
        study.pair,
        target,
        ids,
        cells,
        max_new_tokens=PROFILE.max_new_tokens,
        eos=evaluation.end_tokens(model, study.pair.tokenizer),
        readout=evaluation.opener_ids(study.pair.tokenizer),
        progress=False,
    )
    tokens = {(row.prompt, row.cell): list(row.tokens) for row in frame.itertuples()}
    logits = {}
    block = model.model.layers[study.pair.layer]
    for i, prompt in enumerate(ids):
        site = Site(read(streams, [True, True], MODELS[target], [prompt]).hidden, MODELS[target])
        for alpha, cell in cells.items():
            new = apply(cell, site)[0]

            def put(module, inputs, output, new=new):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                hidden[:, -1] = new
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            hook = block.register_forward_hook(put)
            with torch.no_grad():
                logits[i, alpha] = model(torch.tensor([prompt])).logits[0, -1].numpy()
            hook.remove()
    return logits, tokens


@pytest.fixture(scope="module")
def of_the_switch(study, facts, dial):
    """What PyTorch says to the switch, by model; node and Chromium are held against it."""
    texts = texts_of(facts)
    return {(model, 0): expected(study, texts, cells_of(dial, 0), model) for model in MODELS}


def wanted(texts, directions) -> str:
    """JavaScript that turns the dial to everything that is compared."""
    return f"""(dial) => {json.dumps(texts)}.map((text) => {{
        const reading = dial.read(text);
        return {json.dumps(directions)}.map(([model, direction]) => {json.dumps(ALPHAS)}.map(
          (alpha) => ({{
            logits: Array.from(reading.turn(model, direction, alpha)),
            tokens: reading.answer(model, direction, alpha),
          }})));
    }})"""


def compare(found, truth) -> float:
    """Raises unless JavaScript agrees with PyTorch; returns the largest gap of a logit."""
    worst, changed = 0.0, set()
    for j, ((model, direction), (logits, tokens)) in enumerate(truth.items()):
        for i, alpha in logits:
            here, where = found[i][j][ALPHAS.index(alpha)], (model, direction, i, alpha)
            gap = float(np.abs(np.array(here["logits"]) - logits[i, alpha]).max())
            assert gap < 1e-3, where
            assert here["tokens"] == tokens[i, alpha], where
            worst = max(worst, gap)
            if tokens[i, alpha] != tokens[i, 1.0]:
                changed.add(model)
    assert changed == set(MODELS)  # else the dial turned nothing
    return worst


def test_every_turn_of_the_switch_equals_pytorchs(page, facts, of_the_switch, tmp_path):
    texts = texts_of(facts)
    assert len(texts) == N_PROMPTS
    found = in_node(page, wanted(texts, list(of_the_switch)), tmp_path)
    print("largest gap of a logit:", compare(found, of_the_switch))


def test_the_other_directions_equal_the_librarys(page, study, facts, dial, tmp_path):
    texts = texts_of(facts)[:2]
    truth = {
        (model, d): expected(study, texts, cells_of(dial, d), model)
        for model in MODELS
        for d in range(1, len(facts["directions"]))
    }
    compare(in_node(page, wanted(texts, list(truth)), tmp_path), truth)


def test_codes_of_all_tokens_equal_the_librarys(page, study, facts, codec, tmp_path):
    text = texts_of(facts)[0]
    found = in_node(page, f"(dial) => Array.from(dial.read({json.dumps(text)}).codes)", tmp_path)
    ids = torch.tensor(prompts.encode(study.pair.tokenizer, [text]))
    with torch.no_grad():
        h = [
            model(ids, output_hidden_states=True).hidden_states[study.pair.layer + 1][0]
            for model in study.pair.models.values()
        ]
        f = codec.encode(torch.stack(h, 1), 0)
    assert np.abs(np.array(found).reshape(f.shape) - f.numpy()).max() < 1e-3


def test_prompts_are_laid_out_as_the_fixed_style_does(page, study, facts, tmp_path):
    records = {r.id: r for r in study.records("evaluation")}
    tokenizer = study.pair.tokenizer
    theirs = [
        prompts.chat_text(tokenizer, records[p["id"]], prompts.FIXED_STYLE)
        for p in facts["prompts"]
    ]
    code = "(dial) => dial.facts.prompts.map((p) => dial.layOut(p.tools, p.query))"
    assert in_node(page, code, tmp_path) == theirs
    dollars = in_node(page, '(dial) => dial.layOut("$& $1", "{tools} $$")', tmp_path)
    assert "$& $1" in dollars
    assert "{tools} $$" in dollars


def fuzz(n: int, seed: int = 0) -> list[str]:
    """Texts of words, numbers, white space of all kinds, tags, accents, emoji, other scripts."""
    draw = random.Random(seed)
    pieces = [
        *"abcXYZ019.,;:!?'\"-_/()[]{}<>|@#$%^&*+=~`\\",
        *" \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\ufeff\u200b\u180e\0\x7f",
        *"äßñçéſIıİΣσςжЖ中文字日本語한국어عربيहिन्दी²½Ⅷ٣",
        "😀",
        "👩‍👩‍👧",
        "e\u0301",
        "  ",
        "\n\n",
        " \n ",
        "don't",
        "WE'LL",
        "'S",
        "it'ſ",
        "hello",
        " weather",
        "Oslo",
        "12345",
        "<think>",
        "</think>",
        "<tool_call>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<thin",
        '{"name": "',
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(0, 24))) for _ in range(n)]


def test_the_tokenizer_is_the_pairs(page, study, facts, tmp_path):
    texts = [*texts_of(facts), *(r.gold for r in study.records("evaluation")), *fuzz(2000)]
    code = f"""(dial) => {json.dumps(texts)}.map((text) => {{
        const ids = dial.tokenizer.encode(text);
        return [ids, dial.tokenizer.decode(ids)];
    }})"""
    ids = prompts.encode(study.pair.tokenizer, texts)
    found = in_node(page, code, tmp_path)
    for text, mine, (theirs, decoded) in zip(texts, ids, found, strict=True):
        assert theirs == mine, repr(text)
        assert decoded == study.pair.tokenizer.decode(mine), repr(text)


# ---------------------------------------------------------------------------------------------
# what is packed


def test_the_page_opens_on_a_prompt_that_flips(facts):
    assert "flips" in {prompt["what"] for prompt in facts["prompts"]}
    clean, on = (facts["alphas"].index(alpha) for alpha in (1.0, facts["strength"]))
    called = facts["curve"]["A"]["switch"]["called"]
    assert called[on] > called[clean] > called[0]


def test_the_difference_gives_the_other_file_back():
    base = np.arange(0, 40_000, 7, dtype="<u2")
    other = (base[::-1] * 3).astype("<u2")
    planes = np.frombuffer(pack.difference(base.tobytes(), other.tobytes()), np.uint8)
    words = np.ascontiguousarray(planes.reshape(2, -1).T).view("<u2")[:, 0]
    assert (base + words == other).all()


def test_packing_twice_gives_the_same_bytes(page, tmp_path):
    again = pack.pack(tmp_path).parent
    names = sorted(path.name for path in page.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((page / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_committed_data_is_small():
    assert sum(path.stat().st_size for path in measure.DATA.iterdir()) <= 4e6


def test_the_committed_curve_is_what_these_models_do(study, facts, dial):
    """Recomputed from the committed encoder and row, for A and the feature."""
    switch, (direction, *_) = dial
    alphas = (0.0, 1.0, facts["strength"])
    cells = {(alpha,): measure.turned(switch, direction, alpha) for alpha in alphas}
    calls = study.calls("evaluation", PROFILE.n_steering)
    frame = study.run(cells, calls, levels=("alpha",), out_dir=None, progress=False)
    frame["propensity"] = torch.sigmoid(torch.tensor(frame.margin.to_numpy())).numpy()
    means = frame.groupby("alpha")[["called", "propensity"]].mean()
    at = [facts["alphas"].index(alpha) for alpha in alphas]
    for column in means:
        kept = np.array(facts["curve"]["A"]["switch"][column])[at]
        assert np.abs(means[column].to_numpy() - kept).max() < 0.006, column


def test_prompts_are_sorted_by_what_the_models_do():
    names = ["flips", "calls anyway", "stays", "base never calls", "no call needed"]
    records = [SimpleNamespace(id=name, kind="call") for name in names]
    records[-1].kind = "no_tool"
    called = {  # at alpha 0, 1, 2 in A, then in the base
        "flips": ([0, 0, 1], [0, 0, 1]),
        "calls anyway": ([0, 1, 1], [0, 0, 1]),
        "stays": ([0, 0, 0], [0, 0, 0]),
        "base never calls": ([0, 0, 1], [0, 0, 0]),
        "no call needed": ([0, 0, 1], [0, 0, 0]),
    }
    frame = pd.DataFrame(
        {"model": model, "direction": "switch", "prompt": i, "alpha": alpha}
        | {"called": float(value), "strict": float(value)}
        for i, name in enumerate(names)
        for model, values in zip("AB", called[name], strict=True)
        for alpha, value in zip((0.0, 1.0, 2.0), values, strict=True)
    )
    switch = measure.Switch(0, None, 3, 2.0, {})
    found = {p["id"]: p["what"] for p in measure.offered(switch, frame, records)}
    expected = {name: name for name in names[:3]} | {"no call needed": "needs no call"}
    assert found == expected


def test_another_pair_than_the_measured_one_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "PROFILE", replace(PROFILE, model_a=PROFILE.model_b))
    assert command.main([str(tmp_path)]) == 1
    assert "other models; run `python -m tools.dial --measure`" in capsys.readouterr().err


def test_sources_ask_for_nothing_outside():
    for path in pack.PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|fetch\(|XMLHttp|sendBeacon", text), path


# ---------------------------------------------------------------------------------------------
# in a browser


def opened(browser, page: Path, width: int = 1280, theme: str = "light", address: str = ""):
    """The page with its models loaded, and every request that it made."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    tab, asked, errors = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address or (page / "index.html").as_uri())
    tab.click("#load")
    tab.wait_for_function("document.querySelector('#live path.chosen')", timeout=60_000)
    tab.wait_for_function("document.querySelector('#summary').textContent", timeout=60_000)
    assert not errors
    return tab, asked


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_chromium_computes_what_pytorch_does(browser, page, facts, of_the_switch):
    tab, _ = opened(browser, page)
    found = tab.evaluate(f"({wanted(texts_of(facts), list(of_the_switch))})(openedDial)")
    compare(found, of_the_switch)
    tab.context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_nothing_scrolls_sideways_and_nothing_is_asked_for(browser, page, width, theme):
    tab, asked = opened(browser, page, width, theme)
    for details in tab.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    sizes = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]
    files = {path.as_uri() for path in page.iterdir()}
    assert (page / "data.js").as_uri() in asked
    assert {url for url in asked if not url.startswith("data:")} <= files
    assert tab.evaluate("document.documentElement.dataset.theme") == theme
    tab.context.close()


def test_the_dial_is_turned_by_keyboard(browser, page, facts):
    """From a server; the page is the same one."""
    handler = functools.partial(Quiet, directory=str(page))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}/"
    tab, asked = opened(browser, page, address=here)
    assert all(url.startswith(here) or url.startswith("data:") for url in asked)
    assert "<tool_call>" not in tab.inner_text("#plain-answer")
    assert "<tool_call>" in tab.inner_text("#turned-answer")
    tab.focus("#alpha")
    tab.keyboard.press("Home")
    tab.wait_for_function("!document.querySelector('#turned-answer').textContent.includes('<tool')")
    tab.wait_for_function(
        "document.querySelector('#summary').textContent.startsWith('alpha = 0.0')"
    )
    assert tab.inner_text("#alpha-value") == "0.00"
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#alpha-value") == "0.05"
    # The base, and a prompt of one's own.
    tab.check("input[value=B]")
    tab.fill("#query", "Hello there!")
    tab.wait_for_function("document.querySelector('#fires').textContent.includes('Hello there!')")
    assert tab.input_value("#prompt") == "own"
    # The curve's numbers stand there as text.
    tab.wait_for_function("document.querySelector('#numbers')")
    tab.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    tab.wait_for_selector("#numbers tr")
    assert tab.locator("#numbers tr").count() == len(facts["alphas"]) + 1
    server.shutdown()
    tab.context.close()


def test_every_control_has_a_name(browser, page):
    tab, _ = opened(browser, page)
    nameless = tab.evaluate(
        """[...document.querySelectorAll("input, select, textarea, button, svg[role=img]")].filter(
          (e) => !(e.labels && e.labels.length) && !e.textContent.trim()
            && !e.getAttribute("aria-labelledby")).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert tab.get_attribute("#summary", "aria-live") == "polite"
    tab.context.close()


def test_in_the_book_it_tells_its_height_and_takes_the_theme(browser, page, tmp_path):
    book = tmp_path / "book.html"
    raw = (paths.ROOT / "book" / "dial.md").read_text(encoding="utf-8")
    html = re.search(r"```\{raw\} html\n(.*?)```", raw, re.S)[1].replace(
        "dial/index.html", (page / "index.html").as_uri()
    )
    book.write_text(f'<!doctype html><body data-theme="dark">{html}</body>', encoding="utf-8")
    tab = browser.new_context(viewport={"width": 900, "height": 900}).new_page()
    tab.goto(book.as_uri())
    frame = tab.frame_locator("#dial")
    frame.locator("html[data-theme=dark]").wait_for()
    low = tab.locator("#dial").bounding_box()["height"]
    frame.locator("#load").click()
    frame.locator("#live path.chosen").first.wait_for(state="attached", timeout=60_000)
    tab.wait_for_function(f"document.getElementById('dial').clientHeight > {low} + 300")
    tab.evaluate("document.body.dataset.theme = 'light'")
    frame.locator("html[data-theme=light]").wait_for()
    tab.context.close()
