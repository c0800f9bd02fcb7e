// The view of experts: what each one takes, at its best and at random.

/** Facts of an expert: load, share of choices, mean colour. */
function expertFacts(layer, expert) {
  const share = layer.load[expert] / layer.num_experts;
  const colour = layer.experts[expert].colour;
  const fact = (value, name) => make("div", {}, make("b", {}, value), make("span", {}, name));
  return make(
    "div",
    { class: "facts" },
    fact(times(layer.load[expert]), "of its fair load (1 = fair)"),
    fact(percent(share), "of the layer's load"),
    colour &&
      make(
        "div",
        {},
        make(
          "b",
          {},
          make("i", { class: "swatch", style: { background: `rgb(${colour.map(Math.round).join(" ")})` } }),
        ),
        make("span", {}, `mean colour (${colour.map(Math.round).join(", ")})`),
      ),
  );
}

/** A gallery of patches of an expert. */
function patchGallery(title, legend, index, kind, expert) {
  const entries = gallery(REPORT.layers[index], kind, expert);
  const tiles = entries.map((entry) => {
    const label = labelOf(entry.image);
    return patchTile(
      index,
      { ...entry, colour: expertColour(expert) },
      [number(entry.gate), label].filter(Boolean),
      [[imageName(entry.image), label].filter(Boolean).join(", "), `gate ${number(entry.gate, 3)}`],
    );
  });
  return tiles.length
    ? figure(`${title} (n = ${tiles.length})`, legend, make("div", { class: `tiles ${kind}` }, tiles))
    : missing(title, "No sampled image belongs here.");
}

function classBars(index, expert, width) {
  const { classes } = REPORT.layers[index].experts[expert];
  const top = Math.max(1, largest(classes.map((each) => each.ratio)));
  const name = Math.min(150, width * 0.34);
  const full = Math.max(40, width - name - 150);
  const rows = classes.map((each) =>
    make(
      "tr",
      {},
      make("td", {}, each.name),
      make(
        "td",
        {},
        shape(
          "svg",
          { width: full + 2, height: 16, "aria-hidden": "true" },
          shape("rect", {
            class: "mark",
            x: 1,
            y: 2,
            width: Math.max(1, (each.ratio / top) * full),
            height: 12,
            fill: expertColour(expert),
          }),
          shape("line", { class: "axis", x1: 1 + full / top, x2: 1 + full / top, y1: 0, y2: 16 }),
        ),
      ),
      make("td", {}, times(each.ratio)),
      make("td", {}, percent(each.share)),
    ),
  );
  return figure(
    "The classes it takes more often than others",
    `Bar: how many times more often than among all ${UNITS} (line: 1×). Last column: the class's share of this expert's ${UNITS}. ${analysed()}.`,
    scrollTable(["class", "", "ratio", "share"], rows),
  );
}

/** Where on the picture an expert takes patches. */
function positionMap(index, expert, width) {
  const layer = REPORT.layers[index];
  const values = table(layer.position)[expert];
  if (!values) return missing("Its places", "No patch was counted.");
  const most = Math.max(2, largest(values.flat()));
  const colour = (value) => sequential(value / most);
  const named = (many) => ({ names: range(many).map((place) => `${place + 1}`) });
  return figure(
    "The places it takes",
    `Its share of the choices at each place over the fair share: blank where it takes none, 1 is fair. ${analysed()}.`,
    matrix({
      values,
      colour,
      print: (value) => number(value, 1),
      rows: named(layer.grid[0]),
      columns: named(layer.grid[1]),
      width: Math.min(width, 420),
      tallest: 34,
      widest: 34,
      narrowest: 4,
      label: `Load of expert ${expert} by place`,
      lines: (r, c) => [`row ${r + 1}, column ${c + 1}`, `${times(values[r][c])} its fair share`],
    }),
    colourBar(colour, 0, most, times, "of the fair share"),
  );
}

/** One expert in full. */
function expertDetail() {
  const layer = REPORT.layers[state.layer];
  const { expert } = state;
  const head = make(
    "div",
    { class: "expert-head" },
    chip(expert),
    make("h2", { style: { margin: "0" } }, `Expert ${expert} of ${layer.name}`),
  );
  if (layer.experts[expert].dead) {
    return [
      head,
      make(
        "p",
        { class: "verdict" },
        `This expert is dead: no ${isWhole ? "image" : "patch of the images"} analysed chose it, so there is nothing to show.`,
      ),
      make("p", { class: "legend" }, `${analysed()}${isWhole ? "" : `, ${count(patchesOf(layer))} patches`}.`),
    ];
  }
  return [
    head,
    expertFacts(layer, expert),
    patchGallery(
      `${isWhole ? "Images" : "Patches"} with its highest gates`,
      `${isWhole ? "The sampled images" : "The patches of the sampled images"} on which its gate is largest${isWhole ? "" : ", framed in their surroundings"}: what it likes best, not what it usually gets.`,
      state.layer,
      "top",
      expert,
    ),
    patchGallery(
      `Random ${UNITS} among those it takes`,
      `Drawn at random from ${isWhole ? "the sampled images" : "the patches of the sampled images"} that chose it: what it usually gets.`,
      state.layer,
      "random",
      expert,
    ),
    sideBySide([...(isLabelled ? [classBars] : []), ...(isWhole ? [] : [positionMap])], 330, (build, width) => build(state.layer, expert, width), 700),
  ];
}

/** The card of an expert in the overview. */
function expertCard(layer, expert, onPick) {
  const { dead, classes } = layer.experts[expert];
  const entries = dead ? [] : gallery(layer, "top", expert).slice(0, 6);
  const card = make(
    "button",
    {
      type: "button",
      class: `card${dead ? " dead" : ""}`,
      "aria-pressed": `${expert === state.expert}`,
      onclick: () => onPick(expert),
    },
    chip(expert),
    make(
      "p",
      {},
      dead
        ? `dead: takes no ${UNIT}`
        : `${times(layer.load[expert])} fair load${classes?.length ? ` · ${classes[0].name} ${times(classes[0].ratio)}` : ""}`,
    ),
    make(
      "div",
      { class: "row" },
      dead
        ? "–"
        : entries.map((entry) => {
            const [rows, columns] = layer.grid;
            return thumbnail(entry.image, 40, {
              rows,
              columns,
              spot: spotOf(REPORT.layers.indexOf(layer), entry.patch),
              colour: expertColour(expert),
            });
          }),
    ),
  );
  return card;
}

function expertsView() {
  state.expert = Math.min(state.expert, REPORT.layers[state.layer].num_experts - 1);
  const detail = live(expertDetail);
  const overview = live(() => {
    const layer = REPORT.layers[state.layer];
    const dead = layer.experts.filter((expert) => expert.dead).length;
    const cards = range(layer.num_experts).map((expert) =>
      expertCard(layer, expert, (picked) => {
        state.expert = picked;
        cards.forEach((card, index) => card.setAttribute("aria-pressed", `${index === picked}`));
        detail.refresh();
        detail.node.scrollIntoView({ block: "nearest" });
      }),
    );
    return figure(
      `The ${plural(layer.num_experts, "expert")} of ${layer.name}${dead ? `, ${dead} of them dead` : ""}`,
      `Load (1× = fair), ${isLabelled ? "the class it takes most above its share, " : ""}and the six ${UNITS} with its highest gates. A click shows one in full below. ${analysed()}${isWhole ? "" : `, ${count(patchesOf(layer))} patches`}.`,
      make("div", { class: "cards" }, cards),
    );
  });
  return [
    make("h2", {}, "What each expert takes"),
    layerPicker(() => {
      overview.refresh();
      detail.refresh();
    }),
    overview.node,
    detail.node,
  ];
}
