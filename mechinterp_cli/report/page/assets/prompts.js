// One prompt at a time: clean and corrupt side by side, tokens coloured by effect, and the prompt's own map.
function promptBrowser(data, colours) {
  const section = element("section", { class: "prompts" }, text("h2", "Prompts"));
  if (data.note) section.append(text("p", data.note, { class: "faint" }));
  const pick = element("select", { "aria-label": "Prompt", on: { change: () => show() } },
    data.prompts.map((prompt, at) => text("option", `${prompt.prompt}: ${prompt.name}`, { value: at })));
  const step = (by) => {
    pick.selectedIndex = Math.max(0, Math.min(data.prompts.length - 1, pick.selectedIndex + by));
    show();
  };
  const back = text("button", "← Previous", { type: "button", on: { click: () => step(-1) } });
  const next = text("button", "Next →", { type: "button", on: { click: () => step(1) } });
  const which = element("select", { "aria-label": "Effects of", on: { change: () => show() } },
    data.maps.map((map, at) => text("option", map.title, { value: at })));
  section.append(element("div", { class: "controls" },
    element("label", {}, "Prompt", pick), back, next,
    data.maps.length > 1 ? element("label", {}, "Effects of", which) : null));
  const pair = element("div", { class: "pair" });
  const about = element("p", { class: "faint", "aria-live": "polite" });
  const chartHolder = element("div", { class: "chart waiting" });
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Map of this prompt" };
  const mapPart = element("div", {}, text("h3", "This prompt's own map"), element("div", scroll, chartHolder));
  section.append(about, pair, mapPart);
  let made = null, turn = 0, near = false, pending = null;

  const show = () => {
    const prompt = data.prompts[pick.selectedIndex], map = data.maps[which.selectedIndex];
    back.disabled = pick.selectedIndex === 0;
    next.disabled = pick.selectedIndex === data.prompts.length - 1;
    const cells = map ? cellsOf(map, prompt) : [];
    const scale = map ? scaleOf(map, cells) : null;
    const strongest = strongestByPosition(cells, scale);
    pair.replaceChildren(...prompt.streams.map((stream) => {
      const told = !map?.stream || map.stream === stream.name;
      return streamElement(stream, prompt, told ? strongest : new Map(), scale);
    }));
    about.textContent = map ? aboutText(map, prompt, cells, strongest, scale) : "";
    mapPart.hidden = !cells.length;
    turn += 1;
    pending = cells.length ? [mapSpec(map, cells, scale, colours), { cells }, `${map.title}: prompt ${prompt.prompt}`] : null;
    if (near) drawMap();
  };
  // Maps are drawn one after another; of several asked for at once the last alone.
  let last = Promise.resolve();
  const drawMap = () => {
    near = true;
    const mine = turn;
    last = last.then(async () => {
      if (mine !== turn || !pending) return;
      if (made) made.finalize();
      made = await draw(chartHolder, ...pending);
    });
    return last;
  };
  drawLater(chartHolder, drawMap);
  // The first prompt that has something to show.
  const first = data.prompts.findIndex((prompt) => data.maps.some((map) => map.values[prompt.prompt]));
  pick.selectedIndex = Math.max(0, first);
  show();
  return section;
}

function aboutText(map, prompt, cells, strongest, scale) {
  if (!cells.length) return map.absent;
  const told = map.about[prompt.prompt] ? `${map.about[prompt.prompt]} ` : "";
  const middle = written(scale.middle), far = `${written(scale.high)}${map.signed ? ` or ${written(scale.low)}` : ""}`;
  if (!strongest.size || !scale.half) return `${told}Values: ${map.quantity}.`;
  return `${told}A token's colour: ${map.quantity}, the ${scale.middle ? `farthest from ${middle}` : "strongest"} over ` +
    `all rows of the map; blue above ${middle}, red below; full colour is ${far}.`;
}

// Where the colours of a map begin and end, and what is white.
function scaleOf(map, cells) {
  if (map.scale) {
    const [low, middle, high] = map.scale;
    return { low, middle, high, half: high - middle };
  }
  const largest = Math.max(0, ...cells.map((cell) => Math.abs(cell.value)));
  return { low: map.signed ? -largest : 0, middle: 0, high: largest, half: largest };
}

// How full a cell's colour is, from 0 to 1.
const fullness = (value, scale) => (scale.half ? Math.min(1, Math.abs(value - scale.middle) / scale.half) : 0);

// Cells of the map that this prompt has, with labels of its own tokens.
function cellsOf(map, prompt) {
  const values = map.values[prompt.prompt] ?? [];
  const told = Object.entries(map.told[prompt.prompt] ?? {});
  const wrong = new Set(map.wrong[prompt.prompt] ?? []);
  const tokens = prompt.streams[0].tokens;
  const names = map.columns.map((place) => columnName(place, prompt.spans, tokens));
  return map.cells.flatMap(([row, column], at) => {
    const value = values[at];
    if (value === null || value === undefined) return [];
    const place = map.columns[column];
    const more = told.map(([name, cells]) => [name, map.words[name] ? map.words[name][cells[at]] : cells[at]]);
    return [{
      ...Object.fromEntries(more), row: map.rows[row], column: names[column], value,
      _positions: typeof place === "number" ? [place] : (prompt.spans[place] ?? []), _at: column, _wrong: wrong.has(at),
    }];
  });
}

// A position with its token, a span with its own.
function columnName(place, spans, tokens) {
  if (typeof place === "number") return `${place} ${tokens[place] ?? ""}`;
  const words = (spans[place] ?? []).map((position) => tokens[position] ?? "").join("");
  return words ? `${place}: ${words}` : place;
}

function strongestByPosition(cells, scale) {
  const found = new Map();
  for (const cell of cells) {
    for (const position of cell._positions) {
      const known = found.get(position);
      if (!known || fullness(cell.value, scale) > fullness(known.value, scale)) found.set(position, cell);
    }
  }
  return found;
}

function streamElement(stream, prompt, strongest, scale) {
  const other = prompt.streams.find((one) => one !== stream);
  const words = stream.tokens.map((token, at) => {
    const cell = strongest.get(at);
    const share = cell ? fullness(cell.value, scale) : 0;
    const kinds = [cell && cell.value < scale.middle ? "below" : "above", share > 0.8 ? "strong" : "",
      other && other.tokens[at] !== token ? "differs" : ""];
    const title = `position ${at}` + (cell ? `: ${written(cell.value)} (${cell.row})` : "");
    return text("span", token, { class: kinds.join(" ").trim(), style: { "--share": share.toFixed(2) }, title });
  });
  const answers = [["answer", stream.answer], ["wrong answer", stream.wrong], ["label", stream.label]];
  return element("div", { class: "stream", "data-stream": stream.name },
    text("h3", stream.name),
    element("p", { class: "tokens" }, words.flatMap((word) => [word, element("wbr")])),
    facts(answers));
}

function mapSpec(map, cells, scale, colours) {
  const half = (colours.length - 1) / 2;
  const range = map.signed ? colours : colours.slice(half);
  const share = (at) => (map.signed ? (at - half) / half : at / half);
  const domain = range.map((_, at) => scale.middle + share(at) * (scale.half || 1));
  const columns = [...new Map([...cells].sort((a, b) => a._at - b._at).map((cell) => [cell.column, 0])).keys()];
  const short = columns.every((name) => name.length <= 3);
  const rows = map.rows.filter((row) => cells.some((cell) => cell.row === row)).reverse();
  return {
    data: { name: "cells" },
    width: { step: columns.length > 60 ? 8 : columns.length > 6 ? 26 : 46 },
    height: { step: rows.length > 40 ? 9 : rows.length > 6 ? 15 : 26 },
    ...(cells.length < rows.length * columns.length ? { view: { fill: isDark() ? "#2b2f36" : "#e9e9e9" } } : {}),
    encoding: {
      x: { field: "column", type: "nominal", scale: { domain: columns }, title: map.axis || null,
        axis: { labelAngle: short ? 0 : -60, labelLimit: 150 } },
      y: { field: "row", type: "nominal", scale: { domain: rows }, title: map.side || null, axis: { labelLimit: 160 } },
    },
    layer: [{
      mark: { type: "rect" },
      encoding: {
        color: { field: "value", type: "quantitative", scale: { domain, range, interpolate: "rgb", clamp: true },
          legend: { title: broken(map.quantity), orient: "top", gradientLength: 160, format: ".2~g", titleLimit: 0 } },
      },
    }, ...(cells.some((cell) => cell._wrong) ? [WRONG] : [])],
  };
}

// Words in lines of some letters each, as legends do not break them.
function broken(words, letters = 40) {
  const lines = [""];
  for (const word of words.split(" ")) {
    const line = lines[lines.length - 1];
    if (line && line.length + 1 + word.length > letters) lines.push(word);
    else lines[lines.length - 1] = line ? `${line} ${word}` : word;
  }
  return lines;
}

// What is wrong is told by a sign, not by its colour alone.
const WRONG = {
  transform: [{ filter: "datum._wrong" }],
  mark: { type: "text", text: "×", fontSize: 11, fontWeight: "bold", color: "#1b1b1b", tooltip: null },
};
