// What the page holds: the report, the sampled images, the colours. `vmoe/explain/page/packing.py` packed them.

const held = (id) => JSON.parse(document.getElementById(id).textContent);
const REPORT = held("report");
const SAMPLE = held("sample");
const PALETTE = held("palette");

function decoded(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  return bytes;
}

/** The codes of a packed array, row by row. */
function codes(packed) {
  const bytes = decoded(packed.packed);
  return packed.bits === 8 ? bytes : new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
}

/** What a code of a quantised array stands for; code 0 is a missing number. */
function meaning(packed) {
  const step = (packed.high - packed.low) / (2 ** packed.bits - 2);
  return (code) => (code === 0 ? null : packed.low + (code - 1) * step);
}

const tables = new WeakMap();

/** A nested list of numbers, packed or not. */
function table(value) {
  if (!value || !value.packed) return Array.isArray(value) ? value.map(table) : value;
  if (!tables.has(value)) {
    const flat = codes(value);
    const read = "low" in value ? meaning(value) : (code) => code;
    const part = (shape, start) =>
      shape.length === 0
        ? read(flat[start])
        : range(shape[0]).map((index) =>
            part(shape.slice(1), start + index * shape.slice(1).reduce((a, b) => a * b, 1)),
          );
    tables.set(value, part(value.shape, 0));
  }
  return tables.get(value);
}

const NO_PATCH = 65535;

/** The patches of a gallery ("top" or "random") of an expert: [{image, patch, gate}]. */
function gallery(layer, kind, expert) {
  const [image, patch, gate] = ["image", "patch", "gate"].map((name) => table(layer[kind][name])[expert]);
  return range(image.length)
    .filter((index) => image[index] !== NO_PATCH)
    .map((index) => ({ image: image[index], patch: patch[index], gate: gate[index] }));
}

/** Experts and gates of the tokens of one layer, largest first; decoded when first asked for. */
class Ranking {
  constructor(packed) {
    [, this.tokens, this.top] = packed.experts.shape;
    this.experts = codes(packed.experts);
    this.codes = codes(packed.gates);
    this.gateOf = meaning(packed.gates);
    this.largest = packed.gates.high;
  }

  expert(image, token, rank) {
    return this.experts[(image * this.tokens + token) * this.top + rank];
  }

  gate(image, token, rank) {
    return this.gateOf(this.codes[(image * this.tokens + token) * this.top + rank]) ?? 0;
  }

  /** The gate of an expert on a token; null when it is not among those the page holds. */
  gateFor(image, token, expert) {
    for (let rank = 0; rank < this.top; rank += 1) {
      if (this.expert(image, token, rank) === expert) return this.gate(image, token, rank);
    }
    return null;
  }
}

/** The routing of the sampled images in one layer. */
class LayerMaps {
  constructor(index) {
    const packed = SAMPLE.layers[index];
    this.layer = REPORT.layers[index];
    [this.rows, this.columns] = this.layer.grid;
    this.prefix = this.layer.prefix;
    this.weights = new Ranking(packed.weights);
    this.dispatch = packed.dispatch && new Ranking(packed.dispatch);
    this.chosen = packed.chosen;
    this.droppedBits = codes(packed.dropped);
    this.entropyCodes = codes(packed.entropy);
    this.entropyOf = meaning(packed.entropy);
  }

  entropy(image, token) {
    return this.entropyOf(this.entropyCodes[image * this.weights.tokens + token]);
  }

  isDropped(image, token, rank) {
    return ((this.droppedBits[image * this.weights.tokens + token] >> rank) & 1) === 1;
  }

  /** Share of a token's choices that was dropped; where experts choose, 1 if none took it. */
  droppedShare(image, token) {
    const choices = Math.max(1, Math.min(8, this.chosen));
    return range(choices).filter((rank) => this.isDropped(image, token, rank)).length / choices;
  }

  /** The token at a spot: a prefix token, or the patch under a place in [0, 1) x [0, 1). */
  token(spot) {
    if (spot.prefix !== null) return spot.prefix < this.prefix ? spot.prefix : null;
    return this.prefix + Math.floor(spot.y * this.rows) * this.columns + Math.floor(spot.x * this.columns);
  }
}

const opened = new Map();

function maps(index) {
  if (!opened.has(index)) opened.set(index, new LayerMaps(index));
  return opened.get(index);
}

/** The spot in the middle of a patch, counted row by row. */
function spotOf(layer, patch) {
  const [rows, columns] = REPORT.layers[layer].grid;
  return { x: ((patch % columns) + 0.5) / columns, y: (Math.floor(patch / columns) + 0.5) / rows, prefix: null };
}
