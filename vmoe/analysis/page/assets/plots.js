// Plots of a few numbers as SVG. A plot is one stop of the Tab key; the arrow keys walk along its marks.

/** A number line for values that all have to be seen: from `from` (or lower) to a little above the largest. */
function span(values, from = 0, least = 0.01) {
  const finite = values.filter(isNumber);
  const low = Math.min(from, ...finite);
  const high = Math.max(from, ...finite);
  const room = Math.max(high - low, least);
  return { low: low < from ? low - 0.06 * room : from, high: Math.max(low + least, high + 0.06 * room) };
}

/**
 * The frame of a plot.
 *
 * x: {labels} for places beside each other, or {low, high, ticks, text} for numbers. y: {low, high, text}.
 * Gives {svg, across(x), up(y), step, marks}; `finish` makes it reachable.
 */
function frame({ width, height, x, y, xLabel = "", yLabel = "" }) {
  const yTicks = y.ticks ?? niceTicks(y.low, y.high, height < 150 ? 3 : 5);
  const text = y.text ?? tickText(yTicks);
  const left = 12 + 7 * largest(yTicks.map((tick) => text(tick).length));
  const box = { left, right: width - 8, top: yLabel ? 24 : 10, bottom: height - (xLabel ? 40 : 24) };
  const up = (value) => box.bottom - (value - y.low) / (y.high - y.low) * (box.bottom - box.top);
  const step = x.labels ? (box.right - box.left) / x.labels.length : null;
  const across = x.labels ? (index) => box.left + (index + 0.5) * step
    : (value) => box.left + 8 + (value - x.low) / ((x.high - x.low) || 1) * (box.right - box.left - 16);
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const tick of yTicks) {
    svg.append(shape("line", { class: "rule", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }),
      shape("text", { class: "faint", x: box.left - 6, y: up(tick) + 4, "text-anchor": "end" }, text(tick)));
  }
  if (yLabel) svg.append(shape("text", { class: "faint", x: 0, y: 12 }, yLabel));
  if (xLabel) svg.append(shape("text", { class: "faint", x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
  const labels = x.labels ?? x.ticks.map(x.text ?? tickText(x.ticks));
  const widest = largest(labels.map((label) => `${label}`.length)) * 7 + 8;
  const every = Math.max(1, Math.ceil(widest / (x.labels ? step : (box.right - box.left) / labels.length)));
  labels.forEach((label, index) => {
    if (index % every) return;
    const place = across(x.labels ? index : x.ticks[index]);
    svg.append(shape("text", { class: "faint", x: place, y: box.bottom + 16, "text-anchor": "middle" }, `${label}`));
  });
  return { svg, across, up, step, box, marks: [] };
}

/** Adds a mark: an element that says `lines` when it is pointed at or reached. */
function mark(plot, node, lines) {
  plot.svg.append(node);
  plot.marks.push({ node, lines });
  tipOn(node, () => lines);
}

/** The plot as it goes into the page; `label` says in words what it shows. */
function finish(plot, label) {
  const { svg, marks } = plot;
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${label}${marks.length ? ". Arrow keys walk along the marks." : ""}`);
  if (!marks.length) return svg;
  svg.setAttribute("tabindex", "0");
  let at = -1;
  const leave = () => { marks[at]?.node.classList.remove("current"); hideTip(); };
  svg.addEventListener("keydown", (event) => {
    const move = arrow(event.key);
    if (event.key === "Escape") leave();
    if (!move) return;
    event.preventDefault();
    leave();
    at = (at + move.rows + move.columns + (at < 0 && move.rows + move.columns < 0 ? 1 : 0) + marks.length) % marks.length;
    marks[at].node.classList.add("current");
    tipAt(marks[at].node, marks[at].lines);
  });
  svg.addEventListener("blur", leave);
  return svg;
}

/** A bar from `base` to a value. */
function bar(plot, x, value, base, colour, lines, part = 0.78) {
  const [top, bottom] = [plot.up(Math.max(value, base)), plot.up(Math.min(value, base))];
  const width = Math.max(1, Math.min(46, plot.step * part));
  mark(plot, shape("rect", {
    class: "mark", x: plot.across(x) - width / 2, y: top, width, height: Math.max(0.5, bottom - top), fill: colour,
  }), lines);
}

/** A line across the plot at a height that means something. */
function level(plot, value, text) {
  plot.svg.append(shape("line", { class: "axis", x1: plot.box.left, x2: plot.box.right, y1: plot.up(value), y2: plot.up(value) }));
  if (text) {
    plot.svg.append(shape("text", { class: "faint", x: plot.box.right, y: plot.up(value) - 4, "text-anchor": "end" }, text));
  }
}

/** The line of a confidence interval. */
function whisker(plot, x, point, colour = "var(--ink)") {
  if (!isNumber(point.low) || !isNumber(point.high)) return;
  plot.svg.append(shape("line", { x1: x, x2: x, y1: plot.up(point.low), y2: plot.up(point.high), stroke: colour, "stroke-width": 1.6 }));
}

/** The mark of a series: its form and shade tell series apart, colours are the experts'. */
const FORMS = [
  { form: "circle", fill: "var(--ink)", dash: "" }, { form: "square", fill: "var(--paper)", dash: "7 4" },
  { form: "triangle", fill: "var(--muted)", dash: "2 3" }, { form: "circle", fill: "var(--paper)", dash: "9 3 2 3" },
  { form: "square", fill: "var(--muted)", dash: "4 2" }, { form: "triangle", fill: "var(--paper)", dash: "1 2" },
];

function symbol(x, y, series, size = 5) {
  const { form, fill } = FORMS[series % FORMS.length];
  const look = { fill, stroke: "var(--ink)", "stroke-width": 1.6 };
  if (form === "circle") return shape("circle", { cx: x, cy: y, r: size, ...look });
  if (form === "square") return shape("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...look });
  return shape("path", { d: `M${x} ${y - size - 1}L${x + size + 1} ${y + size}L${x - size - 1} ${y + size}Z`, ...look });
}

/** A point with its interval. */
function dot(plot, x, point, lines, series = 0) {
  if (!isNumber(point.value)) return;
  whisker(plot, x, point);
  mark(plot, symbol(x, plot.up(point.value), series), lines);
}

/** A line through points [[x, y], ...] in the units of the plot; breaks where y is missing. */
function line(plot, values, series = 0, colour = "var(--ink)") {
  let path = "";
  let pen = "M";
  for (const [x, y] of values) {
    if (isNumber(y)) { path += `${pen}${x} ${plot.up(y)}`; pen = "L"; } else pen = "M";
  }
  plot.svg.append(shape("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": FORMS[series % FORMS.length].dash }));
}

/** What the forms stand for. */
function keys(names) {
  return make("div", { class: "keys" }, names.map((name, index) =>
    make("span", {}, shape("svg", { width: 34, height: 14, "aria-hidden": "true" }, shape("line", {
      x1: 0, x2: 34, y1: 7, y2: 7, stroke: "var(--ink)", "stroke-width": 1.4, "stroke-dasharray": FORMS[index % FORMS.length].dash,
    }), symbol(17, 7, index, 4)), name)));
}

/** Series by layer: points with their intervals, joined. Series: [{name, points: [{value, low, high} or null]}]. */
function byLayer(series, { width, height = 190, yLabel, format = number, from = 0, upTo = null, text = null, mean = "" }) {
  const all = series.flatMap((each) => each.points.filter(Boolean).flatMap((point) => [point.value, point.low, point.high]));
  const y = { ...span(upTo === null ? all : [...all, upTo], from), ...(text && { text }) };
  const plot = frame({ width, height, x: { labels: shortNames }, y, xLabel: layerAxis, yLabel });
  const shift = (index) => (series.length - 1 ? (index / (series.length - 1) - 0.5) * Math.min(18, plot.step * 0.4) : 0);
  series.forEach((each, index) => {
    if (series.length < 5) line(plot, each.points.map((point, layer) => [plot.across(layer) + shift(index), point?.value]), index);
  });
  layerNames.forEach((name, layer) => series.forEach((each, index) => {
    const point = each.points[layer];
    if (point) dot(plot, plot.across(layer) + shift(index), point, [name, `${each.name}: ${withInterval(point, format)}`], index);
  }));
  return finish(plot, mean || yLabel);
}
