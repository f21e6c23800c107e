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
  const chartHolder = element("div", { class: "chart" });
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Map of this prompt" };
  const mapPart = element("div", {}, text("h3", "This prompt's own map"), element("div", scroll, chartHolder));
  section.append(about, pair, mapPart);
  let made = null, turn = 0;

  const show = async () => {
    const prompt = data.prompts[pick.selectedIndex], map = data.maps[which.selectedIndex];
    back.disabled = pick.selectedIndex === 0;
    next.disabled = pick.selectedIndex === data.prompts.length - 1;
    const cells = map ? cellsOf(map, prompt) : [];
    const largest = Math.max(0, ...cells.map((cell) => Math.abs(cell.value)));
    const strongest = strongestByPosition(cells);
    pair.replaceChildren(...prompt.streams.map((stream) => streamElement(stream, prompt, strongest, largest)));
    about.textContent = aboutText(map, strongest, largest);
    mapPart.hidden = !cells.length;
    const mine = (turn += 1);
    if (!cells.length) return;
    const spec = mapSpec(map, cells, largest, colours);
    const result = await draw(chartHolder, spec, { cells }, `Effects on prompt ${prompt.prompt}`);
    if (mine !== turn) result.finalize();
    else {
      if (made) made.finalize();
      made = result;
    }
  };
  drawn.push(() => show());
  show();
  return section;
}

function aboutText(map, strongest, largest) {
  if (!map || !largest) return "";
  if (!strongest.size) return `Values: ${map.quantity}.`;
  return `A token's colour: ${map.quantity}, the strongest over all rows of the map; ` +
    `blue above 0, red below; full colour is ${written(largest)}.`;
}

// Cells of the map that this prompt has, with labels of its own tokens.
function cellsOf(map, prompt) {
  const values = map.values[prompt.prompt] ?? [];
  const tokens = prompt.streams[0].tokens;
  return map.cells.flatMap(([row, column], at) => {
    const value = values[at];
    if (value === null || value === undefined) return [];
    const place = map.columns[column];
    const position = typeof place === "number";
    return [{
      row: map.rows[row], column: position ? `${place} ${tokens[place] ?? ""}` : place, value,
      _positions: position ? [place] : (prompt.spans[place] ?? []), _at: column,
    }];
  });
}

function strongestByPosition(cells) {
  const found = new Map();
  for (const cell of cells) {
    for (const position of cell._positions) {
      const known = found.get(position);
      if (!known || Math.abs(cell.value) > Math.abs(known.value)) found.set(position, cell);
    }
  }
  return found;
}

function streamElement(stream, prompt, strongest, largest) {
  const other = prompt.streams.find((one) => one !== stream);
  const words = stream.tokens.map((token, at) => {
    const cell = strongest.get(at);
    const share = cell && largest ? Math.abs(cell.value) / largest : 0;
    const kinds = [cell && cell.value < 0 ? "below" : "above", share > 0.8 ? "strong" : "",
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

function mapSpec(map, cells, largest, colours) {
  const half = (colours.length - 1) / 2;
  const range = map.signed ? colours : colours.slice(half);
  const domain = range.map((_, at) => (map.signed ? (at - half) / half : at / half) * (largest || 1));
  const columns = [...new Map([...cells].sort((a, b) => a._at - b._at).map((cell) => [cell.column, 0])).keys()];
  const short = columns.every((name) => name.length <= 3);
  const rows = map.rows.filter((row) => cells.some((cell) => cell.row === row)).reverse();
  return {
    data: { name: "cells" },
    width: { step: columns.length > 60 ? 8 : 26 },
    height: { step: rows.length > 40 ? 9 : 15 },
    mark: { type: "rect" },
    encoding: {
      x: { field: "column", type: "nominal", scale: { domain: columns }, title: map.axis,
        axis: { labelAngle: short ? 0 : -60, labelLimit: 150 } },
      y: { field: "row", type: "nominal", scale: { domain: rows }, title: map.side, axis: { labelLimit: 160 } },
      color: { field: "value", type: "quantitative", scale: { domain, range, interpolate: "rgb" },
        legend: { title: map.quantity, gradientLength: 90, format: ".2~g", titleLimit: 160 } },
    },
  };
}
