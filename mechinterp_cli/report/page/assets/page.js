// The page: every run's sections, and the comparison of several.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themeButton.textContent = theme === "dark" ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Use ${theme === "dark" ? "light" : "dark"} colours`);
  drawn.forEach((again) => again());
}

const themeButton = document.getElementById("theme");
themeButton.addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
const preferred = matchMedia("(prefers-color-scheme: dark)");
preferred.addEventListener("change", () => setTheme(preferred.matches ? "dark" : "light"));

function command([what, words]) {
  const copy = text("button", "Copy", { type: "button", "aria-label": `Copy: ${what}` });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(words);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Select it";
    }
  });
  return element("div", {}, text("p", what, { class: "faint" }), element("div", { class: "command" }, text("pre", words), copy));
}

function runElements(run, heading) {
  const parts = [
    text(heading, run.title),
    element("section", { "aria-label": "What was asked" }, facts(run.asked)),
    text("p", run.answer, { class: "answer" }),
    run.interval ? text("p", run.interval, { class: "faint" }) : null,
  ];
  if (run.warnings.length) {
    parts.push(element("section", { class: "warned" }, text("h2", "Warnings"),
      element("ul", { class: "warnings" }, run.warnings.map((words) => text("li", words)))));
  }
  if (run.figures.length) {
    parts.push(element("section", { class: "figures" }, text("h2", "Figures"), run.figures.map(figureElement)));
  }
  if (run.tables.length) {
    parts.push(element("section", { class: "results" }, text("h2", "Strongest results"), run.tables.map(tableElements)));
  }
  if (run.prompts) parts.push(promptBrowser(run.prompts, data.colours));
  parts.push(element("section", { class: "proof" }, text("h2", "Proof"),
    run.proof.length ? run.proof.map((words) => text("p", words)) : text("p", "No engine ran: there was nothing to prove.")));
  parts.push(element("section", { class: "repeat" }, text("h2", "How to repeat it"), run.repeat.map(command),
    facts(run.surroundings)));
  parts.push(element("section", { class: "config" }, text("h2", "Config as given"),
    run.overrides.length ? text("p", `Changed on the command line: ${run.overrides.join(", ")}`) : null,
    element("pre", { tabindex: "0", "aria-label": "Config" }, run.config)));
  return parts.filter((part) => part !== null);
}

function tableElements(table) {
  return [text("h3", table.title), sortableTable(table.title, table.columns, table.rows)];
}

// One run beside the first.
function pairElement(pair) {
  if (pair.reason) return element("section", {}, text("h2", pair.title), text("p", pair.reason, { class: "faint" }));
  return element("section", { class: "compared" }, text("h2", pair.title),
    pair.changes.length ? [text("h3", "What was not the same"), element("ul", {}, pair.changes.map((words) => text("li", words)))]
      : text("p", "Model, task, method and versions are the same."),
    tableElements(pair.tables[0]), figureElement(pair.figure), pair.tables.slice(1).map(tableElements));
}

// The runs in short; a table would have one narrow column of sentences.
function runsElement(runs) {
  return element("section", { class: "runs" }, runs.map((run, at) => element("div", {},
    text("h2", `Run ${at + 1}: ${run.title}`),
    facts([["directory", run.directory], ["model", Object.fromEntries(run.asked).model]]),
    text("p", run.answer, { class: "answer" }))));
}

function comparisonElements() {
  return [text("h1", data.title), runsElement(data.runs), ...data.comparison.pairs.map(pairElement)];
}

// A run among others: its sections are made when it is opened.
function folded(run, at) {
  const details = element("details", { class: "run" }, element("summary", {}, text("h2", `Run ${at + 1}: ${run.title}`)));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...runElements(run, "h3").slice(1));
  });
  return details;
}

document.body.append(tip);
setTheme(preferred.matches ? "dark" : "light");
if (data.comparison) main.append(...comparisonElements(), ...data.runs.map(folded));
else main.append(...runElements(data.runs[0], "h1"));
