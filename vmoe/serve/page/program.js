// The exported model, run by ONNX Runtime Web in one thread. Its parts come as text, as a page from disk may fetch nothing.
"use strict";

async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Starts the model. */
async function loadProgram() {
  const glue = new Blob([await unpacked(RUNTIME.mjs)], { type: "text/javascript" });
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await unpacked(RUNTIME.wasm)).buffer;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
  return ort.InferenceSession.create(await unpacked(MODEL), { executionProviders: ["wasm"] });
}

/** Pixels (size * size * 3) as the model's input. */
function normalised(pixels) {
  const { image_size: size, mean, std } = ABOUT;
  const values = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c += 1) {
    for (let at = 0; at < size * size; at += 1) {
      values[c * size * size + at] = (pixels[at * 3 + c] - 255 * mean[c]) / (255 * std[c]);
    }
  }
  return new ort.Tensor("float32", values, [1, 3, size, size]);
}

/** The model's logits and, of each layer, its gates (N, E), choices (N, K) and which of them found room (N, K). */
async function runProgram(session, images, { off, factors }) {
  const experts = ABOUT.layers[0].num_experts;
  const bias = Float32Array.from(off.flat(), (isOff) => (isOff ? ABOUT.off : 0));
  const told = await session.run({
    images,
    bias: new ort.Tensor("float32", bias, [off.length, experts]),
    capacity_factor: new ort.Tensor("float32", Float32Array.from(factors), [factors.length]),
  });
  const layers = ABOUT.layers.map((_, index) => ({
    gates: told[`gates_${index}`].data,
    chosen: told[`chosen_${index}`].data,
    kept: told[`kept_${index}`].data,
  }));
  return { logits: Array.from(told.logits.data), layers };
}

/** Of several classes per picture each has a probability of its own. */
const probabilities = (logits) =>
  ABOUT.thresholds ? logits.map((logit) => 1 / (1 + Math.exp(-logit))) : softmax(logits);

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}
