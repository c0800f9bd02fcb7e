// The view of specialisation. Nothing is claimed where routing at random would do as well.

/** The properties that any layer was measured for, in the order of the report. */
const properties = () =>
  [...new Set(REPORT.layers.flatMap((layer) => Object.keys(layer.specialisation ?? {})))].filter(
    (property) => !isWhole || property !== "position",
  );

/** What the numbers allow to say about one property. */
function claim(property) {
  const measured = range(REPORT.layers.length).filter((layer) => REPORT.layers[layer].specialisation?.[property]);
  const beaten = measured.filter((layer) => REPORT.layers[layer].specialisation[property].beats_null);
  if (!beaten.length) return `${property}: no layer beats its null, so nothing is claimed.`;
  const best = beaten.reduce((a, b) =>
    REPORT.layers[b].specialisation[property].nmi > REPORT.layers[a].specialisation[property].nmi ? b : a,
  );
  const { nmi } = REPORT.layers[best].specialisation[property];
  return `${property}: beats its null in ${beaten.length} of ${plural(measured.length, "layer")}; strongest in ${layerNames[best]} (NMI ${brief(nmi)}).`;
}

/** NMI with one property by layer, with its bootstrap interval, over the band of the null. */
function nmiPlot(property, width) {
  const found = REPORT.layers.map((layer) => layer.specialisation?.[property] ?? null);
  const all = found.filter(Boolean).flatMap((each) => [each.nmi, each.low, each.high, each.null_high]);
  const plot = frame({
    width,
    height: 220,
    x: { labels: shortNames },
    y: span(all, 0, 0.002),
    xLabel: layerAxis,
    yLabel: `NMI of expert and ${property} (0 to 1)`,
  });
  const half = Math.max(3, Math.min(22, plot.step * 0.42));
  found.forEach((each, layer) => {
    if (!each) return;
    const x = plot.across(layer);
    const base = plot.up(0);
    plot.svg.append(
      shape("rect", {
        x: x - half,
        width: 2 * half,
        y: plot.up(each.null_high),
        height: Math.max(1, base - plot.up(each.null_high)),
        fill: "var(--band)",
      }),
    );
    if (isNumber(each.null_mean))
      plot.svg.append(
        shape("line", {
          class: "axis",
          x1: x - half,
          x2: x + half,
          y1: plot.up(each.null_mean),
          y2: plot.up(each.null_mean),
        }),
      );
  });
  found.forEach(
    (each, layer) =>
      each &&
      dot(
        plot,
        plot.across(layer),
        { value: each.nmi, low: each.low, high: each.high },
        [
          `${layerNames[layer]}, ${property}`,
          `NMI ${withInterval({ ...each, value: each.nmi }, (value) => number(value, 4))}`,
          `null ${number(each.null_mean, 4)}, 95 % of it below ${number(each.null_high, 4)}`,
          `p = ${number(each.p, 4)}: ${each.beats_null ? "beats its null" : "does not beat its null"}`,
        ],
        each.beats_null ? 0 : 3,
      ),
  );
  return make(
    "figure",
    { "data-property": property },
    make("h4", {}, claim(property)),
    finish(plot, `Normalised mutual information of expert and ${property}, by layer`),
  );
}

function nmiKeys() {
  const key = (series, text) =>
    make("span", {}, shape("svg", { width: 14, height: 14, "aria-hidden": "true" }, symbol(7, 7, series, 5)), text);
  const band = make(
    "span",
    {},
    shape(
      "svg",
      { width: 22, height: 14, "aria-hidden": "true" },
      shape("rect", { width: 22, height: 14, fill: "var(--band)" }),
      shape("line", { class: "axis", x1: 0, x2: 22, y1: 6, y2: 6 }),
    ),
    "null: shuffled routing, up to its 95 % point; the line is its mean",
  );
  return make("div", { class: "keys" }, key(0, "beats its null"), key(3, "does not"), band);
}

/** Log-ratios of experts and classes in the chosen layer, and of experts and what a patch shows where that is known. */
function preferences() {
  const layer = REPORT.layers[state.layer];
  return [
    layer.super_classes && superClassMatrix(layer),
    isLabelled &&
      (layer.class_log_ratio
        ? preferenceMatrix(layer, layer.class_log_ratio, "class", "classes", className)
        : missing("Which classes the experts take", withoutClasses("class_log_ratio"))),
    layer.patch_label_log_ratio &&
      preferenceMatrix(
        layer,
        layer.patch_label_log_ratio,
        "patch label",
        "patch labels",
        (index) => REPORT.patch_names[index],
      ),
  ];
}

/** The share of each super-class's images that each expert takes. */
function superClassMatrix(layer) {
  const { names, own, purity } = layer.super_classes;
  const values = table(layer.super_classes.shares);
  return figure(
    `Where the super-classes go in ${layer.name}: ${percent(own)} to their own expert`,
    `Share of the images of a super-class that each expert takes; a row sums to 100 %. Guidance gives the super-class of row n to the expert of column n, so a perfect router fills the diagonal. Purity ${percent(purity)}: the share of the choices whose image is of the super-class that its expert takes most. ${analysed()}.`,
    matrix({
      values,
      print: (value) => (value >= 0.005 ? number(100 * value, 0) : ""),
      colour: sequential,
      rows: { names },
      columns: { experts: range(values[0].length) },
      width: viewWidth(),
      widest: 44,
      narrowest: 24,
      label: `Super-classes by expert in ${layer.name}`,
      lines: (row, column) => [`${names[row]}, expert ${column}`, `${percent(values[row][column])} of its images`],
    }),
    colourBar(sequential, 0, 1, (value) => percent(value, 0), "of the super-class's images"),
  );
}

function preferenceMatrix(layer, ratios, property, many, nameOf) {
  const own = table(ratios.matrix);
  const order = table(ratios.order);
  const values = own.map((row) => order.map((index) => row[index]));
  const most = Math.min(
    3,
    Math.max(0.1, largest(values.flat().map((value) => (isNumber(value) ? Math.abs(value) : 0)))),
  );
  const link = layer.specialisation?.[property];
  const warning =
    !link?.beats_null &&
    `In this layer the link of expert and ${property} does not beat its null (shuffled routing): random routing would show such differences between cells too.`;
  return figure(
    `Which ${many} the experts of ${layer.name} take`,
    `ln [P(${property} | expert) / P(${property})]: 0 is no preference, blue more often, orange less often than among all ${UNITS}; similar ${many} stand beside each other. ${analysed()}${isWhole ? "" : `, ${count(patchesOf(layer))} patches`}.`,
    warning && make("p", { class: "bad warning" }, warning),
    matrix({
      values,
      print: number,
      colour: (value) => diverging(value / most),
      rows: { experts: range(values.length) },
      columns: { names: order.map(nameOf) },
      width: viewWidth(),
      widest: 64,
      label: `Log-ratio of ${many} by expert in ${layer.name}`,
      lines: (expert, column) => [
        `expert ${expert}, ${nameOf(order[column])}`,
        isNumber(values[expert][column])
          ? `log-ratio ${number(values[expert][column])}: ${times(Math.exp(values[expert][column]))} as often as among all ${UNITS}`
          : "never together",
      ],
    }),
    colourBar(
      (value) => diverging(value / most),
      -most,
      most,
      (value) => number(value, 1),
      "natural log; stronger preferences have the end's colour; grey: never together",
    ),
  );
}

function specialisationView() {
  const names = properties();
  const classes = live(preferences);
  return [
    make("h2", {}, "Do experts specialise, beyond chance?"),
    names.length
      ? figure(
          `What an expert says about ${isWhole ? "an image" : "a patch"}, against chance`,
          `Normalised mutual information (NMI) of ${isWhole ? "an image's expert" : "a patch's expert"} with ${isLabelled ? `${isWhole ? "the" : "its image's"} class and with ` : ""}the ${UNIT}'s own properties: 0 means that the expert says nothing about the property, 1 that it says all. The null is the NMI of routing that is shuffled between images, which is what chance gives. Lines are bootstrap 95 % intervals. Only a point above the grey band is a link. Each plot has its own scale. ${analysed()}.`,
          nmiKeys(),
          sideBySide(names, 330, (property, width) => nmiPlot(property, width), 560),
        )
      : missing(`Links of experts with properties of ${UNITS}`, "Not measured."),
    (isLabelled || REPORT.patch_names) && [layerPicker(classes.refresh), classes.node],
  ];
}
