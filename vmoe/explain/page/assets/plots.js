// Plots of a few numbers as SVG. A plot is one stop of the Tab key; the arrow keys walk along its marks.

/** The range of values that all have to be seen, and `from` with them; not narrower than `least`. */
function span(values, from = 0, least = 0.01) {
  const finite = values.filter(isNumber);
  const low = Math.min(from, ...finite);
  return { low, high: Math.max(low + least, ...finite) };
}

/** A range as an axis with round ticks, which enclose it apart from a small overhang. Labels give `scale` times the value. */
function axis({ low, high, scale = 1 }, wanted) {
  const inside = niceTicks(low, high, wanted);
  const step = inside.length > 1 ? inside[1] - inside[0] : high - low;
  const first = Math.floor(low / step + 0.3);
  const last = Math.ceil(high / step - 0.3);
  const ticks = range(last - first + 1).map((index) => (first + index) * step);
  const text = tickText(ticks.map((tick) => scale * tick));
  return {
    low: Math.min(low, ticks[0]),
    high: Math.max(high, ticks.at(-1)),
    ticks,
    text: (value) => text(scale * value),
  };
}

/**
 * The frame of a plot.
 *
 * x: {labels} for places beside each other, or {low, high, ticks, text} for numbers. y: {low, high, scale}.
 * Gives {svg, across(x), up(y), step, marks}; `finish` makes it reachable.
 */
function frame({ width, height, x, y, xLabel = "", yLabel = "" }) {
  const { low, high, ticks, text } = axis(y, 4);
  const left = 12 + 7 * largest(ticks.map((tick) => text(tick).length));
  const box = { left, right: width - 8, top: yLabel ? 24 : 10, bottom: height - (xLabel ? 40 : 24) };
  const up = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  const step = x.labels ? (box.right - box.left) / x.labels.length : null;
  const across = x.labels
    ? (index) => box.left + (index + 0.5) * step
    : (value) => box.left + 8 + ((value - x.low) / (x.high - x.low || 1)) * (box.right - box.left - 16);
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const tick of ticks) {
    svg.append(
      shape("line", { class: "rule", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }),
      shape("text", { class: "faint", x: box.left - 6, y: up(tick) + 4, "text-anchor": "end" }, text(tick)),
    );
  }
  if (yLabel) svg.append(shape("text", { class: "faint", x: 0, y: 12 }, yLabel));
  if (xLabel)
    svg.append(
      shape("text", { class: "faint", x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    );
  const labels = x.labels ?? x.ticks.map(x.text ?? tickText(x.ticks));
  const half = (label) => 3.5 * `${label}`.length + 4;
  const places = labels.map((_, index) => across(x.labels ? index : x.ticks[index]));
  const worded = Number.isNaN(Number(labels.at(-1))); // such as "random": always shown
  const every = Math.max(
    1,
    Math.ceil((2 * largest(labels.slice(0, worded ? -1 : undefined).map(half))) / (places[1] - places[0] || 1)),
  );
  const free = worded ? places.at(-1) - half(labels.at(-1)) : Infinity;
  labels.forEach((label, index) => {
    const isLast = worded && index === labels.length - 1;
    if (!isLast && (index % every || places[index] + half(label) > free)) return;
    svg.append(
      shape("text", { class: "faint", x: places[index], y: box.bottom + 19, "text-anchor": "middle" }, `${label}`),
    );
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
  const leave = () => {
    marks[at]?.node.classList.remove("current");
    hideTip();
  };
  svg.addEventListener("keydown", (event) => {
    const move = arrow(event.key);
    if (event.key === "Escape") leave();
    if (!move) return;
    event.preventDefault();
    leave();
    at =
      (at + move.rows + move.columns + (at < 0 && move.rows + move.columns < 0 ? 1 : 0) + marks.length) % marks.length;
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
  mark(
    plot,
    shape("rect", {
      class: "mark",
      x: plot.across(x) - width / 2,
      y: top,
      width,
      height: Math.max(0.5, bottom - top),
      fill: colour,
    }),
    lines,
  );
}

/** A line across the plot at a height that means something. */
function level(plot, value, text) {
  plot.svg.append(
    shape("line", { class: "axis", x1: plot.box.left, x2: plot.box.right, y1: plot.up(value), y2: plot.up(value) }),
  );
  if (text) {
    plot.svg.append(
      shape("text", { class: "faint", x: plot.box.right, y: plot.up(value) - 4, "text-anchor": "end" }, text),
    );
  }
}

/** The line of a confidence interval. */
function whisker(plot, x, point, into = plot.svg) {
  if (!isNumber(point.low) || !isNumber(point.high)) return;
  into.append(
    shape("line", {
      x1: x,
      x2: x,
      y1: plot.up(point.low),
      y2: plot.up(point.high),
      stroke: "var(--ink)",
      "stroke-width": 1.6,
    }),
  );
}

/** The mark of a series: series differ by form and shade, since colours are the experts'. */
const FORMS = [
  { form: "circle", fill: "var(--ink)", dash: "" },
  { form: "square", fill: "var(--paper)", dash: "7 4" },
  { form: "triangle", fill: "var(--muted)", dash: "2 3" },
  { form: "circle", fill: "var(--paper)", dash: "9 3 2 3" },
  { form: "square", fill: "var(--muted)", dash: "4 2" },
  { form: "triangle", fill: "var(--paper)", dash: "1 2" },
];

function symbol(x, y, series, size = 5) {
  const { form, fill } = FORMS[series % FORMS.length];
  const look = { fill, stroke: "var(--ink)", "stroke-width": 1.6 };
  if (form === "circle") return shape("circle", { cx: x, cy: y, r: size, ...look });
  if (form === "square") return shape("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...look });
  return shape("path", {
    d: `M${x} ${y - size - 1}L${x + size + 1} ${y + size}L${x - size - 1} ${y + size}Z`,
    ...look,
  });
}

/** A point with its interval; pale where it is no more than chance. */
function dot(plot, x, point, lines, series = 0) {
  if (!isNumber(point.value)) return;
  const node = shape("g", { opacity: point.beats_null === false ? "0.35" : null });
  whisker(plot, x, point, node);
  node.append(symbol(x, plot.up(point.value), series, plot.step ? Math.max(2.2, Math.min(5, plot.step / 3)) : 5));
  mark(plot, node, lines);
}

/** A line through points [[x, y], ...] in the units of the plot; breaks where y is missing. */
function line(plot, values, series = 0, colour = "var(--ink)") {
  let path = "";
  let pen = "M";
  for (const [x, y] of values) {
    if (isNumber(y)) {
      path += `${pen}${x} ${plot.up(y)}`;
      pen = "L";
    } else pen = "M";
  }
  plot.svg.append(
    shape("path", {
      d: path,
      fill: "none",
      stroke: colour,
      "stroke-width": 1.6,
      "stroke-dasharray": FORMS[series % FORMS.length].dash,
    }),
  );
}

/** What the forms stand for. */
function keys(names) {
  return make(
    "div",
    { class: "keys" },
    names.map((name, index) =>
      make(
        "span",
        {},
        shape(
          "svg",
          { width: 34, height: 14, "aria-hidden": "true" },
          shape("line", {
            x1: 0,
            x2: 34,
            y1: 7,
            y2: 7,
            stroke: "var(--ink)",
            "stroke-width": 1.4,
            "stroke-dasharray": FORMS[index % FORMS.length].dash,
          }),
          symbol(17, 7, index, 4),
        ),
        name,
      ),
    ),
  );
}

/** Series by layer: points with their intervals, joined. Series: [{name, points: [{value, low, high, chance} or null]}]. */
function byLayer(
  series,
  { width, height = 190, yLabel, format = number, from = 0, upTo = null, least = 0.01, scale = 1, mean = "" },
) {
  const all = series.flatMap((each) =>
    each.points.filter(Boolean).flatMap((point) => [point.value, point.low, point.high, point.chance]),
  );
  const y = { ...span(upTo === null ? all : [...all, upTo], from, least), scale };
  const plot = frame({ width, height, x: { labels: shortNames }, y, xLabel: layerAxis, yLabel });
  const shift = (index) =>
    series.length - 1 ? (index / (series.length - 1) - 0.5) * Math.min(18, plot.step * 0.4) : 0;
  series.forEach((each, index) => {
    if (series.length < 5)
      line(
        plot,
        each.points.map((point, layer) => [plot.across(layer) + shift(index), point?.value]),
        index,
      );
  });
  layerNames.forEach((name, layer) =>
    series.forEach((each, index) => {
      const point = each.points[layer];
      if (!point) return;
      const x = plot.across(layer) + shift(index);
      const lines = [name, `${each.name}: ${withInterval(point, format)}`];
      if (isNumber(point.chance)) {
        plot.svg.append(
          shape("line", {
            class: "axis",
            x1: x - Math.min(9, plot.step / 3),
            x2: x + Math.min(9, plot.step / 3),
            y1: plot.up(point.chance),
            y2: plot.up(point.chance),
          }),
        );
        lines.push(`chance: ${format(point.chance)}`);
      }
      if ("beats_null" in point) lines.push(point.beats_null ? "beats its null" : "does not beat its null");
      dot(plot, x, point, lines, index);
    }),
  );
  return finish(plot, mean || yLabel);
}
