// Elements are made of text alone: nothing that stands in a run's tables is ever read as markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key, text);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const text = (tag, words, attributes = {}) => element(tag, attributes, String(words));

function facts(pairs) {
  return element("dl", { class: "facts" }, pairs.filter(([, words]) => words).map(([name, words]) => [
    text("dt", name), text("dd", words),
  ]));
}

// A number with as many digits as a reader needs.
function written(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

// Shown on one line: what is not seen is written as a sign.
const MARKS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "∅" };

let numbered = 0;
const freshId = (name) => `${name}-${(numbered += 1)}`;

// What stands below the pointer, or the focus.
const tip = element("div", { id: "tip", hidden: "" });

function showTip(pairs, x, y) {
  tip.replaceChildren(element("dl", {}, pairs.map(([name, words]) => [text("dt", name), text("dd", words)])));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
}

const hideTip = () => { tip.hidden = true; };
