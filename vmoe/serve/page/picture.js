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

/** RGBA pixels (old * old * 4) as RGB (size * size * 3). */
const resize = (rgba, old, size) => (old < size ? enlarge(rgba, old, size) : shrink(rgba, old, size));

/** For each new pixel along a side, the old ones whose areas it covers, and their shares of it. */
function areas(old, size) {
  const scale = old / size;
  return Array.from({ length: size }, (_, index) => {
    const [start, end] = [index * scale, Math.min((index + 1) * scale, old)];
    const parts = [];
    for (let place = Math.floor(start); place < end - 1e-6; place += 1) {
      parts.push([place, (Math.min(place + 1, end) - Math.max(place, start)) / (end - start)]);
    }
    return parts;
  });
}

/** Averages areas: INTER_AREA. */
function shrink(rgba, old, size) {
  const along = areas(old, size);
  const rows = new Float32Array(old * size * 3);
  for (let y = 0; y < old; y += 1) {
    along.forEach((parts, x) => {
      for (const [place, weight] of parts) {
        for (let c = 0; c < 3; c += 1) rows[(y * size + x) * 3 + c] += weight * rgba[(y * old + place) * 4 + c];
      }
    });
  }
  const pixels = new Uint8Array(size * size * 3);
  const toEven = old !== 2 * size; // halves; where it halves a picture, OpenCV rounds them up
  along.forEach((parts, y) => {
    for (let at = 0; at < size * 3; at += 1) {
      let sum = 0;
      for (const [place, weight] of parts) sum += weight * rows[place * size * 3 + at];
      const up = Math.floor(sum + 0.5);
      pixels[y * size * 3 + at] = toEven && up - sum === 0.5 && up % 2 ? up - 1 : up;
    }
  });
  return pixels;
}

/** Between which old pixels each new one lies along a side, and their weights in 2048ths. */
function between(old, size, atEdge) {
  const inside = (place) => Math.min(Math.max(place, 0), old - 1);
  return Array.from({ length: size }, (_, index) => {
    const at = ((index + 0.5) * old) / size - 0.5;
    const first = Math.floor(at);
    const part = first < 0 || first >= old - 1 ? atEdge(at - first) : Math.fround(at - first);
    return [inside(first), inside(first + 1), Math.round(2048 * Math.fround(1 - part)), Math.round(2048 * part)];
  });
}

/** Interpolates in whole numbers: INTER_LINEAR, which drops a few bits of each row. */
function enlarge(rgba, old, size) {
  const across = between(old, size, () => 0);
  const down = between(old, size, Math.fround);
  const rows = new Int32Array(old * size * 3);
  for (let y = 0; y < old; y += 1) {
    across.forEach(([left, right, leftWeight, rightWeight], x) => {
      for (let c = 0; c < 3; c += 1) {
        const [first, second] = [rgba[(y * old + left) * 4 + c], rgba[(y * old + right) * 4 + c]];
        rows[(y * size + x) * 3 + c] = (first * leftWeight + second * rightWeight) >> 4;
      }
    });
  }
  const pixels = new Uint8Array(size * size * 3);
  down.forEach(([top, bottom, topWeight, bottomWeight], y) => {
    for (let at = 0; at < size * 3; at += 1) {
      const [first, second] = [rows[top * size * 3 + at], rows[bottom * size * 3 + at]];
      pixels[y * size * 3 + at] = (((first * topWeight) >> 16) + ((second * bottomWeight) >> 16) + 2) >> 2;
    }
  });
  return pixels;
}
