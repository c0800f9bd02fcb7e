// The view of load: is the work shared?

/** Load of every expert of a layer as bars around the fair share. */
function loadBars(index, width) {
  const layer = REPORT.layers[index];
  const plot = frame({
    width,
    height: 190,
    x: { labels: range(layer.num_experts) },
    y: span([...layer.load, 1.2]),
    xLabel: "expert",
    yLabel: "load (1 = fair)",
  });
  layer.load.forEach((load, expert) =>
    bar(plot, expert, load, 0, expertColour(expert), [
      `Expert ${expert}`,
      layer.experts[expert].dead ? `dead: takes no ${UNIT}` : `${times(load)} its fair load`,
    ]),
  );
  level(plot, 1);
  const most = layer.load.indexOf(largest(layer.load));
  return make(
    "figure",
    {},
    make("h4", {}, `${layer.name}: expert ${most} takes ${times(layer.load[most])} its fair share`),
    make("p", { class: "legend" }, loadSentence(layer)),
    finish(plot, `Load by expert of ${layer.name}`),
  );
}

function loadSentence(layer) {
  const dead = layer.experts.filter((expert) => expert.dead).length;
  return [
    `CV ${number(layer.load_cv)}`,
    `largest ${times(layer.max_load)}`,
    isNumber(layer.dropped) ? `dropped ${percent(layer.dropped)}` : "dropping does not apply",
    `gate entropy ${number(layer.entropy)} of ${number(Math.log(layer.num_experts))} nats`,
    dead ? `${dead} dead` : "",
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Load as colour, on a logarithmic scale: dead is darkest orange, fair blank, from four times the fair share on full blue. */
const loadColour = (load) => diverging(load <= 0 ? -1 : Math.max(-0.9, Math.min(1, Math.log2(load) / 2)));

function loadOverview() {
  const most = largest(REPORT.layers.map((layer) => layer.num_experts));
  const values = REPORT.layers.map((layer) => range(most).map((expert) => layer.load[expert] ?? null));
  return figure(
    "Load of every expert in every layer",
    `One row per layer, one column per expert: blank is the fair share, blue above, orange below, darkest orange dead. ${analysed()}.`,
    matrix({
      values,
      colour: loadColour,
      rows: { names: shortNames },
      columns: { experts: range(most) },
      width: viewWidth(),
      tallest: 26,
      widest: 44,
      narrowest: 4,
      label: "Load by layer and expert",
      rowLabel: layerAxis === "layer" ? "" : `Rows: ${layerAxis}`,
      lines: (layer, expert) => [
        `${layerNames[layer]}, expert ${expert}`,
        values[layer][expert] === null ? "no such expert" : `${times(values[layer][expert])} its fair load`,
      ],
    }),
    loadBar(),
  );
}

const loadBar = () =>
  colourBar(
    (t) => loadColour(2 ** t),
    -2,
    2,
    (t) => times(2 ** t),
    "of the fair load; the darkest orange is dead",
  );

function loadByLayer() {
  const points = (value) => REPORT.layers.map((layer) => (isNumber(value(layer)) ? { value: value(layer) } : null));
  const plots = [
    [
      "Coefficient of variation of load",
      "standard deviation / mean (0 = all equal)",
      points((layer) => layer.load_cv),
      number,
    ],
    ["Largest load", "times the fair share", points((layer) => layer.max_load), times],
    ["Dropped choices", "% of choices", points((layer) => layer.dropped), percent],
    ["Gate entropy", "% of its maximum, ln E", points((layer) => layer.entropy / Math.log(layer.num_experts)), percent],
  ];
  return figure(
    "Balance by layer",
    `How unevenly each layer shares its work. ${analysed()}.`,
    sideBySide(plots, 300, ([title, unit, values, format], width) =>
      make(
        "figure",
        {},
        make("h4", {}, title),
        values.some(Boolean)
          ? byLayer([{ name: title.toLowerCase(), points: values }], {
              width,
              yLabel: unit,
              format,
              scale: format === percent ? 100 : 1,
              mean: title,
            })
          : make("p", { class: "note" }, "Not measured: these routers drop no choices."),
      ),
    ),
  );
}

/** Load of every expert over training: one row per expert, one column per logged step. */
function trainingStrip(name, width) {
  const steps = table(REPORT.training.steps);
  const load = table(REPORT.training.layers[name].load);
  const every = Math.max(1, Math.ceil(steps.length / Math.floor((width - 60) / 4)));
  const kept = range(steps.length).filter((index) => index % every === 0 || index === steps.length - 1);
  const values = load[0].map((_, expert) => kept.map((index) => load[index][expert]));
  return make(
    "figure",
    {},
    make("h4", {}, name),
    matrix({
      values,
      colour: loadColour,
      rows: { experts: range(values.length) },
      columns: { names: kept.map((index) => count(steps[index])) },
      width,
      tallest: 20,
      widest: 44,
      narrowest: 4,
      label: `Load of the experts of ${name} over training`,
      rowLabel: `steps ${count(steps[0])} to ${count(steps.at(-1))}${every > 1 ? `, every ${every}th of ${steps.length} logged` : ""}`,
      lines: (expert, index) => [
        `step ${count(steps[kept[index]])}, expert ${expert}`,
        `${times(values[expert][index])} its fair load`,
      ],
    }),
  );
}

function loadOverTraining() {
  const all = Object.keys(REPORT.training?.layers ?? {});
  const names = manyLayers ? all.filter((name) => name === layerNames[state.layer]) : all;
  if (!names.length)
    return missing("Load over training", "The checkpoint's folder holds no metrics.csv with the load of its experts.");
  return figure(
    "Load over training",
    "One row per expert, time to the right: blank is the fair share, blue above, orange below, darkest orange dead.",
    sideBySide(names, 420, (name, width) => trainingStrip(name, width), 800),
    loadBar(),
  );
}

function loadView() {
  const legend = `An expert's share of all choices over its fair share 1/E. The line is fair; an expert at 0 is dead. CV, the coefficient of variation, is the standard deviation of the loads over their mean: 0 means equal loads. A choice is dropped where its expert is full. Gate entropy is 0 where one expert has the whole weight of a token, and largest where all have the same. ${analysed()}.`;
  const training = live(loadOverTraining);
  const one = live(() => [
    manyLayers &&
      layerPicker(() => {
        one.refresh();
        training.refresh();
      }),
    figure(
      "Load by expert",
      legend,
      manyLayers
        ? loadBars(state.layer, Math.min(viewWidth(), 1400))
        : sideBySide(REPORT.layers, 400, (_, width, index) => loadBars(index, width)),
    ),
  ]);
  const rest = [loadByLayer(), REPORT.layers.length > 1 && loadOverview()];
  return [
    make("h2", {}, "Is the work shared?"),
    manyLayers ? [rest[1], rest[0], one.node] : [one.node, ...rest],
    training.node,
  ];
}
