// Charts are drawn by Vega from the specification that the pictures were drawn from.
const HIDDEN_FIELDS = new Set(["state", "ink", "first", "last"]);
const FIELD_NAMES = { p: "adjusted p", kind: "", series: "" };
const ERRORS = 1; // Vega's level of what it writes to the console
const NARROW = 620; // pixels
const ACROSS = 180; // pixels of a legend's colours that lie below their panel
const BELOW = { bottom: { anchor: "start", direction: "vertical", margin: 6 } }; // several legends below a panel
const MANY = 3000; // marks: from here on a canvas is quicker than elements
const drawn = []; // functions that draw again, for another theme

function rowsOf(data) {
  const count = data.columns.length ? data.columns[0].length : 0;
  return Array.from({ length: count }, (_, at) => {
    const row = {};
    data.fields.forEach((field, column) => {
      if (data.columns[column][at] !== null) row[field] = data.columns[column][at];
    });
    return row;
  });
}

// What the fields of a figure are called: as its axes and legends say.
function fieldNames(spec) {
  const found = { ...FIELD_NAMES };
  const visit = (part) => {
    if (!part || typeof part !== "object") return;
    for (const channel of Object.values(part.encoding ?? {})) {
      const given = channel.title ?? channel.legend?.title;
      const title = Array.isArray(given) ? given.join(" ") : given;
      if (channel.field && typeof title === "string") found[channel.field] ??= title;
    }
    for (const key of ["layer", "concat", "hconcat", "vconcat"]) (part[key] ?? []).forEach(visit);
  };
  visit(spec);
  return found;
}

function tipPairs(datum, names) {
  return Object.entries(datum)
    .filter(([name, value]) => !name.startsWith("_") && !HIDDEN_FIELDS.has(name) && value !== "" && value !== null)
    .map(([name, value]) => [names[name] ?? name, written(value)]);
}

function tooltipOf(names) {
  return (handler, event, item, datum) => {
    const pairs = datum && typeof datum === "object" ? tipPairs(datum, names) : [];
    if (pairs.length) showTip(pairs, event.clientX, event.clientY);
    else hideTip();
  };
}

const isDark = () => document.documentElement.dataset.theme === "dark";

function themed(spec) {
  const ink = isDark() ? "#eceef1" : "#1b1b1b", faint = isDark() ? "#a9b0ba" : "#595959";
  const line = isDark() ? "#3a3f47" : "#e3e3e3";
  const given = spec.config ?? {};
  const config = {
    ...given,
    background: null,
    mark: { ...given.mark, tooltip: { content: "data" } },
    area: { ...given.area, tooltip: null },
    rule: { ...given.rule, tooltip: null },
    title: { ...given.title, color: ink, subtitleColor: faint },
    axis: { ...given.axis, labelColor: ink, titleColor: ink, domainColor: faint, tickColor: faint, gridColor: line },
    legend: { ...given.legend, labelColor: ink, titleColor: ink },
  };
  // The title stands in the page itself, where it can be selected and wraps.
  const { title, ...rest } = spec;
  return { ...(isDark() ? forDark(rest) : rest), config };
}

const LIGHTER = { "#444444": "#a9b0ba", "#000000": "#eceef1", "#2166ac": "#67a9cf", "#b2182b": "#ef8a62" };

// Black lines and letters become light ones, and the ends of the colours where these are of lines; the black of cells
// that are NaN stays, and so do the colours of maps, whose middle is white.
function forDark(spec) {
  const words = JSON.stringify(spec);
  const isMap = words.includes('"#d1e5f0"'), stays = isMap ? ["#2166ac", "#b2182b"] : [];
  if (words.includes('"NaN"')) stays.push("#000000");
  const changed = Object.keys(LIGHTER).filter((colour) => !stays.includes(colour));
  return JSON.parse(changed.reduce((told, colour) => told.replaceAll(`"${colour}"`, `"${LIGHTER[colour]}"`), words));
}

// In a narrow window panels stand below each other, and legends below their panel.
function fitted(spec, room) {
  if (room >= NARROW) return spec;
  const config = { ...spec.config, legend: { ...spec.config.legend, orient: "bottom", columns: 1, layout: BELOW } };
  const below = JSON.stringify({ ...spec, config }).replaceAll(/"gradientLength":\d+/g, `"gradientLength":${ACROSS}`);
  return { ...JSON.parse(below), ...(spec.concat ? { columns: 1 } : {}) };
}

// Expressions are interpreted here (the policy allows no other way), so what needs one for every cell is left out:
// labels that a canvas does not have, and the search for numbers that are none, which cells do not hold.
function quick(spec) {
  const config = { ...spec.config, aria: false, rect: { ...spec.config.rect, invalid: null } };
  return { ...spec, config };
}

async function draw(holder, spec, datasets, label) {
  const rows = Object.values(datasets).reduce((sum, part) => sum + part.length, 0);
  const many = rows > MANY;
  const shown = fitted(themed(spec), holder.parentElement?.clientWidth || innerWidth);
  const whole = { ...(many ? quick(shown) : shown), datasets };
  const renderer = many ? "canvas" : "svg";
  const tooltip = tooltipOf(fieldNames(spec));
  const options = { mode: "vega-lite", actions: false, ast: true, renderer, tooltip, logLevel: ERRORS };
  const place = element("div");
  const made = await vegaEmbed(place, whole, options);
  holder.replaceChildren(place);
  holder.classList.remove("waiting");
  const picture = holder.querySelector("svg, canvas");
  if (picture) {
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", label);
  }
  holder.dataset.drawn = Math.round(performance.now()); // milliseconds since the page was asked for
  return made;
}

// Charts are drawn one after another, those in the window first; what is near it waits until the page rests.
const waiting = new Set();
const NEAR = 400; // pixels
let drawing = false;
const rest = window.requestIdleCallback ?? ((callback) => setTimeout(callback, 50));
const frame = () => new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); setTimeout(done, 100); });

function isSeen(holder) {
  const box = holder.getBoundingClientRect();
  return box.bottom > 0 && box.top < innerHeight;
}

async function drawWaiting() {
  if (drawing) return;
  drawing = true;
  while (waiting.size) {
    await frame();
    const next = [...waiting].find(isSeen);
    if (!next) await new Promise((done) => rest(done));
    const holder = next ?? [...waiting].find(isSeen) ?? [...waiting][0];
    waiting.delete(holder);
    try {
      await holder.begin();
    } catch (problem) {
      console.error(problem);
      holder.replaceChildren(text("p", "This figure could not be drawn.", { class: "faint" }));
    }
  }
  drawing = false;
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      watcher.unobserve(entry.target);
      waiting.add(entry.target);
    }
  }
  drawWaiting();
}, { rootMargin: `${NEAR}px` });

// Have a holder's chart drawn when it comes near the window, and again for another theme.
function drawLater(holder, begin) {
  holder.begin = async () => {
    drawn.push(begin);
    await begin();
  };
  watcher.observe(holder);
}

function chart(figure) {
  const holder = element("div", { class: "chart waiting" });
  let made = null;
  drawLater(holder, async () => {
    const rows = Object.fromEntries(Object.entries(figure.data).map(([name, data]) => [name, rowsOf(data)]));
    if (made) made.finalize();
    made = await draw(holder, figure.spec, rows, figure.title);
  });
  return holder;
}

// Lines that were broken to the picture's width are joined again; what ends with a space was a line of its own.
function subtitles(spec) {
  const joined = [];
  let ended = true;
  for (const words of [spec.title?.subtitle ?? []].flat()) {
    if (ended) joined.push(words.trimEnd());
    else joined[joined.length - 1] += ` ${words.trimEnd()}`;
    ended = words.endsWith(" ");
  }
  return joined.map((words) => text("div", words));
}

function figureElement(figure) {
  const heading = text("h3", figure.title, { id: freshId("figure") });
  if (!figure.spec) {
    const words = `${figure.rows.toLocaleString("en")} points are too many for this page; figures/${figure.name} has them.`;
    return element("figure", { "data-figure": figure.name }, heading, text("p", words, { class: "faint" }));
  }
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": heading.id };
  return element("figure", { "data-figure": figure.name },
    heading,
    element("figcaption", { class: "faint" }, subtitles(figure.spec)),
    element("div", scroll, chart(figure)),
    numbersOf(figure));
}
