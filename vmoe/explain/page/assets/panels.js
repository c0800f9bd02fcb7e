// The maps of one image, a panel a layer: they answer to the pointer and to the arrow keys.

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
    const least = room > 1300 ? 260 : room <= 500 ? 150 : REPORT.layers.length < 6 ? 255 : 190;
    const fitting = Math.max(1, Math.floor((room + 16) / (least + 16)));
    const columns = Math.ceil((REPORT.layers.length + 1) / Math.ceil((REPORT.layers.length + 1) / fitting));
    this.width = Math.min(440, Math.floor((room - 16 * (columns - 1)) / columns));
    this.node.style.gridTemplateColumns = `repeat(${columns}, ${this.width}px)`;
    this.node.replaceChildren(this.picture(), ...REPORT.layers.map((_, layer) => this.panel(layer)));
    this.mark();
  }

  picture() {
    const height = Math.round((this.width * SAMPLE.height) / SAMPLE.width);
    const { node, context } = canvas(this.width, height);
    drawPicture(context, state.image, { x: 0, y: 0, width: this.width, height });
    const note =
      SAMPLE.height === SAMPLE.size[0]
        ? `${SAMPLE.size[1]} × ${SAMPLE.size[0]} pixels`
        : `${SAMPLE.size[1]} × ${SAMPLE.size[0]} pixels, here ${SAMPLE.width} × ${SAMPLE.height}`;
    return make(
      "figure",
      { class: "panel" },
      make("h4", {}, "Picture"),
      make("small", {}, note),
      this.reachable(node, finestLayer(), "the picture"),
    );
  }

  panel(index) {
    const layer = REPORT.layers[index];
    const routed = maps(index);
    const takes = layer.kind === "slots" ? layer.router : `K = ${layer.top_k}`;
    return make(
      "figure",
      { class: "panel", "data-layer": index },
      make("h4", { title: layer.name }, layer.name),
      make("small", {}, this.note(index) ?? `E = ${layer.num_experts}, ${takes}, ${isWhole ? "per image" : `${layer.grid.join(" × ")} patches`}`),
      this.reachable(drawMap(index, state.image, this.width), index, layer.name),
      layer.prefix > 0 &&
        make(
          "div",
          { class: "prefix" },
          range(layer.prefix).map((token) => this.prefixToken(index, routed, token)),
        ),
    );
  }

  /** What a mode says of a layer in place of its sizes. */
  note(index) {
    const layer = REPORT.layers[index];
    const routed = maps(index);
    if (["one", "dispatch"].includes(state.mode)) {
      if (state.expert >= layer.num_experts) return `has no expert ${state.expert}`;
      return routed.weights.top < layer.num_experts ? `of the ${routed.weights.top} largest gates` : null;
    }
    if (state.mode !== "dropped") return null;
    const shares = range(routed.rows * routed.columns).map((patch) =>
      routed.droppedShare(state.image, routed.prefix + patch),
    );
    const lost = sum(shares) / shares.length;
    return lost ? `${percent(lost)} of this image's choices dropped` : "nothing dropped in this image";
  }

  prefixToken(index, routed, token) {
    const cell = seen(index, state.image, token);
    const lines = [prefixName(token), ...tokenLines(index, state.image, token)];
    const button =
      cell?.expert !== null && cell?.expert !== undefined
        ? chip(cell.expert, { type: "button", "aria-label": lines.join(", ") }, "button")
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
    const map = make(
      "div",
      {
        class: "map",
        tabindex: "0",
        role: "application",
        "aria-roledescription": `${UNIT} map`,
        "data-rows": rows,
        "data-columns": columns,
        "aria-label": isWhole
          ? `The image in ${name}. Enter pins it.`
          : `Patches of ${name}, ${rows} rows by ${columns} columns. Arrow keys move from patch to patch, Enter pins one.`,
      },
      node,
      make("div", { class: "spot", hidden: true }),
    );
    const at = (event) => {
      const box = map.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.x) / box.width) * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.y) / box.height) * rows)));
      return spotOf(index, row * columns + column);
    };
    map.addEventListener("pointermove", (event) => {
      const spot = at(event);
      showTip(tokenLines(index, state.image, maps(index).token(spot)), event.clientX, event.clientY);
      if (!state.pinned) this.onSpot(spot);
    });
    map.addEventListener("pointerleave", hideTip);
    map.addEventListener("click", (event) => {
      state.pinned = !state.pinned;
      this.onSpot(at(event));
    });
    map.addEventListener("focus", () => {
      if (map.matches(":focus-visible") && !state.spot) this.onSpot(spotOf(index, 0));
    });
    map.addEventListener("keydown", (event) => this.key(event, index));
    return map;
  }

  key(event, index) {
    const [rows, columns] = REPORT.layers[index].grid;
    const move = arrow(event.key);
    if (event.key === "Escape") {
      state.pinned = false;
      this.onSpot(state.spot);
      return;
    }
    if (event.key === "Enter") {
      state.pinned = !state.pinned;
      this.onSpot(state.spot);
      return;
    }
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
      box.hidden = !state.spot || state.spot.prefix !== null || isWhole;
      if (box.hidden) continue;
      const [rows, columns] = [Number(map.dataset.rows), Number(map.dataset.columns)];
      Object.assign(box.style, {
        left: `${(100 * Math.floor(state.spot.x * columns)) / columns}%`,
        top: `${(100 * Math.floor(state.spot.y * rows)) / rows}%`,
        width: `${100 / columns}%`,
        height: `${100 / rows}%`,
      });
    }
  }
}
