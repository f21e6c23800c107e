// Tables that are sorted by the buttons in their heads.
const PAGE_ROWS = 25;
const LONG = 44; // letters: longer cells are broken into lines

function compareCells(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortableTable(title, columns, rows) {
  const numeric = columns.map((_, at) => rows.every((row) => row[at] === null || typeof row[at] === "number"));
  const body = element("tbody");
  let order = rows, shown = PAGE_ROWS;
  const fill = () => {
    body.replaceChildren(...order.slice(0, shown).map((row) => element("tr", {}, row.map((cell, at) =>
      text("td", written(cell), { class: numeric[at] ? "number" : String(cell).length > LONG ? "long" : "" })))));
    more.hidden = order.length <= shown;
    more.textContent = `Show all ${order.length} rows`;
  };
  const heads = columns.map((name, at) => {
    const button = text("button", name, { type: "button", on: { click: () => sort(at) } });
    return element("th", { scope: "col", ...(numeric[at] ? { class: "number" } : {}) }, button);
  });
  const sort = (at) => {
    // Numbers largest first, by magnitude's sign as it stands; text from A on.
    const current = heads[at].getAttribute("aria-sort");
    const down = current ? current === "ascending" : numeric[at];
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    const filled = rows.filter((row) => row[at] !== null), empty = rows.filter((row) => row[at] === null);
    filled.sort((a, b) => (down ? -1 : 1) * compareCells(a[at], b[at]));
    order = [...filled, ...empty];
    fill();
  };
  const more = element("button", { type: "button", on: { click: () => { shown = order.length; fill(); } } });
  fill();
  const table = element("table", {}, element("thead", {}, element("tr", {}, heads)), body);
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": title };
  return element("div", {}, element("div", scroll, table), more);
}

// The numbers of a figure, for those who cannot point at it.
function numbersOf(figure) {
  const details = element("details", {}, text("summary", "Numbers of this figure"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const names = fieldNames(figure.spec);
    for (const data of Object.values(figure.data)) {
      const kept = data.fields.map((name, at) => at).filter((at) => !HIDDEN_FIELDS.has(data.fields[at]) &&
        !data.fields[at].startsWith("_") && data.columns[at].some((cell) => cell !== null && cell !== ""));
      if (!kept.length || data.columns[0].length < 2) continue;
      // A line of many points is told once.
      const told = data.columns[0].map((_, row) => JSON.stringify(kept.map((at) => data.columns[at][row])));
      const rows = [...new Set(told)].map((row) => JSON.parse(row));
      details.append(sortableTable(figure.title, kept.map((at) => names[data.fields[at]] || data.fields[at]), rows));
    }
  }, { once: false });
  return details;
}
