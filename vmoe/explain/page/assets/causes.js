// The view of causes: what happens to accuracy when routing is interfered with.

/** Change of accuracy when one expert is taken away, by expert; and with a random router. */
function ablationBars(index, width) {
  const layer = REPORT.layers[index];
  const rows = layer.ablation ?? [];
  const { random_router: random } = layer;
  const all = [...rows, random].filter(Boolean).flatMap((row) => [row.change, row.low, row.high]);
  const labels = [...rows.map((row) => `${row.expert}`), ...(random ? ["random"] : [])];
  const plot = frame({
    width,
    height: 220,
    x: { labels },
    y: { ...span(all, 0, 0.002), scale: 100 },
    xLabel: "expert taken away",
    yLabel: "change of accuracy, points",
  });
  level(plot, 0);
  [...rows, random && { ...random, expert: null }].filter(Boolean).forEach((row, place) => {
    const what = row.expert === null ? "random router" : `without expert ${row.expert}`;
    bar(
      plot,
      place,
      row.change,
      0,
      row.expert === null ? "var(--muted)" : expertColour(row.expert),
      [
        `${layer.name}, ${what}`,
        `accuracy ${points(row.change)}`,
        isNumber(row.low) ? `95 %: ${points(row.low)} to ${points(row.high)}` : "",
      ],
      0.62,
    );
    whisker(plot, plot.across(place), row);
  });
  return make(
    "figure",
    {},
    make("h4", {}, ablationSentence(layer, rows, random)),
    finish(plot, `Change of accuracy by expert taken away in ${layer.name}`),
  );
}

const lost = (row) => points(-row.change).slice(1);

/** What the intervals allow to say. */
function ablationSentence(layer, rows, random) {
  const hurt = rows.filter((row) => row.high < 0).sort((a, b) => a.change - b.change);
  const experts = !rows.length
    ? ""
    : hurt.length
      ? `taking away expert ${hurt[0].expert} costs most (${lost(hurt[0])})`
      : "no single expert's loss lowers accuracy beyond chance";
  const router = !random
    ? ""
    : random.high < 0
      ? `a random router costs ${lost(random)}`
      : "a random router does no measurable harm";
  return `${layer.name}: ${[experts, router].filter(Boolean).join("; ")}`;
}

function ablationFigure() {
  const indices = range(REPORT.layers.length).filter(
    (index) => REPORT.layers[index].ablation || REPORT.layers[index].random_router,
  );
  const title = "What is lost without an expert, or without the router";
  if (!indices.length) return missing(title, "Not measured: ablation was not asked for.");
  return figure(
    title,
    `Change of accuracy when one expert is taken away and its ${UNITS} are routed on without it, and when a layer's router is replaced by a random one. Lines: paired 95 % intervals; a bar with a line across 0 shows no effect, and one line in twenty misses 0 by chance. ${analysed("cause_images")}.`,
    manyLayers ? manyAblations(indices) : sideBySide(indices, 380, (index, width) => ablationBars(index, width)),
  );
}

/** Many layers: a matrix of all, and the bars of the chosen one. */
function manyAblations(indices) {
  const most = largest(indices.map((index) => REPORT.layers[index].num_experts));
  const rowOf = (index, expert) => REPORT.layers[index].ablation?.find((row) => row.expert === expert) ?? null;
  const values = indices.map((index) => range(most).map((expert) => rowOf(index, expert)?.change ?? null));
  const end = Math.max(0.005, largest(values.flat().map((value) => (isNumber(value) ? Math.abs(value) : 0))));
  const colour = (value) => diverging(value / end);
  const one = live(() => [layerPicker(() => one.refresh()), ablationBars(state.layer, Math.min(viewWidth(), 1400))]);
  return [
    matrix({
      values,
      colour,
      rows: { names: indices.map((index) => shortNames[index]) },
      columns: { experts: range(most) },
      width: viewWidth(),
      widest: 44,
      label: "Change of accuracy by layer and expert taken away",
      rowLabel: `Rows: ${layerAxis}`,
      lines: (row, expert) => {
        const found = rowOf(indices[row], expert);
        return [
          `${layerNames[indices[row]]}, without expert ${expert}`,
          found
            ? `accuracy ${points(found.change)}, 95 %: ${points(found.low)} to ${points(found.high)}`
            : "not measured",
        ];
      },
    }),
    colourBar(colour, -end, end, points),
    one.node,
  ];
}

/** Change of accuracy by class in the chosen layer. */
function ablationByClass() {
  const layer = REPORT.layers[state.layer];
  const title = `Which classes need which expert of ${layer.name}`;
  const values = table(layer.ablation_by_class ?? null);
  if (!layer.ablation || !values?.some(Boolean)) return missing(title, withoutClasses("ablation_by_class"));
  const order = layer.class_log_ratio ? table(layer.class_log_ratio.order) : range(REPORT.classes.length);
  const shown = values.map((row) => order.map((index) => row?.[index] ?? null));
  const most = Math.max(0.01, largest(shown.flat().map((value) => (isNumber(value) ? Math.abs(value) : 0))));
  return figure(
    title,
    `Change of each class's accuracy when an expert is taken away: orange is lost, blue gained. Single cells rest on few images: trust rows and columns more than cells. ${analysed("cause_images")}.`,
    matrix({
      values: shown,
      print: (value) => number(100 * value, 1),
      colour: (value) => diverging(value / most),
      rows: { experts: layer.ablation.map((row) => row.expert) },
      columns: { names: order.map(className) },
      width: viewWidth(),
      widest: 64,
      label: title,
      lines: (row, column) => [
        `without expert ${layer.ablation[row].expert}, ${className(order[column])}`,
        `accuracy ${points(shown[row][column])}`,
      ],
    }),
    colourBar((value) => diverging(value / most), -most, most, points),
  );
}

function capacityFigure() {
  const rows = REPORT.capacity ?? [];
  const title = "Accuracy against capacity";
  if (!rows.length)
    return missing(title, "Not measured: these routers have no capacity to change, or it was not asked for.");
  const series = [false, true]
    .map((priority) => ({
      name: priority ? "batch prioritized" : "vanilla (in the order of tokens)",
      rows: rows.filter((row) => row.priority === priority),
    }))
    .filter((each) => each.rows.length);
  const factors = [...new Set(rows.map((row) => row.factor))].filter(isNumber).sort((a, b) => a - b);
  // Factor null drops nothing; it stands one step behind the largest.
  const beyond = factors.length ? Math.log2(factors.at(-1)) + 1 : 0;
  const place = (row) => (isNumber(row.factor) ? Math.log2(row.factor) : beyond);
  const nameOf = (factor) => (isNumber(factor) ? `${factor}` : "inf");
  const ticks = [...factors.map(Math.log2), ...(rows.some((row) => !isNumber(row.factor)) ? [beyond] : [])];
  const x = () => ({
    low: ticks[0],
    high: ticks.at(-1),
    ticks,
    text: (value) => (value === beyond ? "inf" : `${Number((2 ** value).toFixed(3))}`),
  });
  const draw = (field, yLabel, width, own) => {
    const plot = frame({
      width,
      height: 260,
      x: x(),
      y: { ...own, scale: 100 },
      xLabel: "capacity factor (logarithmic)",
      yLabel,
    });
    series.forEach((each, index) => {
      const sorted = each.rows.toSorted((a, b) => place(a) - place(b));
      const across = (row) => plot.across(place(row));
      line(
        plot,
        sorted.map((row) => [across(row), row[field]]),
        index,
      );
      sorted.forEach((row) =>
        dot(
          plot,
          across(row),
          field === "accuracy" ? { value: row.accuracy, low: row.low, high: row.high } : { value: row.dropped },
          [
            `capacity factor ${nameOf(row.factor)}, ${each.name}`,
            `accuracy ${withInterval({ ...row, value: row.accuracy }, percent)}`,
            `${percent(row.dropped)} of choices dropped`,
          ],
          index,
        ),
      );
    });
    return make("figure", {}, finish(plot, `${yLabel} against capacity factor`));
  };
  const accuracies = rows.flatMap((row) => [row.accuracy, row.low, row.high]).filter(isNumber);
  const least = smallest(accuracies);
  return figure(
    title,
    `Capacity factor: slots of an expert over its fair share of choices; what finds no slot is dropped. Batch prioritized routing drops the tokens with the smallest gates. Lines: 95 % intervals. ${analysed("cause_images")}.`,
    keys(series.map((each) => each.name)),
    sideBySide(
      [
        ["accuracy", "accuracy, %", { low: least, high: Math.max(least + 0.02, largest(accuracies)) }],
        ["dropped", "dropped choices, %", span(rows.map((row) => row.dropped))],
      ],
      400,
      ([field, label, own], width) => draw(field, label, width, own),
    ),
  );
}

function causesView() {
  const classes = live(ablationByClass);
  return [
    make("h2", {}, "Does routing matter for the answer?"),
    ablationFigure(),
    layerPicker(classes.refresh),
    classes.node,
    capacityFigure(),
  ];
}
