// The page: a picture, its answer, the layers and their controls.
"use strict";

const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const LARGEST_FACTOR = ABOUT.layers[0].num_experts / ABOUT.layers[0].top_k; // from which on nothing is dropped
const NAMED = 5;

const state = {
  session: null,
  picture: null, // {pixels, shown, name}
  before: null, // the answer of the model as it was trained
  now: null,
  off: [],
  factors: [],
  rank: 0,
};
let running = false;
let wanted = false;

/** All experts on, and the capacity factors that the layers have. */
const asTrained = () => ({
  off: ABOUT.layers.map((layer) => new Array(layer.num_experts).fill(false)),
  factors: ABOUT.layers.map((layer) => layer.capacity_factor),
});

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

/** Runs the model on what is set; what is set meanwhile is run next. */
async function update() {
  wanted = true;
  if (running || !state.session || !state.picture) return;
  running = true;
  try {
    while (wanted) {
      wanted = false;
      const { picture, off, factors } = state;
      const images = normalised(picture.pixels);
      if (!picture.before) picture.before = await runProgram(state.session, images, asTrained());
      state.now = await runProgram(state.session, images, { off, factors });
      state.before = picture.before;
      draw();
    }
  } catch (error) {
    say(`The model could not run here: ${error.message}`, true);
  } finally {
    running = false;
  }
}

function draw() {
  byId("picture").getContext("2d").drawImage(state.picture.shown, 0, 0, 320, 320);
  byId("answer").replaceChildren(...answerRows());
  ABOUT.layers.forEach((layer, index) => {
    const told = state.now.layers[index];
    const { taken, dropped } = counts(layer, told);
    drawMap(byId(`map-${index}`), state.picture.shown, layer, told, state.rank);
    byId(`note-${index}`).textContent = `${percent(dropped)} of its patches' choices dropped`;
    drawChips(index, taken);
  });
  drawCapacity();
  document.documentElement.dataset.runs = Number(document.documentElement.dataset.runs ?? 0) + 1;
}

/** The most probable class, or of several classes per picture all that reach their threshold, by index. */
function foundClasses(shares) {
  if (!ABOUT.thresholds) return [shares.indexOf(Math.max(...shares))];
  return shares.map((_, index) => index).filter((index) => shares[index] >= ABOUT.thresholds[index]);
}

const classText = (shares) =>
  foundClasses(shares)
    .map((index) => `${ABOUT.class_names[index]}, ${percent(shares[index])}`)
    .join("; ") || "no class";

function answerRows() {
  const [now, before] = [probabilities(state.now.logits), probabilities(state.before.logits)];
  const order = now.map((_, index) => index).sort((a, b) => now[b] - now[a]).slice(0, NAMED);
  const changed = `${foundClasses(now)}` !== `${foundClasses(before)}`;
  say(`${state.picture.name}: ${classText(now)}` + (changed ? `; as trained: ${classText(before)}` : ""));
  return order.map((index) =>
    make(
      "div",
      { class: "row" },
      make("span", {}, ABOUT.class_names[index]),
      make("span", {}, percent(now[index])),
      make(
        "div",
        { class: "track" },
        make("div", { class: "value", style: { width: `${100 * now[index]}%` } }),
        make("div", { class: "before", title: `as trained: ${percent(before[index])}`, style: { left: `${100 * before[index]}%` } }),
      ),
    ),
  );
}

function drawChips(index, taken) {
  const { off } = state;
  const left = off[index].filter((isOff) => !isOff).length;
  [...byId(`chips-${index}`).children].forEach((chip, expert) => {
    chip.setAttribute("aria-pressed", String(!off[index][expert]));
    chip.disabled = !off[index][expert] && left <= ABOUT.layers[index].top_k;
    chip.lastChild.textContent = `${expert}: ${taken[expert]}`;
  });
}

function drawCapacity() {
  const largest = Math.max(...state.factors);
  byId("capacity").value = Math.round((100 * largest) / LARGEST_FACTOR);
  const slots = ABOUT.layers.map((layer, index) =>
    Math.max(Math.ceil((state.factors[index] * layer.tokens * layer.top_k) / layer.num_experts - 1e-3), 1),
  );
  const alike = new Set(slots).size === 1 ? `${slots[0]}` : slots.join(", ");
  byId("capacity-text").textContent = `factor ${largest.toFixed(2)}: ${alike} slots per expert`;
}

function makeLayer(layer, index) {
  const chips = Array.from({ length: layer.num_experts }, (_, expert) =>
    make(
      "button",
      { class: "chip", type: "button", "aria-pressed": "true", title: `expert ${expert}`, onclick: () => toggle(index, expert) },
      make("i", { style: { background: colourOf(expert) } }),
      make("span", {}, `${expert}`),
    ),
  );
  return make(
    "div",
    { class: "layer" },
    make("h3", {}, layer.name),
    make("canvas", { id: `map-${index}`, width: MAP_SIZE, height: MAP_SIZE, role: "img", "aria-label": `experts of the patches in ${layer.name}` }),
    make("div", { class: "chips", id: `chips-${index}`, role: "group", "aria-label": `experts of ${layer.name}` }, chips),
    make("p", { class: "note", id: `note-${index}` }),
  );
}

function toggle(index, expert) {
  state.off[index][expert] = !state.off[index][expert];
  update();
}

/** Shows a picture from a file or a sample. */
async function openPicture(blob, name) {
  try {
    state.picture = { ...(await readPicture(blob, ABOUT.image_size)), name };
  } catch {
    say(`${name}: cannot be read as a picture here; choose another file`, true);
    return;
  }
  update();
}

async function openSample(sample) {
  const bytes = Uint8Array.from(atob(sample.content), (letter) => letter.charCodeAt(0));
  await openPicture(new Blob([bytes], { type: "image/jpeg" }), sample.name);
}

function listen() {
  const drop = byId("drop");
  const take = (files) => files.length && openPicture(files[0], files[0].name);
  byId("file").addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take([...event.dataTransfer.files]);
    });
  }
  byId("capacity").addEventListener("input", (event) => {
    state.factors = state.factors.map(() => (LARGEST_FACTOR * event.target.value) / 100);
    update();
  });
  byId("rank").addEventListener("change", (event) => {
    state.rank = Number(event.target.value);
    if (state.now) draw();
  });
  byId("reset").addEventListener("click", () => {
    Object.assign(state, asTrained());
    update();
  });
}

async function start() {
  Object.assign(state, asTrained());
  byId("summary").textContent = ABOUT.summary;
  byId("about").textContent = ABOUT.notes;
  const ranks = Array.from({ length: ABOUT.layers[0].top_k }, (_, rank) => make("option", { value: rank }, `choice ${rank + 1}`));
  byId("rank").replaceChildren(...ranks);
  byId("layers").replaceChildren(...ABOUT.layers.map(makeLayer));
  byId("samples").replaceChildren(
    ...ABOUT.samples.map((sample) =>
      make(
        "button",
        { type: "button", title: sample.name, onclick: () => openSample(sample) },
        make("img", { src: `data:image/jpeg;base64,${sample.content}`, alt: sample.name }),
      ),
    ),
  );
  drawCapacity();
  listen();
  try {
    state.session = await loadProgram();
  } catch (error) {
    say(`The model cannot be started in this browser: ${error.message}`, true);
    return;
  }
  say("Ready: drop a picture.");
  document.documentElement.dataset.ready = "yes";
  if (state.picture) update();
  else if (ABOUT.samples.length) openSample(ABOUT.samples[0]);
}

start();
