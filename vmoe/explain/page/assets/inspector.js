// One patch (or class or register token): its experts through the layers and the patches that are routed most alike.

const SIMILAR = 8;

/** What stands beside the maps, for state.spot of state.image. */
function inspector() {
  const { spot, image } = state;
  if (!spot) return make("p", { class: "note" }, `Point at ${isWhole ? "a map" : "a patch"}, or focus a map and use the arrow keys.`);
  return make(
    "div",
    {},
    make(
      "div",
      { class: "place" },
      placePicture(spot, image),
      make(
        "div",
        {},
        make("h3", { style: { marginTop: "0" } }, placeName(spot)),
        make(
          "p",
          { class: "note" },
          state.pinned ? "Pinned: a click or Escape lets go." : "A click on the map pins it.",
        ),
      ),
    ),
    make("h3", {}, "Its experts through the layers"),
    make(
      "p",
      { class: "legend" },
      "Layer; the experts it chose, best first (struck out: dropped); the share of each expert's gate, the rest blank.",
    ),
    make(
      "div",
      { class: "route" },
      REPORT.layers.map((_, layer) => routeRow(layer, image, spot)),
    ),
    spot.prefix === null && similarPatches(image, spot),
  );
}

function finestLayer() {
  const sizes = REPORT.layers.map((layer) => layer.grid[0] * layer.grid[1]);
  return sizes.indexOf(largest(sizes));
}

function placeName(spot) {
  if (spot.prefix !== null) return `The ${prefixName(spot.prefix)}`;
  if (isWhole) return "The whole image";
  const [rows, columns] = REPORT.layers[finestLayer()].grid;
  return `Patch in row ${Math.floor(spot.y * rows) + 1} of ${rows}, column ${Math.floor(spot.x * columns) + 1} of ${columns}`;
}

function placePicture(spot, image) {
  if (spot.prefix !== null || isWhole) return thumbnail(image, 112);
  const [rows, columns] = REPORT.layers[finestLayer()].grid;
  return thumbnail(image, 112, { rows, columns, spot });
}

/** The tokens of a spot in a layer as the route shows them: chips, and its gates as a stack. */
function routeRow(layer, image, spot) {
  const routed = maps(layer);
  const token = routed.token(spot);
  const name = make("span", { class: "note" }, shortNames[layer]);
  if (token === null) return [name, make("span", {}, "–"), make("span")];
  const { weights } = routed;
  const ranks = range(weights.top).filter((rank) => weights.gate(image, token, rank) > 0);
  const chosen = ranks.slice(0, routed.chosen || 2);
  const chips = chosen.map((rank) =>
    chip(weights.expert(image, token, rank), {
      class: `chip${routed.chosen && routed.isDropped(image, token, rank) ? " dropped" : ""}`,
    }),
  );
  const total = Math.max(1, sum(ranks.map((rank) => weights.gate(image, token, rank))));
  const stack = make(
    "div",
    { class: "stack" },
    ranks.map((rank) =>
      make("i", {
        style: {
          width: `${(100 * weights.gate(image, token, rank)) / total}%`,
          background: expertColour(weights.expert(image, token, rank)),
        },
      }),
    ),
  );
  const lines = tokenLines(layer, image, token);
  stack.setAttribute("role", "img");
  stack.setAttribute("aria-label", lines.join(", "));
  tipOn(stack, () => lines);
  return [name, make("span", { class: "chips" }, chips.length ? chips : "none"), stack];
}

/** A token of a layer in words. */
function tokenLines(layer, image, token) {
  const routed = maps(layer);
  const { weights } = routed;
  const gates = range(Math.min(weights.top, 4))
    .filter((rank) => weights.gate(image, token, rank) > 0)
    .map((rank) => {
      const dropped = rank < routed.chosen && routed.isDropped(image, token, rank) ? ", dropped" : "";
      return `expert ${weights.expert(image, token, rank)}: gate ${number(weights.gate(image, token, rank))}${dropped}`;
    });
  return [
    layerNames[layer],
    ...(gates.length ? gates : ["taken by no expert"]),
    `entropy ${number(routed.entropy(image, token))} nats`,
  ];
}

/** How alike two tokens are routed: shared gate, sum over experts of the smaller of both gates, averaged over layers. */
function similarities(image, spot) {
  const finest = finestLayer();
  const [rows, columns] = REPORT.layers[finest].grid;
  const score = new Float32Array(SAMPLE.mapped * rows * columns);
  REPORT.layers.forEach((_, layer) => {
    const routed = maps(layer);
    const { weights } = routed;
    const own = new Float32Array(routed.layer.num_experts);
    const token = routed.token(spot);
    for (let rank = 0; rank < weights.top; rank += 1)
      own[weights.expert(image, token, rank)] = weights.gate(image, token, rank);
    const tokens = range(rows * columns).map((patch) => routed.token(spotOf(finest, patch)));
    for (let other = 0; other < SAMPLE.mapped; other += 1) {
      for (let patch = 0; patch < tokens.length; patch += 1) {
        let shared = 0;
        for (let rank = 0; rank < weights.top; rank += 1) {
          shared += Math.min(own[weights.expert(other, tokens[patch], rank)], weights.gate(other, tokens[patch], rank));
        }
        score[other * tokens.length + patch] += shared / REPORT.layers.length;
      }
    }
  });
  return score;
}

/** The best patch of each other image, best first: [{image, patch, score}]. */
function mostSimilar(image, spot) {
  const [rows, columns] = REPORT.layers[finestLayer()].grid;
  const score = similarities(image, spot);
  return range(SAMPLE.mapped)
    .filter((other) => other !== image)
    .map((other) => {
      const own = score.subarray(other * rows * columns, (other + 1) * rows * columns);
      const patch = own.reduce((best, value, index) => (value > own[best] ? index : best), 0);
      return { image: other, patch, score: own[patch] };
    })
    .sort((a, b) => b.score - a.score)
    .slice(0, SIMILAR);
}

function similarPatches(image, spot) {
  const tiles = mostSimilar(image, spot).map((entry) =>
    patchTile(
      finestLayer(),
      entry,
      [percent(entry.score, 0), labelOf(entry.image)].filter(Boolean),
      [
        [imageName(entry.image), labelOf(entry.image)].filter(Boolean).join(", "),
        `${percent(entry.score)} of the gates shared`,
      ],
    ),
  );
  return make(
    "div",
    {},
    make("h3", {}, `${isWhole ? "Images" : "Patches"} that are routed most alike`),
    make(
      "p",
      { class: "legend" },
      `${isWhole ? "The best" : "The best of each other image"} among ${plural(SAMPLE.mapped, "image")}: the share of gate that goes to the same experts, averaged over layers.`,
    ),
    make("div", { class: "tiles similar" }, tiles),
  );
}
