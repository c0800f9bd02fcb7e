// Pictures and patches: tiles of the sprites, maps of experts over a picture, crops around a patch.

const sheets = [];

/** Decodes the sheets of pictures. */
function loadPictures() {
  return Promise.all(
    SAMPLE.sheets.map((source, index) => {
      sheets[index] = new Image();
      sheets[index].src = source;
      return sheets[index].decode();
    }),
  );
}

/** Draws a part of a sampled picture (x, y, width, height in [0, 1]) over a rectangle of a canvas. */
function drawPicture(context, image, to, part = { x: 0, y: 0, width: 1, height: 1 }) {
  const { columns, rows, width, height } = SAMPLE;
  const tile = image % (columns * rows);
  context.imageSmoothingEnabled = to.width < part.width * width * 2;
  context.imageSmoothingQuality = "high";
  context.drawImage(
    sheets[Math.floor(image / (columns * rows))],
    ((tile % columns) + part.x) * width,
    (Math.floor(tile / columns) + part.y) * height,
    part.width * width,
    part.height * height,
    to.x,
    to.y,
    to.width,
    to.height,
  );
}

/** A small square picture: of a whole image, or of the surroundings of a patch, which is framed. */
function thumbnail(image, side, patch = null, attributes = {}) {
  const { node, context } = canvas(side, side, attributes);
  const aspect = SAMPLE.width / SAMPLE.height;
  const to = { x: 0, y: 0, width: side, height: side };
  if (!patch) {
    const part =
      aspect > 1
        ? { x: (1 - 1 / aspect) / 2, y: 0, width: 1 / aspect, height: 1 }
        : { x: 0, y: (1 - aspect) / 2, width: 1, height: aspect };
    drawPicture(context, image, to, part);
    return node;
  }
  const { rows, columns, spot, colour } = patch;
  // A window of about five patches, square in pixels, shifted to stay inside the picture.
  const wanted = Math.min(1, 5 / Math.min(rows, columns));
  const part = { width: Math.min(1, wanted / Math.max(1, aspect)), height: Math.min(1, wanted * Math.min(1, aspect)) };
  part.x = Math.min(Math.max(spot.x - part.width / 2, 0), 1 - part.width);
  part.y = Math.min(Math.max(spot.y - part.height / 2, 0), 1 - part.height);
  drawPicture(context, image, to, part);
  const box = [
    ((spot.x - 0.5 / columns - part.x) / part.width) * side,
    ((spot.y - 0.5 / rows - part.y) / part.height) * side,
    side / columns / part.width,
    side / rows / part.height,
  ];
  context.fillStyle = isDark() ? "rgb(0 0 0 / 0.42)" : "rgb(255 255 255 / 0.38)";
  context.beginPath();
  context.rect(0, 0, side, side);
  context.rect(...box);
  context.fill("evenodd");
  const frame = (grow, width, style) => {
    context.lineWidth = width;
    context.strokeStyle = style;
    context.strokeRect(box[0] - grow, box[1] - grow, box[2] + 2 * grow, box[3] + 2 * grow);
  };
  const thick = Math.max(2, side / 34);
  frame(thick / 2 + 0.5, thick + 2, "#000000");
  frame(thick / 2 + 0.5, thick, colour ?? "#ffffff");
  return node;
}

/** A patch in its picture that leads to its image: a button with lines below and more in its tip. */
function patchTile(layer, entry, caption, lines) {
  const [rows, columns] = REPORT.layers[layer].grid;
  const spot = spotOf(layer, entry.patch);
  const mapped = entry.image < SAMPLE.mapped;
  const says = [
    ...lines,
    mapped ? "a click shows its image in all layers" : "this page holds its picture, not its routing",
  ];
  const button = make(
    "button",
    {
      class: "tile",
      type: "button",
      "aria-label": says.join(", "),
      "aria-disabled": mapped ? null : "true",
      onclick: () => mapped && showPatch(entry.image, spot),
    },
    thumbnail(entry.image, 112, { rows, columns, spot, colour: entry.colour }),
    caption.map((text) => make("span", {}, text)),
  );
  tipOn(button, () => says);
  return button;
}

/** The picture, grey and pale (dark: grey and dim), as a ground for colours. */
function drawGround(context, image, side) {
  drawPicture(context, image, { x: 0, y: 0, ...side });
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fillRect(0, 0, side.width, side.height);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = isDark() ? "rgb(20 23 26 / 0.55)" : "rgb(255 255 255 / 0.6)";
  context.fillRect(0, 0, side.width, side.height);
}

/** What a mode shows on a token: {colour, opacity, expert, cross}; null for nothing. */
function seen(layer, image, token) {
  const routed = maps(layer);
  const shade = (gate, ranking) => (state.opacity ? gate / (ranking.largest || 1) : gate > 0 ? 1 : 0);
  if (state.mode === "entropy") {
    return { colour: sequential(routed.entropy(image, token) / Math.log(routed.layer.num_experts)), opacity: 0.88 };
  }
  if (state.mode === "dropped") {
    const share = routed.droppedShare(image, token);
    return share ? { colour: "#111316", opacity: 0.85 * share, cross: share } : null;
  }
  const dispatch = state.mode === "dispatch" && routed.dispatch;
  const ranking = dispatch || routed.weights;
  if (state.mode === "one" || dispatch) {
    if (state.expert >= routed.layer.num_experts) return null;
    const gate = ranking.gateFor(image, token, state.expert);
    const taken = !dispatch && range(routed.chosen).some((rank) => ranking.expert(image, token, rank) === state.expert);
    return gate
      ? { colour: expertColour(state.expert), opacity: shade(gate, ranking), expert: taken ? state.expert : null }
      : null;
  }
  const rank = state.mode === "second" ? 1 : 0;
  if (rank >= ranking.top) return null;
  const [expert, gate] = [ranking.expert(image, token, rank), ranking.gate(image, token, rank)];
  return gate > 0
    ? {
        colour: expertColour(expert),
        opacity: shade(gate, ranking),
        expert,
        cross: routed.isDropped(image, token, rank) ? 0.5 : 0,
      }
    : null;
}

/** The map of a layer over an image, `width` pixels wide: a canvas. */
function drawMap(layer, image, width) {
  const { rows, columns, prefix } = maps(layer);
  const side = { width, height: Math.round((width * SAMPLE.height) / SAMPLE.width) };
  const { node, context } = canvas(side.width, side.height);
  drawGround(context, image, side);
  const [w, h] = [side.width / columns, side.height / rows];
  const cells = range(rows * columns).map((patch) => seen(layer, image, prefix + patch));
  cells.forEach((cell, patch) => {
    if (!cell) return;
    const [x, y] = [(patch % columns) * w, Math.floor(patch / columns) * h];
    context.globalAlpha = Math.max(0, Math.min(1, cell.opacity));
    context.fillStyle = cell.colour;
    context.fillRect(x, y, w + 0.5, h + 0.5);
    context.globalAlpha = 1;
    if (cell.cross && state.mode === "dropped") cross(context, x, y, w, h);
  });
  outline(context, cells, rows, columns, w, h);
  if (state.digits && Math.min(w, h) >= 15)
    cells.forEach((cell, patch) =>
      digit(context, cell, ((patch % columns) + 0.5) * w, (Math.floor(patch / columns) + 0.5) * h),
    );
  return node;
}

function cross(context, x, y, w, h) {
  context.strokeStyle = "#ffffff";
  context.lineWidth = 1.2;
  context.beginPath();
  context.moveTo(x + w * 0.3, y + h * 0.3);
  context.lineTo(x + w * 0.7, y + h * 0.7);
  context.moveTo(x + w * 0.7, y + h * 0.3);
  context.lineTo(x + w * 0.3, y + h * 0.7);
  context.stroke();
}

/** A line in an expert's full colour where its neighbour is another: regions stay readable where gates are small. */
function outline(context, cells, rows, columns, w, h) {
  const own = Math.max(1.5, Math.min(w, h) * 0.09);
  cells.forEach((cell, patch) => {
    if (!cell || cell.expert === null || cell.expert === undefined) return;
    const [c, r] = [patch % columns, Math.floor(patch / columns)];
    const differs = (row, column) =>
      row < 0 ||
      column < 0 ||
      row >= rows ||
      column >= columns ||
      cells[row * columns + column]?.expert !== cell.expert;
    context.fillStyle = cell.colour;
    if (differs(r - 1, c)) context.fillRect(c * w, r * h, w, own);
    if (differs(r + 1, c)) context.fillRect(c * w, (r + 1) * h - own, w, own);
    if (differs(r, c - 1)) context.fillRect(c * w, r * h, own, h);
    if (differs(r, c + 1)) context.fillRect((c + 1) * w - own, r * h, own, h);
  });
}

function digit(context, cell, x, y) {
  if (!cell || cell.expert === null || cell.expert === undefined) return;
  const strong = cell.opacity > 0.55;
  const ink = strong ? inkOn(cell.colour) : isDark() ? "#ffffff" : "#000000";
  context.font = "600 11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 2.5;
  context.strokeStyle = ink === "#000000" ? "rgb(255 255 255 / 0.55)" : "rgb(0 0 0 / 0.55)";
  context.strokeText(`${cell.expert}`, x, y + 0.5);
  context.fillStyle = ink;
  context.fillText(`${cell.expert}`, x, y + 0.5);
}
