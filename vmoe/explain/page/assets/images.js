// The view of images: pick one, see its layers side by side, ask a patch.

/** What there is to see, by the kinds of layers. */
function modes() {
  const any = (test) => REPORT.layers.some(test);
  return [
    { value: "first", name: any((layer) => layer.kind === "slots") ? "Largest weight" : "First choice" },
    { value: "second", name: "Second choice", disabled: SAMPLE.tops.every((top) => top < 2) },
    { value: "one", name: "One expert" },
    { value: "dispatch", name: "Dispatch to one", disabled: SAMPLE.layers.every((layer) => !layer.dispatch) },
    { value: "entropy", name: "Entropy" },
    { value: "dropped", name: "Dropped" },
  ].filter((mode) => mode.value !== "dispatch" || !mode.disabled);
}

/** How to read the maps, in a sentence. */
function modeLegend() {
  const strength = state.opacity
    ? "the more opaque, the larger its gate (fully: the layer's largest gate in the sample)"
    : "opaque wherever the gate is above zero";
  const slots = REPORT.layers.some((layer) => layer.kind === "slots");
  const second = REPORT.layers.every((layer) => layer.top_k === 1)
    ? " With K = 1 the second gate is only the runner-up: it computes nothing."
    : "";
  return {
    first: `Each ${UNIT} has the colour and number of ${slots ? "the expert that contributes most to it (largest combine weight)" : "its first choice"}; ${strength}.`,
    second: `Each ${UNIT} has the colour of its second choice; ${strength}.${second}`,
    one: `The gate of expert ${state.expert} on each ${UNIT}; ${strength}; outlined where it was chosen.`,
    dispatch: `How much of each patch goes into the slots of expert ${state.expert} (dispatch weight); ${strength}.`,
    entropy: `Entropy of the gates of each ${UNIT}, from 0 (one expert has all) to ln E (all experts equal).`,
    dropped:
      "Patches marked with a cross lost choices because the expert was full (or, where experts choose, because none took them): the darker, the larger the share lost.",
  }[state.mode];
}

function toolbar(onChange) {
  const most = largest(REPORT.layers.map((layer) => layer.num_experts));
  const expertChoice = picker(
    "Expert",
    range(most).map((expert) => ({ value: expert, name: `${expert}` })),
    Math.min(state.expert, most - 1),
    (expert) => {
      state.expert = expert;
      onChange();
    },
  );
  const colours = !["entropy", "dropped"].includes(state.mode);
  return [
    make(
      "div",
      { class: "bar" },
      choice("Show", modes(), state.mode, (mode) => {
        state.mode = mode;
        onChange();
      }),
      ["one", "dispatch"].includes(state.mode) && expertChoice,
      colours &&
        checkbox("opacity = gate", state.opacity, (on) => {
          state.opacity = on;
          onChange();
        }),
      colours &&
        checkbox("numbers", state.digits, (on) => {
          state.digits = on;
          onChange();
        }),
    ),
    make("p", { class: "legend", id: "mode-legend" }, modeLegend()),
    state.mode === "entropy" && colourBar(sequential, 0, 1, (t) => (t ? "ln E nats" : "0")),
  ];
}

/** Opens the view of images at a patch of an image. */
function showPatch(image, spot) {
  Object.assign(state, { image, filter: "all", spot, pinned: true });
  openTab("images", true);
}

function imagesView() {
  if (!SAMPLE.mapped)
    return [
      missing("Images", SAMPLE.count ? "The routing of no image fits into this page." : "No images were sampled."),
    ];
  state.image = Math.min(state.image, SAMPLE.mapped - 1);
  const [rows, columns] = REPORT.layers[finestLayer()].grid;
  state.spot ??= spotOf(finestLayer(), Math.floor(rows / 2) * columns + Math.floor(columns / 2));
  let waiting = null;
  const side = live(inspector, { class: "inspector", role: "region", "aria-label": `The ${UNIT}`, tabindex: "0" });
  const panels = new Panels((spot) => {
    state.spot = spot;
    panels.mark();
    clearTimeout(waiting);
    waiting = setTimeout(side.refresh, 30);
  });
  const head = live(verdict);
  const tools = live(() =>
    toolbar(() => {
      tools.refresh();
      panels.draw();
    }),
  );
  const change = () => {
    head.refresh();
    panels.draw();
    side.refresh();
  };
  const strip = live(() => imageStrip(change));
  return [
    make("h2", {}, `Which expert takes which ${UNIT}`),
    make(
      "div",
      { class: "bar" },
      isLabelled &&
        imageFilter(() => {
          const shown = listedImages();
          if (shown.length && !shown.includes(state.image)) {
            [state.image] = shown;
            change();
          }
          strip.refresh();
        }),
      make(
        "span",
        { class: "legend" },
        `${plural(SAMPLE.mapped, "sampled image")} of ${count(REPORT.provenance.num_images)} analysed${isLabelled ? "; dotted frame: classified wrong" : ""}.`,
      ),
    ),
    strip.node,
    head.node,
    tools.node,
    make("div", { class: "workbench" }, panels.node, side.node),
  ];
}
