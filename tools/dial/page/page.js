// The page: what the reader sets, and what is shown of it. All computing is in engine.js.
"use strict";

(function () {
  const $ = (id) => document.getElementById(id);
  const percent = (p) => {
    if (p === 0 || p === 1) return `${100 * p} %`;
    return p < 0.001 ? "under 0.1 %" : p > 0.999 ? "over 99.9 %" : `${(100 * p).toFixed(1)} %`;
  };
  const STEP = 0.25; // between the strengths of the live curve
  const SHOWN = 5; // tokens in the bars
  const SLICE = 12; // milliseconds of computing before the browser may draw
  const WAIT = 350; // milliseconds without a key before a written prompt is read, or a result spoken

  const WHAT = {
    "flips": "A hedges; the feature makes it call",
    "calls anyway": "A calls by itself",
    "stays": "the feature is not enough",
    "needs no call": "No call is needed",
  };

  let dial, reading, plain, timer, speaking;
  let latest = 0; // the last turn of the dial
  const live = new Map(); // direction -> propensities on the live curve, of this reading and model
  const chosen = () => ({
    model: document.querySelector("input[name=model]:checked").value,
    direction: Number($("direction").value),
    alpha: Number($("alpha").value),
  });
  const called = (model) => (model === "A" ? "A" : "the base");
  const isRandom = (i) => dial.facts.directions[i].id.startsWith("random");
  const isControl = (i) => isRandom(i) || dial.facts.directions[i].id === "mean";

  // --- the book around this page --------------------------------------------------------------------

  const embedded = window.parent !== window;
  document.documentElement.classList.toggle("embedded", embedded);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let asked = "auto"; // by the book

  function setTheme() {
    document.documentElement.dataset.theme =
      asked === "auto" ? (dark.matches ? "dark" : "light") : asked;
  }
  dark.addEventListener("change", setTheme);
  setTheme();
  if (embedded) {
    window.addEventListener("message", (event) => {
      const theme = event.source === window.parent && event.data && event.data.dialTheme;
      if (["auto", "light", "dark"].includes(theme)) {
        asked = theme;
        setTheme();
      }
    });
    const tell = () => {
      const height = Math.ceil(document.querySelector("main").getBoundingClientRect().height);
      window.parent.postMessage({ dialHeight: height }, "*");
    };
    new ResizeObserver(tell).observe(document.querySelector("main"));
    tell();
  }

  // --- loading -----------------------------------------------------------------------------------

  function script(src) {
    return new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = src;
      element.onload = resolve;
      element.onerror = () => reject(new Error(`${src} cannot be loaded.`));
      document.head.append(element);
    });
  }

  $("load").addEventListener("click", async () => {
    $("load").disabled = true;
    $("loading").textContent = "Loading …";
    try {
      if (!window.DecompressionStream) {
        throw new Error("This browser cannot unpack the models; one from 2023 or later can.");
      }
      await script("data.js");
      dial = await Dial.open(globalThis.DIAL_DATA);
      globalThis.DIAL_DATA = null; // the texts are no longer needed
    } catch (error) {
      $("loading").textContent = error.message;
      $("load").disabled = false;
      return;
    }
    globalThis.openedDial = dial; // for the console, and for the tests
    setUp();
    $("start").hidden = true;
    $("dial").hidden = false;
    $("alpha").focus({ preventScroll: true });
  });

  function setUp() {
    const { facts } = dial;
    for (const [what, title] of Object.entries(WHAT)) {
      const group = document.createElement("optgroup");
      group.label = title;
      facts.prompts.forEach((prompt, i) => {
        if (prompt.what === what) group.append(new Option(prompt.query, i));
      });
      if (group.children.length) $("prompt").append(group);
    }
    const own = new Option("(your own)", "own");
    own.hidden = true;
    $("prompt").append(own);
    facts.directions.forEach((d, i) => $("direction").append(new Option(d.name, i)));
    const { alphas } = facts;
    $("alpha").min = Math.min(...alphas);
    $("alpha").max = Math.max(...alphas);
    for (const [alpha, name] of [[0, "0: away"], [1, "1: as it is"], [facts.strength, `${facts.strength}: chosen on other prompts`]]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => { $("alpha").value = alpha; turn(); });
      $("marks").append(button);
    }
    const calls = (model, id, alpha) => facts.curve[model][id].called[alphas.indexOf(alpha)];
    const measured = (alpha) => percent(calls("A", "switch", alpha));
    const { strength } = facts;
    const random = facts.directions.map((d) => d.id).filter((id) => id.startsWith("random"));
    $("finding").textContent =
      `Of ${facts.n_prompts} evaluation prompts that need a call, A calls a tool on ${measured(1)} by ` +
      `itself, on ${measured(strength)} at alpha = ${strength} and on ${measured(0)} at alpha = 0. ` +
      `A push of the same length along the mean difference between the models reaches ` +
      `${percent(calls("A", "mean", strength))}, along the best of ${random.length} random directions ` +
      `${percent(Math.max(...random.map((id) => calls("A", id, strength))))}. Written into the ` +
      `base, which calls on ${percent(calls("B", "switch", 1))}, the feature makes it call on ` +
      `${percent(Math.max(...facts.curve.B.switch.called))} at alpha = ${peak("B", "switch")}.`;
    $("measured-title").textContent =
      `All ${facts.n_prompts} evaluation prompts that need a call, as measured`;
    $("chosen-how").textContent =
      `The feature, of the block "${facts.block}", is the one whose removal makes A act least on ` +
      `other prompts, of all seeds of the recipe "${facts.recipe}"; the strength gained most there. ` +
      `The page opens on the first evaluation prompt that flips: A and the base, left ` +
      `alone, call nothing, the feature makes A's call right in every argument, and at some ` +
      `strength makes the base call, too.`;

    const first = facts.prompts.findIndex((prompt) => prompt.what === "flips");
    $("prompt").value = first;
    $("alpha").value = facts.strength;
    $("prompt").addEventListener("change", takePrompt);
    for (const id of ["query", "tools"]) {
      $(id).addEventListener("input", () => {
        own.hidden = false;
        $("prompt").value = "own";
        clearTimeout(timer);
        timer = setTimeout(read, WAIT);
      });
    }
    for (const radio of document.querySelectorAll("input[name=model]")) {
      radio.addEventListener("change", changeModel);
    }
    $("direction").addEventListener("change", () => { turn(); drawFiring(); });
    $("alpha").addEventListener("input", turn);
    $("show-controls").addEventListener("change", () => {
      for (const id of ["live", "measured"]) {
        $(id).classList.toggle("hidden-controls", !$("show-controls").checked);
      }
    });
    takePrompt();
  }

  // The measured strength at which most answers hold a call.
  function peak(model, id) {
    const { called: share } = dial.facts.curve[model][id];
    return dial.facts.alphas[share.indexOf(Math.max(...share))];
  }

  // --- what the reader does ----------------------------------------------------------------------

  function takePrompt() {
    const prompt = dial.facts.prompts[Number($("prompt").value)];
    if (!prompt) return;
    $("query").value = prompt.query;
    $("tools").value = prompt.tools;
    read();
  }

  function read() {
    try {
      reading = dial.read(dial.layOut($("tools").value, $("query").value));
      $("trouble").textContent = "";
    } catch (error) {
      $("trouble").textContent = error.message;
      return;
    }
    drawFiring();
    changeModel();
  }

  function changeModel() {
    live.clear();
    plain = null;
    turn();
  }

  function look(model, direction, alpha) {
    const p = Dial.probabilities(reading.turn(model, direction, alpha));
    return { p, propensity: dial.facts.openers.reduce((sum, id) => sum + p[id], 0) };
  }

  // The bars follow the dial at once; the answers, then the curves, in slices of a frame, which a
  // further turn cuts off.
  async function turn() {
    const mine = ++latest;
    const { model, direction, alpha } = chosen();
    describe(model, direction, alpha);
    if (!plain) {
      plain = look(model, 0, 1);
      show("plain", plain);
      $("plain-answer").textContent = "";
    }
    const now = look(model, direction, alpha);
    show("turned", now);
    drawCurves();

    const slices = slicer(mine);
    if (!plain.answer && !(await write("plain", plain, slices, [model, 0, 1]))) return;
    if (!(await write("turned", now, slices, [model, direction, alpha]))) return;
    clearTimeout(speaking);
    speaking = setTimeout(() => speak(model, direction, alpha, now), WAIT);
    for (const i of dial.facts.directions.keys()) {
      if (!isControl(i) && i !== direction) continue;
      const points = live.get(i) || [];
      for (const strength of grid().slice(points.length)) {
        if (!(await slices())) return;
        points.push([strength, reading.propensity(model, i, strength)]);
        if (points.length === grid().length) live.set(i, points);
      }
    }
    drawCurves();
  }

  // Await it between two steps: it lets the browser draw once a slice is used up, and is false when
  // the reader has turned the dial meanwhile.
  function slicer(mine) {
    let start = performance.now();
    return async () => {
      if (performance.now() - start > SLICE) {
        await new Promise((resolve) => setTimeout(resolve));
        start = performance.now();
      }
      return mine === latest;
    };
  }

  async function write(where, seen, slices, setting) {
    const ids = [];
    for (const token of reading.answering(...setting)) {
      ids.push(token);
      if (!(await slices())) return false;
    }
    seen.answer = dial.tokenizer.decode(ids) || "(it ends at once)";
    $(`${where}-answer`).textContent = seen.answer;
    $(`${where}-answer`).classList.toggle("call", seen.answer.includes("<tool_call>"));
    return true;
  }

  function describe(model, direction, alpha) {
    const { name, id, feature } = dial.facts.directions[direction];
    $("alpha-value").textContent = alpha.toFixed(2);
    $("alpha").setAttribute("aria-valuetext", `alpha ${alpha.toFixed(2)}`);
    $("turned-alpha").textContent = `alpha = ${alpha.toFixed(2)}, ${name}`;
    $("alpha-meaning").textContent =
      alpha === 0 ? "(taken away)" : alpha === 1 ? "(as it is)" : "";
    const { called: share } = dial.facts.curve[model][id];
    $("model-note").textContent =
      `Over all prompts ${called(model)} calls most often, on ${percent(Math.max(...share))}, at ` +
      `alpha = ${peak(model, id)} in this direction.`;
    $("direction-note").textContent =
      id === "switch" ? "" : "As long as what the switching feature would write" +
        (feature === null ? "." : ", whether this feature fires here or not.");
  }

  function speak(model, direction, alpha, now) {
    const { name } = dial.facts.directions[direction];
    $("summary").textContent = reading.length(model) === 0
      ? "The switching feature is silent at the last token of this prompt: scaling it does nothing, at any alpha."
      : `alpha = ${alpha.toFixed(2)}, ${name}, ${called(model)}: the chance of ` +
        `an acting turn is ${percent(now.propensity)} (left alone ${percent(plain.propensity)}). ${sentence(now.answer)}`;
  }

  function sentence(answer) {
    const call = answer.match(/<tool_call>[^]*?"name":\s*"([^"]*)"/);
    if (call) return `It calls ${call[1]}.`;
    if (answer.includes("<tool_call>")) return "It opens a call that names no tool.";
    return answer.includes("<think>") ? "It thinks, and calls nothing." : "It calls nothing.";
  }

  // --- what is shown -----------------------------------------------------------------------------

  function show(where, { p, propensity }) {
    $(`${where}-bar`).style.width = `${100 * propensity}%`;
    $(`${where}-propensity`).textContent = percent(propensity);
    if (where === "turned") {
      $("near-bar").style.width = `${100 * propensity}%`;
      $("near-propensity").textContent = percent(propensity);
    }
    const best = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, SHOWN);
    $(`${where}-tokens`).replaceChildren(
      ...best.map((id) => {
        const item = document.createElement("li");
        item.classList.toggle("opener", dial.facts.openers.includes(id));
        const [text, bar, number] = ["code", "i", "span"].map((tag) => document.createElement(tag));
        text.textContent = visible(dial.tokenizer.decode([id]));
        bar.style.width = `${100 * p[id]}%`;
        number.textContent = `${(100 * p[id]).toFixed(1)} %`;
        const track = document.createElement("div");
        track.append(bar);
        item.append(text, track, number);
        return item;
      })
    );
  }

  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

  function drawFiring() {
    const { directions, feature } = dial.facts;
    const own = directions[chosen().direction].feature;
    const shown = own === null ? feature : own;
    const firing = reading.firing(shown);
    const top = Math.max(...firing);
    const parts = reading.ids.map((id, t) => {
      const text = dial.tokenizer.decode([id]);
      if (firing[t] === 0) return document.createTextNode(text);
      const mark = document.createElement("mark");
      mark.style.setProperty("--strength", `${Math.round((100 * firing[t]) / top)}%`);
      mark.textContent = text.replaceAll("\n", "⏎\n");
      mark.title = `activation ${firing[t].toFixed(2)}`;
      return mark;
    });
    $("fires").replaceChildren(...parts);
    const n = firing.filter((value) => value > 0).length;
    const last = firing[firing.length - 1];
    $("fires-text").textContent =
      `Feature ${shown} fires on ${n} of ${reading.n} tokens` +
      (n ? `, at most ${top.toFixed(1)}` : "") +
      `; at the last one, where the dial acts, ` +
      (last > 0 ? `its activation is ${last.toFixed(1)}.` : "it is silent.");
  }

  // A chart of propensity against alpha. lines: [{class, points: [[alpha, p], ...]}]
  function chart(svg, lines, now) {
    const [left, right, top, bottom] = [38, 350, 10, 190];
    const { alphas } = dial.facts;
    const [low, high] = [Math.min(...alphas), Math.max(...alphas)];
    const x = (alpha) => left + ((alpha - low) / (high - low)) * (right - left);
    const y = (p) => bottom - p * (bottom - top);
    const make = (tag, attributes, text) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    const parts = [];
    for (const p of [0, 0.5, 1]) {
      parts.push(make("path", { class: "axis", d: `M${left} ${y(p)}H${right}` }));
      parts.push(make("text", { x: left - 5, y: y(p) + 4, "text-anchor": "end" }, `${100 * p} %`));
    }
    for (let alpha = Math.ceil(low); alpha <= high; alpha++) {
      parts.push(make("text", { x: x(alpha), y: bottom + 14, "text-anchor": "middle" }, alpha));
    }
    parts.push(make("text", { x: (left + right) / 2, y: bottom + 28, "text-anchor": "middle" }, "alpha"));
    for (const { kind, points } of lines) {
      const d = points.map(([alpha, p], i) => `${i ? "L" : "M"}${x(alpha).toFixed(1)} ${y(p).toFixed(1)}`);
      parts.push(make("path", { class: kind, d: d.join("") }));
    }
    parts.push(make("path", { class: "now", d: `M${x(now.alpha)} ${top}V${bottom}` }));
    parts.push(make("circle", { cx: x(now.alpha), cy: y(now.p), r: 5 }));
    svg.replaceChildren(...parts);
  }

  function grid() {
    const { alphas } = dial.facts;
    const n = Math.round((Math.max(...alphas) - Math.min(...alphas)) / STEP);
    return Array.from({ length: n + 1 }, (_, i) => Math.min(...alphas) + i * STEP);
  }

  const liveCurve = (model, direction) => live.get(direction);

  function measuredCurve(model, direction) {
    const { alphas, curve, directions } = dial.facts;
    return alphas.map((alpha, i) => [alpha, curve[model][directions[direction].id].propensity[i]]);
  }

  // Between measured strengths, a straight line.
  function at(points, alpha) {
    const i = Math.max(1, points.findIndex(([a]) => a >= alpha));
    const [[a0, p0], [a1, p1]] = [points[i - 1], points[i]];
    return p0 + ((alpha - a0) / (a1 - a0)) * (p1 - p0);
  }

  function drawCurves() {
    const { model, direction, alpha } = chosen();
    const { directions, n_prompts: n } = dial.facts;
    const random = [...directions.keys()].filter(isRandom);
    const mean = directions.findIndex((d) => d.id === "mean");
    const lines = (curveOf) => [
      ...random.map((i) => ({ kind: "random", points: curveOf(model, i) })),
      { kind: "mean", points: curveOf(model, mean) },
      { kind: "chosen", points: curveOf(model, direction) },
    ];
    const charts = [["measured", measuredCurve, `On average over ${n} prompts`]];
    const ready = [direction, mean, ...random].every((i) => live.has(i));
    if (ready) charts.push(["live", liveCurve, "On this prompt"]);
    else $("live-text").textContent = "Computing …";
    for (const [id, curveOf, what] of charts) {
      const p = at(curveOf(model, direction), alpha);
      chart($(id), lines(curveOf), { alpha, p });
      const others = random.filter((i) => i !== direction).map((i) => at(curveOf(model, i), alpha));
      $(`${id}-text`).textContent =
        `${what}, at alpha = ${alpha.toFixed(2)}: ${percent(p)} in ${called(model)}; the mean ` +
        `difference ${percent(at(curveOf(model, mean), alpha))}, ` +
        `${isRandom(direction) ? "the other random" : "random"} ` +
        `directions ${percent(Math.min(...others))} to ${percent(Math.max(...others))}.`;
    }
    $("legend-chosen").textContent = directions[direction].name;
    if (ready) drawNumbers(model, direction, random, mean);
  }

  function drawNumbers(model, direction, random, mean) {
    const { alphas, curve, directions, n_prompts: n } = dial.facts;
    const cell = (p) => `${(100 * p).toFixed(1)}`;
    const range = (values) => `${cell(Math.min(...values))} to ${cell(Math.max(...values))}`;
    const head = ["alpha", "this prompt", "mean difference", "random", `all ${n} prompts`, "mean difference", "random", "a call is made"];
    const rows = alphas.map((alpha, i) => [
      alpha,
      ...[liveCurve, measuredCurve].flatMap((curveOf) => [
        cell(at(curveOf(model, direction), alpha)),
        cell(at(curveOf(model, mean), alpha)),
        range(random.map((r) => at(curveOf(model, r), alpha))),
      ]),
      cell(curve[model][directions[direction].id].called[i]),
    ]);
    const row = (values, tag) => {
      const line = document.createElement("tr");
      values.forEach((value, i) => {
        const element = document.createElement(i ? tag : "th");
        element.scope = tag === "th" ? "col" : i ? "" : "row";
        element.textContent = value;
        line.append(element);
      });
      return line;
    };
    const caption = document.createElement("caption");
    caption.textContent =
      `Chance in % that the answer opens an acting turn: ${called(model)}, ${directions[direction].name}. ` +
      `Last column: share of all prompts on which the answer holds a call.`;
    $("numbers").replaceChildren(caption, row(head, "th"), ...rows.map((values) => row(values, "td")));
  }
})();
