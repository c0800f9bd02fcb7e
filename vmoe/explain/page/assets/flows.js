// Flows of patches between the experts of successive layers, as ribbons.

const FINEST = 0.002; // share of patches; thinner ribbons are left out

/** Ribbons through all layers: flows are REPORT.flows, shares of patches by first choice. */
function sankey(flows, width) {
  const height = 340;
  const step = Math.max(150, Math.min(560, (width - 60) / flows.length));
  const [bar, top, gap] = [16, 26, 3];
  const whole = 30 + flows.length * step + 30;
  const svg = shape("svg", { width: whole, height, viewBox: `0 0 ${whole} ${height}`, style: { maxWidth: "none" } });
  const plot = { svg, marks: [] };
  const layers = [...flows.map((flow) => flow.from), flows.at(-1).to];
  const tablesOf = flows.map((flow) => table(flow.matrix));
  const columns = layers.map((layer, index) => {
    const shares =
      index < flows.length
        ? tablesOf[index].map(sum)
        : range(tablesOf.at(-1)[0].length).map((expert) => sum(tablesOf.at(-1).map((row) => row[expert])));
    const room = height - top - 8 - gap * (shares.length - 1);
    let y = top;
    return {
      layer,
      x: 20 + index * step,
      room,
      nodes: shares.map((share) => {
        const node = { share, y, out: y, into: y };
        y += share * room + gap;
        return node;
      }),
    };
  });
  const ribbons = shape("g");
  svg.append(ribbons);
  flows.forEach((flow, index) => drawFlow(plot, ribbons, tablesOf[index], columns[index], columns[index + 1], bar));
  columns.forEach((column) => drawColumn(svg, column, bar, top));
  const named = layers.map((layer) => layerNames[layer]).join(" to ");
  return make("div", { class: "scroll" }, finish(plot, `Flows of ${UNITS} through ${named}`));
}

function drawFlow(plot, group, shares, source, target, bar) {
  shares.forEach((row, from) =>
    row.forEach((share, to) => {
      const [start, end] = [source.nodes[from], target.nodes[to]];
      const [y0, y1] = [start.out, end.into];
      const [thick0, thick1] = [share * source.room, share * target.room];
      start.out += thick0;
      end.into += thick1;
      if (share < FINEST) return;
      const [x0, x1] = [source.x + bar, target.x];
      const middle = (x0 + x1) / 2;
      const ribbon = shape("path", {
        class: "ribbon",
        fill: expertColour(from),
        "fill-opacity": 0.45,
        d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}V${y1 + thick1}C${middle} ${y1 + thick1} ${middle} ${y0 + thick0} ${x0} ${y0 + thick0}Z`,
      });
      const lines = [
        `${layerNames[source.layer]} expert ${from} → ${layerNames[target.layer]} expert ${to}`,
        `${percent(share)} of all ${UNITS}`,
        `${percent(share / start.share)} of those of expert ${from}`,
        `${number(share / (start.share * end.share))} times what independent layers would give`,
      ];
      group.append(ribbon);
      plot.marks.push({ node: ribbon, lines });
      tipOn(ribbon, () => lines);
    }),
  );
}

function drawColumn(svg, column, bar, top) {
  svg.append(
    shape(
      "text",
      { class: "faint", x: column.x + bar / 2, y: top - 10, "text-anchor": "middle" },
      shortNames[column.layer],
    ),
  );
  column.nodes.forEach((node, expert) => {
    const tall = node.share * column.room;
    const rect = shape("rect", {
      class: "mark",
      x: column.x,
      y: node.y,
      width: bar,
      height: Math.max(0.5, tall),
      fill: expertColour(expert),
    });
    tipOn(rect, () => [
      `${layerNames[column.layer]}, expert ${expert}`,
      `first choice of ${percent(node.share)} of ${UNITS}`,
    ]);
    svg.append(rect);
    if (tall >= 11) {
      svg.append(
        shape(
          "text",
          {
            x: column.x + bar / 2,
            y: node.y + tall / 2 + 4,
            "text-anchor": "middle",
            style: { fill: inkOn(expertColour(expert)), fontSize: "11px", fontWeight: 600, pointerEvents: "none" },
          },
          `${expert}`,
        ),
      );
    }
  });
}

function flowsFigure() {
  const flows = REPORT.flows ?? [];
  const title = `Where the ${UNITS} of an expert go in the next layer`;
  if (!flows.length)
    return missing(
      title,
      REPORT.layers.length < 2
        ? "There is one MoE layer only."
        : "Not counted: successive layers have no patches in common.",
    );
  if (REPORT.shared_router)
    return missing(title, "The layers share one router: an image has the same experts in all of them.");
  const most = largest(REPORT.layers.map((layer) => layer.num_experts));
  if (most > 16 && state.flow === "sankey") state.flow = "matrix";
  const refresh = () => body.refresh();
  const body = live(() => [
    make(
      "div",
      { class: "bar" },
      choice(
        "As",
        [
          { value: "sankey", name: "ribbons", disabled: most > 16 },
          { value: "matrix", name: "matrix" },
        ],
        state.flow,
        (flow) => {
          state.flow = flow;
          refresh();
        },
      ),
      state.flow === "matrix" &&
        flows.length > 1 &&
        picker(
          "Between",
          flows.map((flow, index) => ({ value: index, name: `${layerNames[flow.from]} and ${layerNames[flow.to]}` })),
          Math.min(state.pair ?? 0, flows.length - 1),
          (pair) => {
            state.pair = pair;
            refresh();
          },
        ),
    ),
    state.flow === "sankey"
      ? chains(flows).map((chain) => sankey(chain, viewWidth()))
      : flowMatrix(flows[Math.min(state.pair ?? 0, flows.length - 1)]),
  ]);
  return figure(
    title,
    `${isWhole ? "Images" : "Patches"} by the expert of their first choice in successive layers${state.flow === "sankey" ? "; a ribbon has the colour of the expert it comes from and is as thick as its share of ${UNITS} (from 0.2 %)" : ""}. ${analysed()}.`,
    body.node,
  );
}

/** Flows that follow on each other, to be drawn in one row. */
function chains(flows) {
  const found = [];
  for (const flow of flows) {
    if (found.length && found.at(-1).at(-1).to === flow.from) found.at(-1).push(flow);
    else found.push([flow]);
  }
  return found;
}

function flowMatrix(flow) {
  const values = table(flow.matrix);
  const into = values[0].map((_, to) => sum(values.map((row) => row[to])));
  const lift = values.map((row) =>
    row.map((share, to) => (sum(row) * into[to] > 0 ? share / (sum(row) * into[to]) : null)),
  );
  const colour = (value) => diverging(value <= 0 ? -1 : Math.max(-1, Math.min(1, Math.log2(value) / 3)));
  return make(
    "div",
    {},
    matrix({
      values: lift,
      print: (value) => number(value, 1),
      colour,
      rows: { experts: range(values.length) },
      columns: { experts: range(into.length) },
      width: viewWidth(),
      tallest: 34,
      widest: 34,
      columnLabel: `expert in ${layerNames[flow.to]}`,
      rowLabel: `Rows: expert in ${layerNames[flow.from]}`,
      label: `Flows from ${layerNames[flow.from]} to ${layerNames[flow.to]}`,
      lines: (from, to) => [
        `${layerNames[flow.from]} expert ${from} → ${layerNames[flow.to]} expert ${to}`,
        `${percent(values[from][to], 2)} of all ${UNITS}`,
        isNumber(lift[from][to]) ? `${times(lift[from][to])} what independent layers would give` : `no such ${UNITS}`,
      ],
    }),
    colourBar(
      (t) => colour(2 ** t),
      -3,
      3,
      (t) => times(2 ** t),
      "of what independent layers would give",
    ),
  );
}
