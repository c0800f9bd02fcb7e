// The view that sets runs beside each other.

function runTable(runs) {
  const row = (run, index) =>
    make(
      "tr",
      {},
      make(
        "td",
        {},
        shape(
          "svg",
          {
            width: 14,
            height: 14,
            "aria-hidden": "true",
            style: { display: "inline-block", verticalAlign: "-2px", marginRight: "6px" },
          },
          symbol(7, 7, index, 4),
        ),
        run.name + (index ? "" : " (this one)"),
      ),
      isLabelled && make("td", {}, accuracyText(run.accuracy)),
      make("td", {}, run.is_dense ? "dense" : plural(run.layers.length, "MoE layer")),
      make("td", {}, run.is_dense ? "–" : number(sum(run.layers.map((layer) => layer.load_cv)) / run.layers.length)),
      make(
        "td",
        {},
        run.layers.some((layer) => isNumber(layer.dropped))
          ? percent(sum(run.layers.map((layer) => layer.dropped ?? 0)) / run.layers.length)
          : "–",
      ),
    );
  return scrollTable(
    ["run", ...(isLabelled ? ["accuracy [95 %]"] : []), "kind", "mean load CV", "dropped"],
    runs.map(row),
  );
}

const accuracyText = (accuracy) =>
  isNumber(accuracy) ? percent(accuracy) : accuracy ? withInterval(accuracy, percent) : "–";

/** One number by layer, one series per run; layers are matched by name, else by their place. */
function compared(runs, value) {
  return runs
    .map((run) => ({
      name: run.name,
      points: layerNames.map((name, index) => {
        const layer =
          run.layers.find((each) => each.name === name) ??
          (run.layers.length === layerNames.length ? run.layers[index] : null);
        const found = layer ? value(layer) : null;
        return isNumber(found)
          ? { value: found }
          : found && isNumber(found.nmi)
            ? { ...found, value: found.nmi }
            : null;
      }),
    }))
    .filter((series) => series.points.some(Boolean));
}

function compareView() {
  const runs = REPORT.runs ?? [];
  if (runs.length < 2)
    return [
      make("h2", {}, "Runs beside each other"),
      missing(
        "Comparison",
        "One run was explored. Give vmoe explore two or more checkpoints (seeds, or a dense twin) to set them beside each other.",
      ),
    ];
  const kinds = [...new Set(runs.flatMap((run) => run.layers.flatMap((layer) => Object.keys(layer.nmi ?? {}))))];
  const plots = [
    ["Coefficient of variation of load", "0 = all experts equal", (layer) => layer.load_cv],
    ...kinds.map((kind) => [`NMI of expert and ${kind}`, "NMI (0 to 1)", (layer) => layer.nmi?.[kind] ?? null]),
    ["Dropped choices", "% of choices", (layer) => layer.dropped, percent],
  ]
    .map(([title, unit, value, format]) => ({ title, unit, format, series: compared(runs, value) }))
    .filter((plot) => plot.series.length);
  const routed = runs.filter((run) => !run.is_dense);
  return [
    make("h2", {}, "Runs beside each other"),
    figure(
      `${runs.length} runs`,
      `${isLabelled ? `${ACCURACY} on the same images with its 95 % interval` : "All on the same images"}. Load CV, the coefficient of variation, is the standard deviation of the experts' loads over their mean: 0 means equal loads. ${analysed()}.`,
      runTable(runs),
    ),
    plots.length > 0 &&
      figure(
        "Layer by layer",
        `Balance and links of experts of each run. NMI, the normalised mutual information, is 0 where an expert says nothing about a property and 1 where it says all. A pale mark does not beat its null, the NMI of shuffled routing. ${analysed()}.`,
        sideBySide(
          plots,
          330,
          ({ title, unit, format, series }, width) =>
            make(
              "figure",
              {},
              make("h4", {}, title),
              keysOf(runs, series),
              byLayer(padded(runs, series), {
                width,
                yLabel: unit,
                mean: title,
                least: 0.002,
                format: format ?? ((value) => number(value, 3)),
                scale: format ? 100 : 1,
              }),
            ),
          560,
        ),
      ),
    routed.length > 1 &&
      make(
        "figure",
        { class: "figure" },
        sideBySide([agreementFigure], 400, (build, width) => make("div", {}, build(width)), 620),
      ),
  ];
}

/** Forms stay with their run also where a run has nothing to show. */
function padded(runs, series) {
  return runs.map(
    (run) => series.find((each) => each.name === run.name) ?? { name: run.name, points: layerNames.map(() => null) },
  );
}

const keysOf = (runs, series) =>
  keys(padded(runs, series).map((each) => (each.points.some(Boolean) ? each.name : `${each.name} (none)`)));
