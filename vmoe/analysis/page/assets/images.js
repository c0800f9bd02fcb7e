// The view of images: pick one, see its layers side by side, ask a patch.

const THUMBNAIL = 48;

const isRight = (image) => SAMPLE.label[image] !== null && SAMPLE.label[image] === SAMPLE.predicted[image];

/** The images of the list: those whose routing the page holds and that pass the filter. */
function listedImages() {
  const pass = { all: () => true, right: isRight, wrong: (image) => SAMPLE.label[image] !== null && !isRight(image) }[state.filter]
    ?? ((image) => `class ${SAMPLE.label[image]}` === state.filter);
  return range(SAMPLE.mapped).filter(pass);
}

function imageFilter(onPick) {
  const classes = [...new Set(SAMPLE.label.slice(0, SAMPLE.mapped))].filter((label) => label !== null).sort((a, b) => a - b);
  const options = [{ value: "all", name: "all" }, { value: "right", name: "classified right" }, { value: "wrong", name: "classified wrong" },
    ...classes.map((label) => ({ value: `class ${label}`, name: className(label) }))];
  return picker("Images", options, state.filter, (value) => { state.filter = value; onPick(); });
}

/** The list of images: a listbox that the arrow keys walk through. */
function imageStrip(onPick) {
  const shown = listedImages();
  const strip = make("div", { class: "strip", role: "listbox", "aria-label": "Images" });
  const options = shown.map((image) => {
    const option = thumbnail(image, THUMBNAIL, null, { role: "option", tabindex: image === state.image ? "0" : "-1",
      "aria-selected": `${image === state.image}`, class: SAMPLE.label[image] === null || isRight(image) ? "" : "wrong",
      "aria-label": verdictText(image) });
    option.addEventListener("click", () => pick(image));
    tipOn(option, () => [imageName(image), verdictText(image)]);
    return option;
  });
  if (options.length && !shown.includes(state.image)) options[0].tabIndex = 0;
  const pick = (image) => {
    state.image = image;
    options.forEach((option, index) => {
      option.setAttribute("aria-selected", `${shown[index] === image}`);
      option.tabIndex = shown[index] === image ? 0 : -1;
    });
    onPick();
  };
  strip.addEventListener("keydown", (event) => {
    const move = arrow(event.key);
    const at = options.indexOf(document.activeElement);
    if (!move || at < 0) return;
    event.preventDefault();
    const perRow = Math.max(1, Math.floor((strip.clientWidth - 8) / (THUMBNAIL + 4)));
    const next = Math.min(Math.max(at + move.columns + move.rows * perRow, 0), options.length - 1);
    options[next].focus();
    pick(shown[next]);
  });
  strip.append(...options);
  return shown.length ? strip : make("p", { class: "note" }, "No image of the sample passes this filter.");
}

/** An image by its place in the data set. */
const imageName = (image) => `Image ${SAMPLE.number[image]}`;

const verdictText = (image) => `true: ${className(SAMPLE.label[image])}; predicted: ${className(SAMPLE.predicted[image])} (${percent(SAMPLE.confidence[image], 0)})`;

function verdict() {
  const { image } = state;
  const known = SAMPLE.label[image] !== null;
  return make("p", { class: "verdict" }, `${imageName(image)} · true class `, make("b", {}, className(SAMPLE.label[image])), " · predicted ",
    make("b", {}, className(SAMPLE.predicted[image])), ` with ${percent(SAMPLE.confidence[image], 0)} `,
    known && make("span", { class: isRight(image) ? "good" : "bad" }, isRight(image) ? "✓ right" : "✗ wrong"));
}

/** What there is to see, by the kinds of layers. */
function modes() {
  const any = (test) => REPORT.layers.some(test);
  return [
    { value: "first", name: any((layer) => layer.kind === "slots") ? "Largest weight" : "First choice" },
    { value: "second", name: "Second choice", disabled: SAMPLE.tops.every((top) => top < 2) },
    { value: "one", name: "One expert" },
    { value: "dispatch", name: "Dispatch to one", disabled: SAMPLE.layers.every((layer) => !layer.dispatch) },
    { value: "entropy", name: "Entropy" }, { value: "dropped", name: "Dropped" },
  ].filter((mode) => mode.value !== "dispatch" || !mode.disabled);
}

/** How to read the maps, in a sentence. */
function modeLegend() {
  const strength = state.opacity ? "the more opaque, the larger its gate (fully: the layer's largest gate in the sample)" : "opaque wherever the gate is above zero";
  const second = REPORT.layers.every((layer) => layer.top_k === 1) ? " With K = 1 the second gate is only the runner-up: it computes nothing." : "";
  return {
    first: `Each patch has the colour and number of the expert with its first choice; ${strength}.`,
    second: `Each patch has the colour of its second choice; ${strength}.${second}`,
    one: `The gate of expert ${state.expert} on each patch; ${strength}; outlined where it was chosen.`,
    dispatch: `How much of each patch goes into the slots of expert ${state.expert} (dispatch weight); ${strength}.`,
    entropy: "Entropy of a patch's gates, from 0 (one expert has all) to ln E (all experts equal).",
    dropped: "Patches marked with a cross lost choices because the expert was full (or, where experts choose, because none took them): the darker, the larger the share lost.",
  }[state.mode];
}

function toolbar(onChange) {
  const most = largest(REPORT.layers.map((layer) => layer.num_experts));
  const expertChoice = picker("Expert", range(most).map((expert) => ({ value: expert, name: `${expert}` })), Math.min(state.expert, most - 1),
    (expert) => { state.expert = expert; onChange(); });
  const colours = !["entropy", "dropped"].includes(state.mode);
  return [make("div", { class: "bar" },
    choice("Show", modes(), state.mode, (mode) => { state.mode = mode; onChange(); document.querySelector(`.choice input[value="${mode}"]`)?.focus(); }),
    ["one", "dispatch"].includes(state.mode) && expertChoice,
    colours && checkbox("opacity = gate", state.opacity, (on) => { state.opacity = on; onChange(); }),
    colours && checkbox("numbers", state.digits, (on) => { state.digits = on; onChange(); })),
  make("p", { class: "legend", id: "mode-legend" }, modeLegend()),
  state.mode === "entropy" && colourBar(sequential, 0, 1, (t) => (t ? "ln E nats" : "0"))];
}

/** The maps of all layers; each reports the spot that is pointed at. */
class Panels {
  constructor(onSpot) {
    this.onSpot = onSpot;
    this.node = make("div", { class: "panels" });
    this.draw();
  }

  draw() {
    const view = viewWidth();
    const room = view > 860 ? view - 350 - 28 : view;
    const least = room > 1300 ? 260 : room > 500 ? 190 : 150;
    const fitting = Math.max(1, Math.floor((room + 16) / (least + 16)));
    const columns = Math.ceil((REPORT.layers.length + 1) / Math.ceil((REPORT.layers.length + 1) / fitting));
    this.width = Math.min(440, Math.floor((room - 16 * (columns - 1)) / columns));
    this.node.style.gridTemplateColumns = `repeat(${columns}, ${this.width}px)`;
    this.node.replaceChildren(this.picture(), ...REPORT.layers.map((_, layer) => this.panel(layer)));
    this.mark();
  }

  picture() {
    const height = Math.round(this.width * SAMPLE.height / SAMPLE.width);
    const { node, context } = canvas(this.width, height);
    drawPicture(context, state.image, { x: 0, y: 0, width: this.width, height });
    const note = SAMPLE.height === SAMPLE.size[0] ? `${SAMPLE.size[1]} × ${SAMPLE.size[0]} pixels, as the model sees it`
      : `${SAMPLE.size[1]} × ${SAMPLE.size[0]} pixels, here ${SAMPLE.width} × ${SAMPLE.height}`;
    return make("figure", { class: "panel" }, make("h4", {}, "Picture"), make("small", {}, note),
      REPORT.layers.length ? this.reachable(node, finestLayer(), "the picture") : make("div", { class: "map" }, node));
  }

  panel(index) {
    const layer = REPORT.layers[index];
    const routed = maps(index);
    const takes = layer.kind === "slots" ? layer.router : `K = ${layer.top_k}`;
    return make("figure", { class: "panel", "data-layer": index }, make("h4", { title: layer.name }, layer.name),
      make("small", {}, this.note(index) ?? `E = ${layer.num_experts}, ${takes}, ${layer.grid.join(" × ")} patches`),
      this.reachable(drawMap(index, state.image, this.width), index, layer.name),
      layer.prefix > 0 && make("div", { class: "prefix" }, range(layer.prefix).map((token) => this.prefixToken(index, routed, token))));
  }

  /** What a mode says of a layer in place of its sizes. */
  note(index) {
    const layer = REPORT.layers[index];
    const routed = maps(index);
    if (["one", "dispatch"].includes(state.mode)) {
      if (state.expert >= layer.num_experts) return `has no expert ${state.expert}`;
      return routed.weights.top < layer.num_experts ? `of the ${routed.weights.top} largest gates of a patch` : null;
    }
    if (state.mode !== "dropped") return null;
    const shares = range(routed.rows * routed.columns).map((patch) => routed.droppedShare(state.image, routed.prefix + patch));
    const lost = sum(shares) / shares.length;
    return lost ? `${percent(lost)} of this image's choices dropped` : "nothing dropped in this image";
  }

  prefixToken(index, routed, token) {
    const cell = seen(index, state.image, token);
    const lines = [prefixName(token), ...tokenLines(index, state.image, token)];
    const button = cell?.expert !== null && cell?.expert !== undefined ? chip(cell.expert, { type: "button", "aria-label": lines.join(", ") }, "button")
      : make("button", { class: "chip", type: "button", "aria-label": lines.join(", ") }, cell ? " " : "–");
    if (cell && (cell.expert === null || cell.expert === undefined)) button.style.background = cell.colour;
    button.addEventListener("focus", () => this.onSpot({ x: 0, y: 0, prefix: token }));
    button.addEventListener("pointerenter", () => state.pinned || this.onSpot({ x: 0, y: 0, prefix: token }));
    tipOn(button, () => lines);
    return make("span", {}, button, ` ${prefixName(token)}`);
  }

  /** Makes a map answer to pointer and arrow keys. */
  reachable(node, index, name) {
    const [rows, columns] = REPORT.layers[index].grid;
    const map = make("div", { class: "map", tabindex: "0", role: "application", "aria-roledescription": "patch map", "data-rows": rows, "data-columns": columns,
      "aria-label": `Patches of ${name}, ${rows} rows by ${columns} columns. Arrow keys move from patch to patch, Enter pins one.` }, node, make("div", { class: "spot", hidden: true }));
    const at = (event) => {
      const box = map.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.x) / box.width * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.y) / box.height * rows)));
      return spotOf(index, row * columns + column);
    };
    map.addEventListener("pointermove", (event) => {
      const spot = at(event);
      showTip(tokenLines(index, state.image, maps(index).token(spot)), event.clientX, event.clientY);
      if (!state.pinned) this.onSpot(spot);
    });
    map.addEventListener("pointerleave", hideTip);
    map.addEventListener("click", (event) => { state.pinned = !state.pinned; this.onSpot(at(event)); });
    map.addEventListener("focus", () => { if (map.matches(":focus-visible") && !state.spot) this.onSpot(spotOf(index, 0)); });
    map.addEventListener("keydown", (event) => this.key(event, index));
    return map;
  }

  key(event, index) {
    const [rows, columns] = REPORT.layers[index].grid;
    const move = arrow(event.key);
    if (event.key === "Escape") { state.pinned = false; this.onSpot(state.spot); return; }
    if (event.key === "Enter") { state.pinned = !state.pinned; this.onSpot(state.spot); return; }
    if (!move) return;
    event.preventDefault();
    const from = state.spot?.prefix === null ? state.spot : spotOf(index, 0);
    const row = Math.min(rows - 1, Math.max(0, Math.floor(from.y * rows) + move.rows));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(from.x * columns) + move.columns));
    const spot = spotOf(index, row * columns + column);
    this.onSpot(spot);
    announce([placeName(spot), ...tokenLines(index, state.image, maps(index).token(spot))].join(". "));
  }

  /** Frames the spot in every map. */
  mark() {
    for (const map of this.node.querySelectorAll(".map[data-rows]")) {
      const box = map.querySelector(".spot");
      box.hidden = !state.spot || state.spot.prefix !== null;
      if (box.hidden) continue;
      const [rows, columns] = [Number(map.dataset.rows), Number(map.dataset.columns)];
      Object.assign(box.style, { left: `${100 * Math.floor(state.spot.x * columns) / columns}%`, top: `${100 * Math.floor(state.spot.y * rows) / rows}%`,
        width: `${100 / columns}%`, height: `${100 / rows}%` });
    }
  }
}

/** Opens the view of images at a patch of an image. */
function showPatch(image, spot) {
  Object.assign(state, { image, filter: "all", spot, pinned: true });
  openTab("images", true);
}

function imagesView() {
  if (!SAMPLE.mapped) return [missing("Images", SAMPLE.count ? "The routing of no image fits into this page." : "No images were sampled.")];
  state.image = Math.min(state.image, SAMPLE.mapped - 1);
  state.spot ??= REPORT.layers.length ? spotOf(finestLayer(), Math.floor((REPORT.layers[finestLayer()].grid[0] + 1) * REPORT.layers[finestLayer()].grid[1] / 2)) : null;
  let waiting = null;
  const side = live(() => (REPORT.layers.length ? inspector() : make("p", { class: "note" }, "A dense model: no layer has experts.")), { class: "inspector", role: "region", "aria-label": "The patch", tabindex: "0" });
  const panels = new Panels((spot) => {
    state.spot = spot;
    panels.mark();
    clearTimeout(waiting);
    waiting = setTimeout(side.refresh, 30);
  });
  const head = live(verdict);
  const tools = live(() => toolbar(() => { tools.refresh(); panels.draw(); }));
  const change = () => { head.refresh(); panels.draw(); side.refresh(); };
  const strip = live(() => imageStrip(change));
  return [
    make("h2", {}, "Which expert takes which patch"),
    make("div", { class: "bar" }, imageFilter(() => {
      const shown = listedImages();
      if (shown.length && !shown.includes(state.image)) { [state.image] = shown; change(); }
      strip.refresh();
    }), make("span", { class: "legend" }, `${plural(SAMPLE.mapped, "sampled image")} of ${count(REPORT.provenance.num_images)} analysed; dotted frame: classified wrong.`)),
    strip.node, head.node, REPORT.layers.length > 0 && tools.node, make("div", { class: "workbench" }, panels.node, side.node),
  ];
}
