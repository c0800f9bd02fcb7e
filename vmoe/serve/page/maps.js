// Which expert takes which patch, drawn over the pale picture.
"use strict";

const MAP_SIZE = 384;
const DROPPED = "rgb(26 26 31)";

const colourOf = (expert) => ABOUT.palette[expert % ABOUT.palette.length];

/** The picture, grey and light: a background for colours. */
function drawPale(context, shown) {
  context.drawImage(shown, 0, 0, MAP_SIZE, MAP_SIZE);
  const image = context.getImageData(0, 0, MAP_SIZE, MAP_SIZE);
  for (let at = 0; at < image.data.length; at += 4) {
    const [red, green, blue] = image.data.subarray(at, at + 3);
    image.data.fill(255 * 0.6 + 0.37 * (0.2126 * red + 0.7152 * green + 0.0722 * blue), at, at + 3);
  }
  context.putImageData(image, 0, 0);
}

/** Colours each patch by its choice of a rank; its opacity is the gate over the largest one. */
function drawMap(canvas, shown, layer, told, rank) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  drawPale(context, shown);
  const [rows, columns] = layer.grid;
  const largest = told.gates.reduce((a, b) => Math.max(a, b), 1e-12);
  layer.patches.forEach((token, patch) => {
    const choice = token * layer.top_k + rank;
    const gate = told.gates[token * layer.num_experts + told.chosen[choice]];
    const [left, right] = [0, 1].map((step) => Math.round(((patch % columns) + step) * MAP_SIZE / columns));
    const [top, bottom] = [0, 1].map((step) => Math.round((Math.floor(patch / columns) + step) * MAP_SIZE / rows));
    context.globalAlpha = told.kept[choice] ? gate / largest : 0.85;
    context.fillStyle = told.kept[choice] ? colourOf(told.chosen[choice]) : DROPPED;
    context.fillRect(left, top, right - left, bottom - top);
  });
  context.globalAlpha = 1;
}

/** How many choices of the patches each expert got, how many of them found room, and the share that did not. */
function counts(layer, told) {
  const taken = new Array(layer.num_experts).fill(0);
  let dropped = 0;
  for (const token of layer.patches) {
    for (let rank = 0; rank < layer.top_k; rank += 1) {
      const choice = token * layer.top_k + rank;
      if (told.kept[choice]) taken[told.chosen[choice]] += 1;
      else dropped += 1;
    }
  }
  return { taken, dropped: dropped / (layer.patches.length * layer.top_k) };
}
