// Numbers as text, colours of numbers.

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const withMinus = (text) => (/^-[0.]*$/.test(text) ? text.slice(1) : text.replace("-", "−"));
const number = (value, digits = 2) => (isNumber(value) ? withMinus(value.toFixed(digits)) : "–");
const brief = (value) => (isNumber(value) ? withMinus(value.toPrecision(2)) : "–");
const percent = (value, digits = 1) => (isNumber(value) ? `${withMinus((100 * value).toFixed(digits))} %` : "–");
const count = (value) => (isNumber(value) ? value.toLocaleString("en") : "–");
const times = (value) => `${number(value, value >= 10 ? 1 : 2)}×`;
const signed = (value, text) => (isNumber(value) && value > 0 ? `+${text}` : text);
const points = (value) => (isNumber(value) ? `${signed(value, withMinus((100 * value).toFixed(2)))} points` : "–");
const plural = (many, one, more = `${one}s`) => `${count(many)} ${many === 1 ? one : more}`;

const sum = (values) => values.reduce((total, value) => total + value, 0);
const largest = (values) => values.reduce((most, value) => (isNumber(value) && value > most ? value : most), -Infinity);
const smallest = (values) => -largest(values.map((value) => (isNumber(value) ? -value : null)));
const range = (length) => Array.from({ length }, (_, index) => index);

/** "0.31 [0.28, 0.35]": a value and its 95 % interval. */
function withInterval(point, format = number) {
  return isNumber(point.low)
    ? `${format(point.value)} [${format(point.low)}, ${format(point.high)}]`
    : format(point.value);
}

/** "a, b and c". */
function listed(names) {
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

/** Round numbers that divide a range into about `wanted` steps. */
function niceTicks(low, high, wanted = 4) {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= raw * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index += 1)
    ticks.push(index * step);
  return ticks;
}

const tickText = (ticks) => {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(ticks[0]) || 1;
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  const more = ticks.some((tick) => Math.abs(tick * 10 ** digits - Math.round(tick * 10 ** digits)) > 1e-6) ? 1 : 0;
  return (value) => withMinus(value.toFixed(digits + more));
};

const channels = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

/** A scale of colours through stops: t in [0, 1] -> "rgb(...)". */
function colourScale(stops) {
  const colours = stops.map(channels);
  return (t) => {
    const place = Math.min(Math.max(t, 0), 1) * (colours.length - 1);
    const index = Math.min(Math.floor(place), colours.length - 2);
    const mixed = colours[index].map((from, channel) =>
      Math.round(from + (place - index) * (colours[index + 1][channel] - from)),
    );
    return `rgb(${mixed.join(" ")})`;
  };
}

const SEQUENTIAL = {
  light: colourScale(["#ffffff", "#d3dfe8", "#8fa9bd", "#4b6b85", "#16324a"]),
  dark: colourScale(["#14171a", "#2b3d4c", "#4d7391", "#8cb4d2", "#e6f3fc"]),
};
const DIVERGING = {
  light: colourScale(["#9c2f14", "#e0916f", "#ffffff", "#7fa6cf", "#1d4f91"]),
  dark: colourScale(["#ffa07a", "#a3522f", "#1b1f23", "#31639e", "#8fc1ff"]),
};
