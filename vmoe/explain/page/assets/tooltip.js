// What a mark says when it is pointed at or reached with the keyboard.

const tip = document.getElementById("tip");

/** Shows lines of text beside a point of the window. */
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, window.innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
}

function hideTip() {
  tip.hidden = true;
}

/** Says a line to screen readers. */
function announce(text) {
  document.getElementById("announcer").textContent = text;
}

function tipOn(node, lines) {
  node.addEventListener("pointermove", (event) => showTip(lines(), event.clientX, event.clientY));
  node.addEventListener("pointerleave", hideTip);
}

/** Shows a tip at the middle of an element and says it. */
function tipAt(node, lines) {
  const box = node.getBoundingClientRect();
  showTip(lines, box.x + box.width / 2, box.y + box.height / 2);
  announce(lines.join(". "));
}

/** How far an arrow key moves: {rows, columns}, or null for another key. */
function arrow(key) {
  return (
    {
      ArrowLeft: { rows: 0, columns: -1 },
      ArrowRight: { rows: 0, columns: 1 },
      ArrowUp: { rows: -1, columns: 0 },
      ArrowDown: { rows: 1, columns: 0 },
    }[key] ?? null
  );
}

// Not on "scroll": the arrow keys scroll too, to what they show.
for (const moved of ["wheel", "touchmove"]) window.addEventListener(moved, hideTip, { passive: true });
