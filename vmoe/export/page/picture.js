// A picture as the model sees it: the central square, resized as OpenCV does in Python.
"use strict";

const LARGEST_SHOWN = 400; // pixels

/** From a file: the model's pixels (size * size * 3) and a canvas to show. Rejects what is no picture. */
async function readPicture(blob, size) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const whole = await createImageBitmap(blob, options);
  const side = Math.min(whole.width, whole.height);
  const [left, top] = [Math.floor((whole.width - side) / 2), Math.floor((whole.height - side) / 2)];
  const square = canvasOf(whole, left, top, side, side);
  const shown = canvasOf(square, 0, 0, side, Math.max(Math.min(side, LARGEST_SHOWN), size));
  const rgba = square.getContext("2d").getImageData(0, 0, side, side).data;
  whole.close();
  return { pixels: resize(rgba, side, size), shown };
}

/** A part of a picture over white. */
function canvasOf(source, left, top, side, size) {
  const canvas = make("canvas", { width: size, height: size });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, size, size);
  context.drawImage(source, left, top, side, side, 0, 0, size, size);
  return canvas;
}

/** For each new pixel along a side, the old ones and their weights: areas when it shrinks, else linear. */
function weights(old, size) {
  const scale = old / size;
  return Array.from({ length: size }, (_, index) => {
    if (old < size) {
      const at = Math.min(Math.max((index + 0.5) * scale - 0.5, 0), old - 1);
      const first = Math.floor(at);
      return [[first, 1 - (at - first)], [Math.min(first + 1, old - 1), at - first]];
    }
    const [start, end] = [index * scale, Math.min((index + 1) * scale, old)];
    const parts = [];
    for (let place = Math.floor(start); place < end - 1e-6; place += 1) {
      parts.push([place, (Math.min(place + 1, end) - Math.max(place, start)) / (end - start)]);
    }
    return parts;
  });
}

/** RGBA pixels (old * old * 4) as RGB (size * size * 3). */
function resize(rgba, old, size) {
  const along = weights(old, size);
  const rows = new Float32Array(old * size * 3);
  for (let y = 0; y < old; y += 1) {
    along.forEach((parts, x) => {
      for (const [place, weight] of parts) {
        for (let c = 0; c < 3; c += 1) rows[(y * size + x) * 3 + c] += weight * rgba[(y * old + place) * 4 + c];
      }
    });
  }
  const pixels = new Uint8Array(size * size * 3);
  const halves = old === 2 * size ? 0 : 1; // OpenCV rounds halves up where it halves, else to even
  along.forEach((parts, y) => {
    for (let at = 0; at < size * 3; at += 1) {
      let sum = 0;
      for (const [place, weight] of parts) sum += weight * rows[place * size * 3 + at];
      const up = Math.floor(sum + 0.5);
      pixels[y * size * 3 + at] = halves && up - sum === 0.5 && up % 2 ? up - 1 : up;
    }
  });
  return pixels;
}
