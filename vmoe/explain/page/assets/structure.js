// The view of structure: how experts go together, within a layer, between layers, under change of the image, in time.

function coactivation() {
  const layer = REPORT.layers[state.layer];
  const title = `Which experts of ${layer.name} are chosen together`;
  const values = table(layer.coactivation);
  if (!values || layer.top_k === 1)
    return missing(title, `${isWhole ? "An image" : "A patch"} has one expert (K = 1), so no two are chosen together.`);
  const most = Math.max(2, Math.min(8, largest(values.flatMap((row, r) => row.filter((_, c) => c !== r)))));
  const colour = (value) => diverging(value <= 0 ? -1 : Math.max(-1, Math.min(1, Math.log2(value) / Math.log2(most))));
  return subfigure(
    title,
    `${isWhole ? "Images" : "Patches"} that choose both, over what independent choices would give: 1 is chance (blank), blue more, orange less often. n = ${count(patchesOf(layer))} ${UNITS}.`,
    matrix({
      values: values.map((row, r) => row.map((value, c) => (r === c ? null : value))),
      print: (value) => number(value, 1),
      colour,
      rows: { experts: range(values.length) },
      columns: { experts: range(values.length) },
      width: halfView(),
      tallest: 34,
      widest: 34,
      label: title,
      lines: (a, b) =>
        a === b
          ? [`expert ${a}`]
          : [
              `experts ${a} and ${b}`,
              isNumber(values[a][b]) ? `${times(values[a][b])} as often together as by chance` : "at least one is dead",
            ],
    }),
    colourBar(
      (t) => colour(2 ** t),
      -Math.log2(most),
      Math.log2(most),
      (t) => times(2 ** t),
      "of chance",
    ),
  );
}

function expertsPerImage() {
  const layer = REPORT.layers[state.layer];
  const used = layer.experts_per_image;
  const title = "How many experts an image uses";
  if (!used) return missing(title, "Not counted.");
  const histogram = table(used.histogram);
  const all = sum(histogram) || 1;
  const shares = histogram.map((value) => value / all);
  const plot = frame({
    width: Math.min(halfView(), 620),
    height: 230,
    x: { labels: range(shares.length) },
    y: { ...span(shares), scale: 100 },
    xLabel: `experts of ${layer.name} that an image uses`,
    yLabel: "% of images",
  });
  shares.forEach((share, many) =>
    bar(plot, many, share, 0, "var(--muted)", [`${plural(many, "expert")}`, `${percent(share)} of images`]),
  );
  return subfigure(
    `${title}: ${number(used.mean, 1)} of ${layer.num_experts} on average`,
    `Images by the number of experts that take ${isWhole ? "them" : "at least one of their patches"}. ${analysed()}.`,
    finish(plot, title),
  );
}

const halfView = () => {
  const { count: columns, width } = columnsOf(440);
  return columns > 1 ? columnsOf(440, 24, 2).width : width;
};

function consistencyFigure(width) {
  const title = `Does ${isWhole ? "an image keep its expert when it" : "a patch keep its expert when the image"} changes a little?`;
  const kinds = [...new Set(REPORT.layers.flatMap((layer) => Object.keys(layer.consistency ?? {})))].filter((kind) =>
    REPORT.layers.some((layer) => layer.consistency?.[kind]),
  );
  if (!kinds.length) return missing(title, "Not measured.");
  const series = kinds.map((kind) => ({
    name: { flip: "horizontal flip", shift: "small shift" }[kind] ?? kind,
    points: REPORT.layers.map((layer) => layer.consistency?.[kind] ?? null),
  }));
  return subfigure(
    title,
    `Share of ${UNITS} that keep their first choice${isWhole ? "" : " once the change is undone"}; vertical lines are 95 % intervals, short grey lines chance. ${analysed("probe_images")}.`,
    keys(series.map((each) => each.name)),
    byLayer(series, { width, height: 220, yLabel: `% of ${UNITS}`, format: percent, upTo: 1, scale: 100, mean: title }),
  );
}

function saturationFigure(width) {
  const title = "When does routing settle in training?";
  const names = Object.keys(REPORT.saturation?.layers ?? {});
  if (!names.length) return missing(title, "Needs more than one checkpoint of the run.");
  const epochs = table(REPORT.saturation.epochs);
  const plot = frame({
    width,
    height: 220,
    x: { low: epochs[0], high: epochs.at(-1), ticks: niceTicks(epochs[0], epochs.at(-1), 5) },
    y: { low: 0, high: 1, scale: 100 },
    xLabel: "epoch",
    yLabel: `% of ${UNITS}`,
  });
  names.forEach((name, series) => {
    const values = table(REPORT.saturation.layers[name]);
    line(
      plot,
      values.map((value, index) => [plot.across(epochs[index]), value]),
      series,
    );
    values.forEach((value, index) =>
      dot(
        plot,
        plot.across(epochs[index]),
        { value },
        [`${name}, epoch ${epochs[index]}`, `${percent(value)} of ${UNITS} have the expert they end with`],
        series,
      ),
    );
  });
  return subfigure(
    title,
    `Share of ${UNITS} that already have the first choice of the last checkpoint. ${analysed("probe_images")}.`,
    names.length < 7 && keys(names),
    finish(plot, title),
  );
}

function agreementFigure(width) {
  const title = "Do other runs find the same experts?";
  const runs = REPORT.agreement ?? [];
  if (!runs.length) return missing(title, "Needs a second run with the same layers.");
  return runs.map((run) => {
    const points = layerNames.map((name) => run.layers[name] ?? null);
    const plot = frame({
      width,
      height: 220,
      x: { labels: shortNames },
      y: { ...span(points.filter(Boolean).flatMap((each) => [each.value, each.null_high])), scale: 100 },
      xLabel: layerAxis,
      yLabel: `% of ${UNITS}`,
    });
    points.forEach(
      (each, layer) =>
        each &&
        plot.svg.append(
          shape("rect", {
            x: plot.across(layer) - Math.min(14, plot.step * 0.42),
            width: Math.min(28, plot.step * 0.84),
            y: plot.up(each.null_high),
            height: plot.box.bottom - plot.up(each.null_high),
            fill: "var(--band)",
          }),
        ),
    );
    points.forEach(
      (each, layer) =>
        each &&
        dot(
          plot,
          plot.across(layer),
          each,
          [
            layerNames[layer],
            `${percent(each.value)} of ${UNITS} agree`,
            `null: ${percent(each.null_mean)}, 95 % below ${percent(each.null_high)}`,
          ],
          each.value > each.null_high ? 0 : 3,
        ),
    );
    return make(
      "figure",
      {},
      make("h4", {}, `${title} Against ${run.run}`),
      make(
        "p",
        { class: "legend" },
        `Share of ${UNITS} that go to matched experts in both runs; experts are matched one to one, as well as can be. Grey band: the null, which is shuffled routing, up to its 95 % point. ${analysed("probe_images")}.`,
      ),
      finish(plot, title),
    );
  });
}

function structureView() {
  const within = live(() => sideBySide([coactivation, expertsPerImage], 440, (build) => build(), 760));
  return [
    make("h2", {}, "How do experts go together?"),
    layerPicker(within.refresh),
    within.node,
    flowsFigure(),
    make("h2", {}, "How stable is the routing?"),
    sideBySide(
      [consistencyFigure, saturationFigure, agreementFigure],
      400,
      (build, width) => make("div", {}, build(width)),
      620,
    ),
  ];
}
