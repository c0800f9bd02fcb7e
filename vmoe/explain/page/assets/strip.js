// The list of images to pick from, and what the model made of one.

const THUMBNAIL = 48;

// Of several classes per image a label is a list, in the order of the classes
const isRight = (image) => SAMPLE.label[image] !== null && `${SAMPLE.label[image]}` === `${SAMPLE.predicted[image]}`;

/** The images of the list: the page holds their routing, and they pass the filter. */
function listedImages() {
  const pass =
    { all: () => true, right: isRight, wrong: (image) => SAMPLE.label[image] !== null && !isRight(image) }[
      state.filter
    ] ?? ((image) => [SAMPLE.label[image]].flat().some((label) => `class ${label}` === state.filter));
  return range(SAMPLE.mapped).filter(pass);
}

function imageFilter(onPick) {
  const classes = [...new Set(SAMPLE.label.slice(0, SAMPLE.mapped).flat())]
    .filter((label) => label !== null)
    .sort((a, b) => a - b);
  const options = [
    { value: "all", name: "all" },
    { value: "right", name: "classified right" },
    { value: "wrong", name: "classified wrong" },
    ...classes.map((label) => ({ value: `class ${label}`, name: className(label) })),
  ];
  return picker("Images", options, state.filter, (value) => {
    state.filter = value;
    onPick();
  });
}

/** The list of images: a listbox that the arrow keys walk through. */
function imageStrip(onPick) {
  const shown = listedImages();
  const strip = make("div", { class: "strip", role: "listbox", "aria-label": "Images" });
  const options = shown.map((image) => {
    const option = thumbnail(image, THUMBNAIL, null, {
      role: "option",
      tabindex: image === state.image ? "0" : "-1",
      "aria-selected": `${image === state.image}`,
      class: SAMPLE.label[image] === null || isRight(image) ? "" : "wrong",
      "aria-label": verdictText(image),
    });
    option.addEventListener("click", () => pick(image));
    tipOn(option, () => [imageName(image), verdictText(image)]);
    return option;
  });
  if (options.length && !shown.includes(state.image)) options[0].tabIndex = 0;
  const pick = (image) => {
    state.image = image;
    options.forEach((option, index) => {
      option.setAttribute("aria-selected", `${shown[index] === image}`);
      option.tabIndex = shown[index] === image ? 0 : -1;
    });
    onPick();
  };
  strip.addEventListener("keydown", (event) => {
    const move = arrow(event.key);
    const at = options.indexOf(document.activeElement);
    if (!move || at < 0) return;
    event.preventDefault();
    const perRow = Math.max(1, Math.floor((strip.clientWidth - 8) / (THUMBNAIL + 4)));
    const next = Math.min(Math.max(at + move.columns + move.rows * perRow, 0), options.length - 1);
    options[next].focus();
    pick(shown[next]);
  });
  strip.append(...options);
  return shown.length ? strip : make("p", { class: "note" }, "No image of the sample passes this filter.");
}

/** An image by its file, or by its place in the data set. */
const imageName = (image) => SAMPLE.name?.[image] ?? `Image ${SAMPLE.number[image]}`;

/** A class, or several, by name. */
const namesOf = (label) => (Array.isArray(label) ? label.map(className).join(", ") || "no class" : className(label));

/** An image's class, where it is known, below a picture of it. */
const labelOf = (image) => (isLabelled ? namesOf(SAMPLE.label[image]) : null);

/** How sure the model is of its one class; nothing of several. */
const sureness = (image, before, after) =>
  REPORT.multi_label ? "" : `${before}${percent(SAMPLE.confidence[image], 0)}${after}`;

const verdictText = (image) =>
  [
    isLabelled && `true: ${labelOf(image)}`,
    `predicted: ${namesOf(SAMPLE.predicted[image])}${sureness(image, " (", ")")}`,
  ]
    .filter(Boolean)
    .join("; ");

function verdict() {
  const { image } = state;
  const known = SAMPLE.label[image] !== null;
  return make(
    "p",
    { class: "verdict" },
    `${imageName(image)} · `,
    isLabelled && [REPORT.multi_label ? "true classes " : "true class ", make("b", {}, labelOf(image)), " · "],
    "predicted ",
    make("b", {}, namesOf(SAMPLE.predicted[image])),
    `${sureness(image, " with ", "")} `,
    known && make("span", { class: isRight(image) ? "good" : "bad" }, isRight(image) ? "✓ right" : "✗ wrong"),
  );
}
