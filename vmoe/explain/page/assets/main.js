// The page: head, findings, tabs, footer; what is drawn again when the window or the theme changes.

const TABS = [
  { id: "images", name: "Images", view: imagesView },
  { id: "experts", name: "Experts", view: expertsView },
  { id: "load", name: "Load", view: loadView },
  { id: "specialisation", name: "Specialisation", view: specialisationView },
  { id: "structure", name: "Structure", view: structureView },
  ...(isLabelled ? [{ id: "causes", name: "Causes", view: causesView }] : []),
  { id: "compare", name: "Compare", view: compareView },
];

function drawHead() {
  document.getElementById("title").textContent = REPORT.title;
  const { accuracy, layers } = REPORT;
  const sizes = [...new Set(layers.map((layer) => layer.num_experts))].map(String);
  document.getElementById("summary").textContent = [
    accuracy && isNumber(accuracy.value) ? `${ACCURACY} ${withInterval(accuracy, percent)}` : "",
    `${plural(layers.length, "MoE layer")} of ${listed(sizes)} experts`,
    analysed(),
    isLabelled ? "" : "the images have no labels, so what needs them is left out: accuracy, classes, causes",
  ]
    .filter(Boolean)
    .join(" · ");
  drawFindings(false);
}

const isPhone = matchMedia("(max-width: 600px)"); // where four findings would fill the screen before the tabs
isPhone.addEventListener("change", () => drawFindings(false));

/** The findings; the first ones until all are asked for. */
function drawFindings(all) {
  const findings = REPORT.findings?.length ? REPORT.findings : ["No finding stands out from these numbers."];
  const first = isPhone.matches ? 1 : 4;
  const more = findings.length > first;
  const list = document.getElementById("findings");
  list.replaceChildren(
    ...findings.slice(0, all ? undefined : first).map((finding) => make("li", {}, finding)),
  );
  const button = document.getElementById("more-findings");
  button.hidden = !more;
  button.textContent = all ? "Show fewer" : `Show all ${findings.length}`;
  button.setAttribute("aria-expanded", `${all}`);
  button.onclick = () => drawFindings(!all);
}

function drawFooter() {
  const { checkpoint, data, split, seed, num_images: images, versions, command, pictures } = REPORT.provenance;
  const sizes =
    SAMPLE.width === SAMPLE.size[1]
      ? "at full size"
      : `at ${SAMPLE.width} × ${SAMPLE.height} of ${SAMPLE.size[1]} × ${SAMPLE.size[0]} pixels`;
  const gates = `, with the routing of ${count(SAMPLE.mapped)} of them: ${gatesHeld()}, in steps of 1/254 of their range`;
  const rows = [
    ["Checkpoint", make("code", {}, `${checkpoint}`)],
    ["Data", split ? `${data}, ${split} split` : data],
    ["Images analysed", count(images)],
    [
      "Embedded here",
      `${plural(SAMPLE.count, "picture")} ${sizes}${gates}. Large tables are rounded to 16 or 8 bits; exact numbers are in the data files beside this page.`,
    ],
    ...(pictures ? [["Pictures show", pictures]] : []),
    ["Seed", `${seed}`],
    [
      "Versions",
      Object.entries(versions ?? {})
        .map(([name, version]) => `${name} ${version}`)
        .join(", "),
    ],
    ["Command", make("code", {}, `${command}`)],
  ];
  document.getElementById("provenance").replaceChildren(
    make(
      "dl",
      {},
      rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
    ),
  );
}

function gatesHeld() {
  const cut = SAMPLE.tops.some((top, layer) => top < REPORT.layers[layer].num_experts);
  return cut ? `the ${largest(SAMPLE.tops)} largest gates of each ${UNIT}` : "all gates";
}

function drawTabs() {
  const list = document.getElementById("tabs");
  list.replaceChildren(
    ...TABS.map((tab) =>
      make(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${tab.id}`,
          "aria-controls": `panel-${tab.id}`,
          onclick: () => openTab(tab.id),
        },
        tab.name,
      ),
    ),
  );
  document
    .getElementById("views")
    .replaceChildren(
      ...TABS.map((tab) =>
        make("section", { role: "tabpanel", id: `panel-${tab.id}`, "aria-labelledby": `tab-${tab.id}`, hidden: true }),
      ),
    );
  list.addEventListener("keydown", (event) => {
    const at = TABS.findIndex((tab) => tab.id === state.tab);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    openTab(TABS[(next + TABS.length) % TABS.length].id);
    document.getElementById(`tab-${state.tab}`).focus();
  });
}

/** Shows a view; `jump` also brings its head into sight. */
function openTab(id, jump = false) {
  state.tab = id;
  for (const tab of TABS) {
    const button = document.getElementById(`tab-${tab.id}`);
    const panel = document.getElementById(`panel-${tab.id}`);
    button.setAttribute("aria-selected", `${tab.id === id}`);
    button.tabIndex = tab.id === id ? 0 : -1;
    panel.hidden = tab.id !== id;
    panel.replaceChildren();
  }
  history.replaceState(null, "", `#${id}`);
  redraw();
  document.getElementById(`tab-${id}`).scrollIntoView({ block: "nearest", inline: "nearest" });
  if (jump) document.getElementById("tabs").scrollIntoView();
}

function redraw() {
  hideTip();
  document.getElementById(`panel-${state.tab}`).replaceChildren(
    ...TABS.find((tab) => tab.id === state.tab)
      .view()
      .flat(Infinity)
      .filter(Boolean),
  );
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  state.theme = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = `Theme: ${theme}`;
  if (state.tab) redraw();
}

function start() {
  drawHead();
  drawFooter();
  drawTabs();
  setTheme("auto");
  document
    .getElementById("theme")
    .addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]));
  darkPreferred.addEventListener("change", () => state.theme === "auto" && redraw());
  let width = window.innerWidth;
  let waiting = null;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
  const wanted = window.location.hash.slice(1);
  loadPictures().then(() => {
    openTab(TABS.some((tab) => tab.id === wanted) ? wanted : "images");
    document.documentElement.dataset.ready = `${Math.round(performance.now())}`;
  });
}

start();
