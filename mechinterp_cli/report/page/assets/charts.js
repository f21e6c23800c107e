// Charts are drawn by Vega from the specification that the pictures were drawn from.
const HIDDEN_FIELDS = new Set(["state", "ink", "first", "last"]);
const FIELD_NAMES = { p: "adjusted p", kind: "", series: "" };
const ERRORS = 1; // Vega's level of what it writes to the console
const NARROW = 620; // pixels
const ACROSS = 180; // pixels of a legend's colours that lie below their panel
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
      const title = channel.title ?? channel.legend?.title;
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

// Black lines and letters become light ones; the black of cells that are NaN stays.
function forDark(spec) {
  const words = JSON.stringify(spec).replaceAll('"#444444"', '"#a9b0ba"');
  return JSON.parse(words.includes('"NaN"') ? words : words.replaceAll('"#000000"', '"#eceef1"'));
}

// In a narrow window panels stand below each other, and legends below their panel.
function fitted(spec, room) {
  if (room >= NARROW) return spec;
  const config = { ...spec.config, legend: { ...spec.config.legend, orient: "bottom", columns: 1 } };
  const below = JSON.stringify({ ...spec, config }).replaceAll(/"gradientLength":\d+/g, `"gradientLength":${ACROSS}`);
  return { ...JSON.parse(below), ...(spec.concat ? { columns: 1 } : {}) };
}

async function draw(holder, spec, datasets, label) {
  const rows = Object.values(datasets).reduce((sum, part) => sum + part.length, 0);
  const whole = { ...fitted(themed(spec), holder.parentElement?.clientWidth || innerWidth), datasets };
  const renderer = rows > MANY ? "canvas" : "svg";
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
  holder.dataset.drawn = "yes";
  return made;
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && entry.target.begin) {
      watcher.unobserve(entry.target);
      entry.target.begin();
    }
  }
}, { rootMargin: "400px" });

function chart(figure) {
  const datasets = Object.fromEntries(Object.entries(figure.data).map(([name, data]) => [name, rowsOf(data)]));
  const holder = element("div", { class: "chart waiting" });
  let made = null;
  const again = async () => {
    if (made) made.finalize();
    made = await draw(holder, figure.spec, datasets, figure.title);
  };
  holder.begin = () => { drawn.push(again); again(); };
  watcher.observe(holder);
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
