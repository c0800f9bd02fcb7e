// Matrices as pictures: a cell a number; hover a cell or walk with the arrow keys to read it.

const LABEL = "12px system-ui, sans-serif";
const [NAMED, MOST_NAMED] = [17, 150]; // pixels that a column with a name needs, and as many columns at most

/**
 * A matrix.
 *
 * values: [rows][columns]; colour(value) -> CSS colour; rows, columns: {names, experts} where experts are drawn as chips;
 * lines(row, column) -> what a cell says; print(value) -> what is written in a cell that has room; label: the matrix in
 * words; width: what it may take.
 */
function matrix({
  values,
  colour,
  rows,
  columns,
  lines,
  print,
  label,
  width,
  tallest = 30,
  widest = 56,
  narrowest = columns.experts || columns.names.length > MOST_NAMED ? 4 : NAMED, // wider than the view, it scrolls
  rowLabel = "",
  columnLabel = "",
}) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.font = LABEL;
  const [down, across] = [values.length, values[0]?.length ?? 0];
  const textWidth = (side) =>
    side.experts ? 26 : Math.min(170, Math.max(16, ...side.names.map((name) => probe.measureText(name).width)));
  const left = textWidth(rows) + 8;
  const cellWidth = Math.max(narrowest, Math.min(widest, Math.floor((width - left - 10) / across)));
  const cellHeight = Math.max(down > 40 ? 9 : 13, Math.min(tallest, Math.floor(620 / down)));
  const upright = columns.experts || textWidth(columns) <= cellWidth - 4;
  const named = columns.experts || upright || cellWidth >= NAMED;
  const top = (columnLabel ? 18 : 0) + (!named ? 4 : upright ? 24 : Math.min(150, 0.75 * textWidth(columns) + 18));
  const overhang = named && !upright ? Math.min(110, 0.7 * textWidth(columns)) : 0;
  const { node, context } = canvas(left + across * cellWidth + overhang + 2, top + down * cellHeight + 2);
  node.style.width = `${left + across * cellWidth + overhang + 2}px`;
  node.style.height = `${top + down * cellHeight + 2}px`;
  const inset = cellWidth > 7 && cellHeight > 7 ? 1 : 0;
  const empty = paint("--raised");

  values.forEach((row, r) =>
    row.forEach((value, c) => {
      context.fillStyle = value === null ? empty : colour(value, r, c);
      context.fillRect(left + c * cellWidth, top + r * cellHeight, cellWidth - inset, cellHeight - inset);
    }),
  );
  context.font = "11.5px system-ui, sans-serif";
  const printed = print && cellHeight >= 18 ? values.flat().filter((value) => value !== null).map((value) => print(value)) : [];
  if (printed.length && cellWidth >= 6 + largest(printed.map((text) => context.measureText(text).width))) {
    context.textAlign = "center";
    context.textBaseline = "middle";
    values.forEach((row, r) =>
      row.forEach((value, c) => {
        if (value === null) return;
        context.fillStyle = inkOver(colour(value, r, c));
        context.fillText(print(value), left + (c + 0.5) * cellWidth - 0.5, top + (r + 0.5) * cellHeight);
      }),
    );
    context.textAlign = "left";
  }
  context.font = LABEL;
  context.fillStyle = paint("--muted");
  context.textBaseline = "middle";
  if (columnLabel) context.fillText(columnLabel, left, 8);
  context.textAlign = "right";
  range(down).forEach((r) => {
    if (rows.experts) miniChip(context, rows.experts[r], left - 28, top + r * cellHeight, 24, cellHeight - 1);
    else context.fillText(clipped(context, rows.names[r], 170), left - 6, top + (r + 0.5) * cellHeight);
  });
  if (named) {
    range(across).forEach((c) => {
      const middle = left + (c + 0.5) * cellWidth;
      if (columns.experts) {
        miniChip(context, columns.experts[c], left + c * cellWidth, top - 21, cellWidth - 1, 18);
        return;
      }
      context.fillStyle = paint("--muted");
      context.save();
      context.translate(middle, top - 8);
      if (!upright) context.rotate(-Math.PI / 4);
      context.textAlign = upright ? "center" : "left";
      context.fillText(clipped(context, columns.names[c], 150), 0, 0);
      context.restore();
    });
  }
  const boxed = make(
    "div",
    {
      class: "matrix",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "matrix",
      "aria-label": `${label}: ${plural(down, "row")}, ${plural(across, "column")}. Arrow keys walk through the cells.`,
    },
    node,
  );
  walk(boxed, { down, across, left, top, cellWidth, cellHeight, lines });
  return make("div", { class: "scroll" }, boxed, rowLabel && make("div", { class: "note" }, rowLabel));
}

/** Lets the pointer and the arrow keys read a matrix. */
function walk(boxed, { down, across, left, top, cellWidth, cellHeight, lines }) {
  let [row, column] = [-1, -1];
  const cursor = make("div", { class: "cursor", hidden: true });
  boxed.append(cursor);
  const place = () => {
    cursor.hidden = false;
    Object.assign(cursor.style, {
      left: `${left + column * cellWidth - 2}px`,
      top: `${top + row * cellHeight - 2}px`,
      width: `${cellWidth + 3}px`,
      height: `${cellHeight + 3}px`,
    });
  };
  const leave = () => {
    cursor.hidden = true;
    hideTip();
  };
  boxed.addEventListener("pointermove", (event) => {
    const box = boxed.getBoundingClientRect();
    const [c, r] = [
      Math.floor((event.clientX - box.x - left) / cellWidth),
      Math.floor((event.clientY - box.y - top) / cellHeight),
    ];
    if (c < 0 || r < 0 || c >= across || r >= down) {
      leave();
      return;
    }
    [row, column] = [r, c];
    place();
    showTip(lines(row, column), event.clientX, event.clientY);
  });
  boxed.addEventListener("pointerleave", leave);
  boxed.addEventListener("blur", leave);
  boxed.addEventListener("keydown", (event) => {
    const move = arrow(event.key);
    if (!move) {
      if (event.key === "Escape") leave();
      return;
    }
    event.preventDefault();
    row = Math.min(Math.max(row + move.rows, 0), down - 1);
    column = Math.min(Math.max(column + move.columns, 0), across - 1);
    place();
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    tipAt(cursor, lines(row, column));
  });
}

function miniChip(context, expert, x, y, width, height) {
  const colour = expertColour(expert);
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
  context.strokeStyle = paint("--edge");
  context.lineWidth = 1;
  context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  if (width < 15 || height < 8) return;
  context.save();
  context.fillStyle = inkOn(colour);
  context.font = `600 ${Math.min(12, height)}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(`${expert}`, x + width / 2, y + height / 2 + 0.5);
  context.restore();
}

function clipped(context, text, width) {
  let shown = text;
  while (shown.length > 1 && context.measureText(shown).width > width) shown = `${shown.slice(0, -2).trimEnd()}…`;
  return shown;
}

/** The colours of a matrix with the numbers they stand for. */
function colourBar(colour, low, high, text = number, note = "") {
  const { node, context } = canvas(160, 12);
  Object.assign(node.style, { width: "160px", height: "12px" });
  range(160).forEach((x) => {
    context.fillStyle = colour(low + (x / 159) * (high - low));
    context.fillRect(x, 0, 1, 12);
  });
  return make(
    "div",
    { class: "scale" },
    make("span", {}, text(low)),
    node,
    make("span", {}, text(high)),
    note && make("span", {}, note),
  );
}
