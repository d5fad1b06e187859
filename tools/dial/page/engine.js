// The two models, their tokenizer and the crosscoder's encoder in plain JavaScript. It makes no
// request and touches no page, so that the tests run it under node as well.
//
//   const dial = await Dial.open(packed);            // what pack.py wrote
//   const reading = dial.read(dial.layOut(tools, query));
//   const logits = reading.turn("A", 0, 2.0);        // model, direction, alpha: first token
//   const answer = reading.answer("A", 0, 2.0);      // the greedy answer, as token ids
//
// Everything up to the site, and all keys and values of the earlier tokens, do not depend on the
// dial. They are computed once per prompt; a turn costs the blocks above the site at one token.
"use strict";

(function (root) {
  // --- bytes ------------------------------------------------------------------------------------

  function bytesOf(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  async function unpacked(base64) {
    const stream = new Blob([bytesOf(base64)]).stream();
    const whole = new Response(stream.pipeThrough(new DecompressionStream("gzip")));
    return new Uint8Array(await whole.arrayBuffer());
  }

  // Model A is stored as the difference of its 16-bit words from the base's, which wraps around;
  // all low bytes come first, then all high bytes, because that compresses better.
  function plusDifference(base, difference) {
    const n = base.length / 2;
    const out = new Uint8Array(base.length);
    for (let i = 0; i < n; i++) {
      const word =
        (base[2 * i] | (base[2 * i + 1] << 8)) + (difference[i] | (difference[n + i] << 8));
      out[2 * i] = word & 255;
      out[2 * i + 1] = (word >> 8) & 255;
    }
    return out;
  }

  // A safetensors file as {name: Float32Array}; bfloat16 is the upper half of a float32.
  function readSafetensors(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const start = 8 + Number(view.getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
    const tensors = {};
    for (const [name, entry] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      const at = start + entry.data_offsets[0];
      const size = entry.shape.reduce((a, b) => a * b, 1);
      const out = new Float32Array(size);
      if (entry.dtype === "BF16") {
        const bits = new Uint32Array(out.buffer);
        for (let i = 0; i < size; i++) bits[i] = view.getUint16(at + 2 * i, true) << 16;
      } else if (entry.dtype === "F32") {
        for (let i = 0; i < size; i++) out[i] = view.getFloat32(at + 4 * i, true);
      } else {
        throw new Error(`${name} is ${entry.dtype}; only BF16 and F32 can be read`);
      }
      tensors[name] = out;
    }
    return tensors;
  }

  // --- tokenizer: byte-level BPE as tokenizer.json states it ---------------------------------------

  // The pattern is written for Oniguruma. JavaScript's \s is not Unicode's White_Space (it lacks
  // U+0085 and has U+FEFF), and (?i:...) is too new for it.
  function splitter(pattern) {
    const anyCase = (text) =>
      text.replace(/[a-z]/g, (c) => (c === "s" ? "[sSſ]" : `[${c}${c.toUpperCase()}]`));
    const translated = pattern
      .replace(/\(\?i:([^()]*)\)/g, (_, inner) => `(?:${anyCase(inner)})`)
      .replaceAll("\\s", "\\p{White_Space}")
      .replaceAll("\\S", "\\P{White_Space}");
    return new RegExp(translated, "gu");
  }

  // Bytes that print stand for themselves, the others for letters from U+0100 on (GPT-2's table).
  function byteLetters() {
    const letters = [];
    let next = 256;
    for (let b = 0; b < 256; b++) {
      const prints = (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
      letters.push(String.fromCharCode(prints ? b : next++));
    }
    return letters;
  }

  class Tokenizer {
    constructor(state) {
      this.vocab = new Map(Object.entries(state.model.vocab));
      this.ranks = new Map(state.model.merges.map((pair, rank) => [pair.join(" "), rank]));
      this.split = splitter(state.pre_tokenizer.pretokenizers[0].pattern.Regex);
      this.letters = byteLetters();
      this.byteOf = new Map(this.letters.map((letter, b) => [letter, b]));
      this.encoder = new TextEncoder();
      // ignoreBOM: else a leading U+FEFF would be swallowed.
      this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      this.added = new Map(state.added_tokens.map((t) => [t.content, t.id]));
      const escaped = [...this.added.keys()]
        .sort((a, b) => b.length - a.length)
        .map((text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
      this.special = new RegExp(`(${escaped.join("|")})`);
      this.textOf = new Map([...this.vocab, ...this.added].map(([text, id]) => [id, text]));
      this.known = new Map(); // word -> ids
    }

    encode(text) {
      const ids = [];
      for (const part of text.split(this.special)) {
        if (this.added.has(part)) ids.push(this.added.get(part));
        else for (const [word] of part.matchAll(this.split)) ids.push(...this.wordIds(word));
      }
      return ids;
    }

    wordIds(word) {
      if (this.known.has(word)) return this.known.get(word);
      let parts = Array.from(this.encoder.encode(word), (b) => this.letters[b]);
      while (parts.length > 1) {
        let best = Infinity;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
          if (rank < best) best = rank;
        }
        if (best === Infinity) break;
        const merged = [];
        for (let i = 0; i < parts.length; i++) {
          if (i + 1 < parts.length && this.ranks.get(`${parts[i]} ${parts[i + 1]}`) === best) {
            merged.push(parts[i] + parts[++i]);
          } else {
            merged.push(parts[i]);
          }
        }
        parts = merged;
      }
      const ids = parts.map((part) => this.vocab.get(part));
      this.known.set(word, ids);
      return ids;
    }

    decode(ids) {
      const bytes = [];
      for (const id of ids) {
        const text = this.textOf.get(id);
        if (this.added.has(text)) bytes.push(...this.encoder.encode(text));
        else for (const letter of text) bytes.push(this.byteOf.get(letter));
      }
      return this.decoder.decode(new Uint8Array(bytes));
    }
  }

  // --- the forward pass (Qwen2) --------------------------------------------------------------------

  // out[row] = x[row] @ W.T + bias, four rows at a time, so that a weight is fetched once for them;
  // a row alone has four sums of its own, because one sum would wait for itself.
  function linear(x, rows, W, bias, out, nIn, nOut) {
    let r = 0;
    for (; r + 3 < rows; r += 4) {
      const x0 = r * nIn, x1 = x0 + nIn, x2 = x1 + nIn, x3 = x2 + nIn;
      for (let o = 0; o < nOut; o++) {
        const at = o * nIn;
        let a = bias ? bias[o] : 0, b = a, c = a, d = a;
        for (let i = 0; i < nIn; i++) {
          const w = W[at + i];
          a += w * x[x0 + i];
          b += w * x[x1 + i];
          c += w * x[x2 + i];
          d += w * x[x3 + i];
        }
        const to = r * nOut + o;
        out[to] = a;
        out[to + nOut] = b;
        out[to + 2 * nOut] = c;
        out[to + 3 * nOut] = d;
      }
    }
    const whole = nIn - (nIn % 4);
    for (; r < rows; r++) {
      const from = r * nIn;
      for (let o = 0; o < nOut; o++) {
        const at = o * nIn;
        let a = bias ? bias[o] : 0, b = 0, c = 0, d = 0, i = 0;
        for (; i < whole; i += 4) {
          a += W[at + i] * x[from + i];
          b += W[at + i + 1] * x[from + i + 1];
          c += W[at + i + 2] * x[from + i + 2];
          d += W[at + i + 3] * x[from + i + 3];
        }
        for (; i < nIn; i++) a += W[at + i] * x[from + i];
        out[r * nOut + o] = a + b + (c + d);
      }
    }
  }

  class Model {
    constructor(config, tensors, limit) {
      this.width = config.hidden_size;
      this.inner = config.intermediate_size;
      this.heads = config.num_attention_heads;
      this.groups = config.num_key_value_heads;
      this.size = config.head_dim || this.width / this.heads;
      this.depth = config.num_hidden_layers;
      this.vocab = config.vocab_size;
      this.epsilon = config.rms_norm_eps;
      this.embedding = tensors["model.embed_tokens.weight"];
      this.norm = tensors["model.norm.weight"];
      this.layers = Array.from({ length: this.depth }, (_, i) => {
        const of = (name) => tensors[`model.layers.${i}.${name}`];
        return {
          before: of("input_layernorm.weight"),
          between: of("post_attention_layernorm.weight"),
          q: of("self_attn.q_proj.weight"), qBias: of("self_attn.q_proj.bias"),
          k: of("self_attn.k_proj.weight"), kBias: of("self_attn.k_proj.bias"),
          v: of("self_attn.v_proj.weight"), vBias: of("self_attn.v_proj.bias"),
          o: of("self_attn.o_proj.weight"),
          gate: of("mlp.gate_proj.weight"), up: of("mlp.up_proj.weight"),
          down: of("mlp.down_proj.weight"),
        };
      });
      const half = this.size / 2;
      this.cos = new Float32Array(limit * half);
      this.sin = new Float32Array(limit * half);
      for (let p = 0; p < limit; p++) {
        for (let i = 0; i < half; i++) {
          const angle = p / config.rope_parameters.rope_theta ** ((2 * i) / this.size);
          this.cos[p * half + i] = Math.cos(angle);
          this.sin[p * half + i] = Math.sin(angle);
        }
      }
    }

    // Keys and values of every layer, with room for `capacity` tokens.
    room(capacity) {
      const size = capacity * this.groups * this.size;
      return this.layers.map(() => ({ k: new Float32Array(size), v: new Float32Array(size) }));
    }

    embed(ids) {
      const x = new Float32Array(ids.length * this.width);
      ids.forEach((id, t) => {
        x.set(this.embedding.subarray(id * this.width, (id + 1) * this.width), t * this.width);
      });
      return x;
    }

    normed(x, rows, weight) {
      const { width, epsilon } = this;
      const out = new Float32Array(rows * width);
      for (let r = 0; r < rows; r++) {
        let squares = 0;
        for (let i = 0; i < width; i++) squares += x[r * width + i] ** 2;
        const factor = 1 / Math.sqrt(squares / width + epsilon);
        for (let i = 0; i < width; i++) {
          out[r * width + i] = x[r * width + i] * factor * weight[i];
        }
      }
      return out;
    }

    rotate(x, heads, position) {
      const half = this.size / 2, at = position * half;
      for (let h = 0; h < heads; h++) {
        for (let i = 0; i < half; i++) {
          const a = h * this.size + i, b = a + half;
          const cos = this.cos[at + i], sin = this.sin[at + i];
          const [u, v] = [x[a], x[b]];
          x[a] = u * cos - v * sin;
          x[b] = v * cos + u * sin;
        }
      }
    }

    // Runs `rows` tokens, of which the first is at `position`, through blocks from..to-1, in place,
    // and leaves their keys and values in `cache`.
    blocks(cache, x, rows, position, from, to) {
      const { width, inner, heads, groups, size } = this;
      const nQ = heads * size, nK = groups * size, share = heads / groups;
      const q = new Float32Array(rows * nQ), mixed = new Float32Array(rows * nQ);
      const k = new Float32Array(rows * nK), v = new Float32Array(rows * nK);
      const gate = new Float32Array(rows * inner), up = new Float32Array(rows * inner);
      const out = new Float32Array(rows * width);
      const scores = new Float64Array(position + rows);
      for (let n = from; n < to; n++) {
        const w = this.layers[n], store = cache[n];
        const before = this.normed(x, rows, w.before);
        linear(before, rows, w.q, w.qBias, q, width, nQ);
        linear(before, rows, w.k, w.kBias, k, width, nK);
        linear(before, rows, w.v, w.vBias, v, width, nK);
        for (let r = 0; r < rows; r++) {
          this.rotate(q.subarray(r * nQ, (r + 1) * nQ), heads, position + r);
          this.rotate(k.subarray(r * nK, (r + 1) * nK), groups, position + r);
        }
        const keys = store.k, values = store.v, root = Math.sqrt(size);
        keys.set(k, position * nK);
        values.set(v, position * nK);
        mixed.fill(0);
        for (let r = 0; r < rows; r++) {
          const seen = position + r + 1;
          for (let h = 0; h < heads; h++) {
            const mine = r * nQ + h * size, theirs = Math.floor(h / share) * size;
            let largest = -Infinity, total = 0;
            for (let t = 0; t < seen; t++) {
              let score = 0;
              const at = t * nK + theirs;
              for (let i = 0; i < size; i++) score += q[mine + i] * keys[at + i];
              score /= root;
              scores[t] = score;
              if (score > largest) largest = score;
            }
            for (let t = 0; t < seen; t++) total += scores[t] = Math.exp(scores[t] - largest);
            for (let t = 0; t < seen; t++) {
              const weight = scores[t] / total, at = t * nK + theirs;
              for (let i = 0; i < size; i++) mixed[mine + i] += weight * values[at + i];
            }
          }
        }
        linear(mixed, rows, w.o, null, out, nQ, width);
        for (let i = 0; i < out.length; i++) x[i] += out[i];
        const between = this.normed(x, rows, w.between);
        linear(between, rows, w.gate, null, gate, width, inner);
        linear(between, rows, w.up, null, up, width, inner);
        for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
        linear(gate, rows, w.down, null, out, inner, width);
        for (let i = 0; i < out.length; i++) x[i] += out[i];
      }
      return x;
    }

    // Of one token; embedding and unembedding are tied.
    logits(x) {
      const out = new Float32Array(this.vocab);
      linear(this.normed(x, 1, this.norm), 1, this.embedding, null, out, this.width, this.vocab);
      return out;
    }
  }

  // --- the crosscoder's encoder ---------------------------------------------------------------------

  class Encoder {
    constructor(tensors, k) {
      Object.assign(this, { weight: tensors.encoder, bias: tensors.b_enc, k });
      this.mean = tensors.normaliser_mean;
      this.scale = tensors.normaliser_scale;
      this.nFeatures = this.bias.length;
    }

    // streams: one Float32Array (token, width) per model. Returns (token, feature).
    codes(streams, rows) {
      const width = streams[0].length / rows, nIn = width * streams.length;
      const z = new Float32Array(rows * nIn);
      streams.forEach((h, m) => {
        for (let r = 0; r < rows; r++) {
          for (let i = 0; i < width; i++) {
            const mean = this.mean[m * width + i];
            z[r * nIn + m * width + i] = (h[r * width + i] - mean) / this.scale[m];
          }
        }
      });
      const codes = new Float32Array(rows * this.nFeatures);
      linear(z, rows, this.weight, this.bias, codes, nIn, this.nFeatures);
      for (let r = 0; r < rows; r++) {
        const row = codes.subarray(r * this.nFeatures, (r + 1) * this.nFeatures);
        const least = Float32Array.from(row).sort()[this.nFeatures - this.k];
        for (let i = 0; i < row.length; i++) if (row[i] < least || row[i] < 0) row[i] = 0;
      }
      return codes;
    }
  }

  // --- a prompt that was read -------------------------------------------------------------------------

  class Reading {
    constructor(dial, text) {
      this.dial = dial;
      this.ids = dial.tokenizer.encode(text);
      this.n = this.ids.length;
      const limit = dial.limit - dial.facts.max_new_tokens;
      if (this.n > limit) {
        throw new Error(`The prompt has ${this.n} tokens; there is room for ${limit}.`);
      }
      this.states = {};
      const above = dial.facts.layer + 1;
      for (const [name, model] of Object.entries(dial.models)) {
        const cache = model.room(this.n + dial.facts.max_new_tokens);
        const x = model.blocks(cache, model.embed(this.ids), this.n, 0, 0, above);
        this.states[name] = { cache, site: x.slice() };
        model.blocks(cache, x, this.n, 0, above, model.depth);
      }
      const streams = Object.values(this.states).map((state) => state.site);
      this.codes = dial.encoder.codes(streams, this.n);
    }

    // How strongly a feature fires at each token.
    firing(feature) {
      const { nFeatures } = this.dial.encoder;
      return this.ids.map((_, t) => this.codes[t * nFeatures + feature]);
    }

    // What the dial adds: (alpha - 1) times the length of what the feature writes here.
    length(name) {
      const { facts, encoder, names, rowLength } = this.dial;
      const code = this.codes[(this.n - 1) * encoder.nFeatures + facts.feature];
      return code * encoder.scale[names.indexOf(name)] * rowLength;
    }

    steered(name, direction, alpha) {
      const { width } = this.dial.models[name];
      const x = this.states[name].site.slice((this.n - 1) * width);
      const unit = this.dial.units.subarray(direction * width, (direction + 1) * width);
      const by = (alpha - 1) * this.length(name);
      for (let i = 0; i < width; i++) x[i] += by * unit[i];
      return x;
    }

    // The first token's logits. Leaves the steered token's keys and values in the cache, from which
    // `answer` goes on.
    turn(name, direction, alpha) {
      const model = this.dial.models[name];
      const x = this.steered(name, direction, alpha);
      const above = this.dial.facts.layer + 1;
      return model.logits(
        model.blocks(this.states[name].cache, x, 1, this.n - 1, above, model.depth)
      );
    }

    // The greedy answer, a token at a time. Another turn ends it: it rewrites the cache.
    *answering(name, direction, alpha) {
      const { models, facts } = this.dial;
      const model = models[name], { cache } = this.states[name];
      let logits = this.turn(name, direction, alpha);
      for (let step = 0; step < facts.max_new_tokens; step++) {
        const token = largest(logits);
        if (facts.ends.includes(token)) return;
        yield token;
        const x = model.blocks(cache, model.embed([token]), 1, this.n + step, 0, model.depth);
        logits = model.logits(x);
      }
    }

    answer(name, direction, alpha) {
      return [...this.answering(name, direction, alpha)];
    }

    propensity(name, direction, alpha) {
      const p = probabilities(this.turn(name, direction, alpha));
      return this.dial.facts.openers.reduce((sum, id) => sum + p[id], 0);
    }
  }

  function largest(values) {
    let best = 0;
    for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
    return best;
  }

  function probabilities(logits) {
    const top = logits[largest(logits)];
    const p = Float64Array.from(logits, (value) => Math.exp(value - top));
    const total = p.reduce((a, b) => a + b, 0);
    return p.map((value) => value / total);
  }

  async function open(packed) {
    const [baseBytes, difference, codec, text] = await Promise.all(
      [packed.base, packed.difference, packed.directions, packed.tokenizer].map(unpacked)
    );
    const { facts, config } = packed;
    const limit = config.max_position_embeddings;
    const tensors = readSafetensors(codec);
    const dial = {
      facts,
      limit,
      names: ["A", "B"], // the order of the crosscoder's streams
      tokenizer: new Tokenizer(JSON.parse(new TextDecoder().decode(text))),
      models: {
        A: new Model(config, readSafetensors(plusDifference(baseBytes, difference)), limit),
        B: new Model(config, readSafetensors(baseBytes), limit),
      },
      encoder: new Encoder(tensors, facts.k),
      units: tensors.directions,
      rowLength: Math.sqrt(tensors.row.reduce((sum, w) => sum + w * w, 0)),
      layOut(tools, query) {
        const fill = { "{tools}": tools, "{query}": query };
        return facts.template.replace(/\{tools\}|\{query\}/g, (slot) => fill[slot]);
      },
      read: (prompt) => new Reading(dial, prompt),
    };
    return dial;
  }

  root.Dial = { open, largest, probabilities };
})(globalThis);
