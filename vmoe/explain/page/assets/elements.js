// Elements of the page. What comes from data is always set as text or as an attribute, never parsed as HTML.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element: make("p", {class: "legend", onclick: f}, "text", child, ...). */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

/** A part of the page that can be built again: {node, refresh}. The keyboard stays on the control it was on. */
function live(build, attributes = {}) {
  const node = make("div", attributes);
  const controls = () => [...node.querySelectorAll("input, select, button, [tabindex]")];
  const refresh = () => {
    const at = controls().indexOf(document.activeElement);
    node.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
    if (at >= 0) controls()[at]?.focus({ preventScroll: true });
  };
  refresh();
  return { node, refresh };
}

/** A figure: its title says what is seen, its legend how to read it. */
function figure(title, legend, ...content) {
  return make(
    "figure",
    { class: "figure" },
    make("figcaption", {}, make("h3", {}, title)),
    make("p", { class: "legend" }, legend),
    ...content,
  );
}

/** A part of a figure, with a legend of its own. */
function subfigure(title, legend, ...content) {
  return make("figure", {}, make("h4", {}, title), make("p", { class: "legend" }, legend), ...content);
}

/** A table that scrolls where it is too wide; rows are elements. */
function scrollTable(headings, rows) {
  const head = headings.map((text) => make("th", {}, text));
  return make(
    "div",
    { class: "scroll" },
    make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)),
  );
}

/** What stands in the place of a figure without numbers. */
function missing(title, reason) {
  return make("figure", { class: "figure missing" }, make("h3", {}, title), make("p", { class: "note" }, reason));
}

let choiceCount = 0;

/** One of a few, as radio buttons in a row. Options: [{value, name, disabled}]. */
function choice(legend, options, current, onPick) {
  const name = `choice-${++choiceCount}`;
  return make(
    "fieldset",
    { class: "choice" },
    make("legend", {}, legend),
    options.map((option) =>
      make(
        "label",
        {},
        make("input", {
          type: "radio",
          name,
          value: option.value,
          checked: option.value === current,
          disabled: option.disabled,
          onchange: () => onPick(option.value),
        }),
        make("span", {}, option.name),
      ),
    ),
  );
}

/** One of many, as a drop-down list. */
function picker(label, options, current, onPick) {
  const select = make(
    "select",
    { onchange: () => onPick(options[select.selectedIndex].value) },
    options.map((option) => make("option", { selected: option.value === current }, option.name)),
  );
  return make("label", {}, label, " ", select);
}

function checkbox(label, checked, onChange) {
  const box = make("input", { type: "checkbox", checked, onchange: () => onChange(box.checked) });
  return make("label", {}, box, " ", label);
}

/** A canvas of so many CSS pixels, sharp on every screen, and its context. */
function canvas(width, height, attributes = {}) {
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  const node = make("canvas", { width: Math.round(width * ratio), height: Math.round(height * ratio), ...attributes });
  const context = node.getContext("2d");
  context.scale(ratio, ratio);
  return { node, context };
}
