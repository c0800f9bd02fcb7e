// What is looked at, and how experts, layers and classes are called and coloured in every view.

const state = {
  tab: null,
  image: 0,
  layer: 0,
  expert: 0,
  mode: "first",
  opacity: true,
  digits: true,
  filter: "all",
  spot: null,
  pinned: false,
  flow: "sankey",
  property: null,
  theme: "auto",
};

const darkPreferred = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (state.theme === "auto" ? darkPreferred.matches : state.theme === "dark");
const sequential = (t) => SEQUENTIAL[isDark() ? "dark" : "light"](t);
const diverging = (t) => DIVERGING[isDark() ? "dark" : "light"]((t + 1) / 2);

/** A colour of the style sheet as a canvas takes it. */
function paint(variable) {
  const probe = document.getElementById("announcer");
  probe.style.color = `var(${variable})`;
  return getComputedStyle(probe).color;
}

const expertColour = (expert) => PALETTE[expert % PALETTE.length];

const inkOn = (hex) => inkOver(`rgb(${channels(hex).join(" ")})`);

/** Black or white, whichever contrasts more with a colour "rgb(r g b)" (WCAG 2). */
function inkOver(colour) {
  const [r, g, b] = colour
    .slice(4, -1)
    .split(" ")
    .map((value) => Number(value) / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > Math.sqrt(1.05 * 0.05) - 0.05 ? "#000000" : "#ffffff";
}

/** An expert's number on its colour. */
function chip(expert, attributes = {}, tag = "span") {
  const colour = expertColour(expert);
  return make(tag, { class: "chip", ...attributes, style: { background: colour, color: inkOn(colour) } }, `${expert}`);
}

/** Where images are routed as a whole, there is one decision per image, and none per patch. */
const isWhole = REPORT.layers.every((layer) => layer.route === "image");
const [UNIT, UNITS] = isWhole ? ["image", "images"] : ["patch", "patches"];

/** Without labels, what needs them is left out: accuracy, classes, causes. */
const isLabelled = REPORT.accuracy !== null;

/** What accuracy is: of several classes per image, all of an image's must be right. */
const ACCURACY = REPORT.multi_label ? "Accuracy (every class of an image right)" : "Top-1 accuracy";

const className = (index) =>
  index === null || index === undefined ? "unknown" : (REPORT.classes[index] ?? `class ${index}`);
const layerNames = REPORT.layers.map((layer) => layer.name);

/** Names without what all of them begin and end with: "blocks.1.mlp" -> "1". */
const shortNames = (() => {
  const parts = layerNames.map((name) => name.split("."));
  if (parts.length < 2) return layerNames;
  const shared = (from) => {
    let length = 0;
    const at = (each) => each[from < 0 ? each.length - 1 - length : length];
    while (parts.every((each) => each.length > length + 1 && at(each) === at(parts[0]))) length += 1;
    return length;
  };
  const [start, end] = [shared(1), shared(-1)];
  return parts.map((each) => (each.length > start + end ? each.slice(start, each.length - end) : each).join("."));
})();

const layerAxis = shortNames === layerNames ? "layer" : `layer (${layerNames[0].replace(shortNames[0], "N")})`;
/** Too many layers to draw each: an overview as a matrix, and one layer in full. */
const manyLayers = REPORT.layers.length > 12;

/** What a token before the patches is, by the first layer that has so many. */
const prefixName = (index) => REPORT.layers.find((layer) => layer.prefix > index).prefix_names[index];

/** On how many images a figure rests: all, those of the "probe_images", or those of the "cause_images". */
const analysed = (which = "num_images") =>
  `n = ${plural(REPORT.provenance[which] ?? REPORT.provenance.num_images, "image")}`.replaceAll(" ", "\u00a0");

/** Why there is no table by class. */
const withoutClasses = (table) =>
  REPORT.left_out.includes(table)
    ? "Left out: with so many classes and experts it does not fit into this page. The data files beside it hold the numbers."
    : "Not measured.";

/** How many patches of all images a layer routed. */
const patchesOf = (layer) => REPORT.provenance.num_images * layer.grid[0] * layer.grid[1];

/** The choice of a layer, the same in every view. */
function layerPicker(onPick) {
  const options = layerNames.map((name, index) => ({
    value: index,
    name: layerNames.length > 8 ? name : shortNames[index],
  }));
  const pick = (index) => {
    state.layer = index;
    state.expert = Math.min(state.expert, REPORT.layers[index].num_experts - 1);
    onPick();
  };
  return make(
    "div",
    { class: "bar" },
    layerNames.length > 8
      ? picker("Layer", options, state.layer, pick)
      : choice(`L${layerAxis.slice(1)}`, options, state.layer, pick),
  );
}

/** Columns of at least so many pixels that fit into the view: {count, width}. */
function columnsOf(least, gap = 24, most = Infinity) {
  const width = viewWidth();
  const number = Math.max(1, Math.min(most, Math.floor((width + gap) / (least + gap))));
  return { count: number, width: Math.floor((width - gap * (number - 1)) / number) };
}

const viewWidth = () => document.getElementById("views").clientWidth;

/** Things side by side in equal columns of at least `least` pixels; build(item, width) makes each. */
function sideBySide(items, least, build, widest = 620) {
  const rows = Math.ceil(items.length / columnsOf(least).count); // as few as possible, then of equal length
  const { count: columns, width } = columnsOf(least, 24, Math.max(1, Math.ceil(items.length / rows)));
  const taken = Math.min(width, widest);
  return make(
    "div",
    { class: "grid", style: { gridTemplateColumns: `repeat(${columns}, ${taken}px)` } },
    items.map((item, index) => build(item, taken, index)),
  );
}
