"use strict";
// The page is complete without this script but for images, charts and what can be clicked.
const page = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Storage that a browser may refuse, such as for files or in private windows.
function stored(storage, key, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function store(storage, key, value) {
  try {
    window[storage].setItem(key, JSON.stringify(value));
  } catch {
    // The page works without it.
  }
}

for (const image of all("img[data-image]")) image.src = page.images[image.dataset.image];

// --- commands

for (const button of all("button.copy")) {
  button.addEventListener("click", async () => {
    const text = find("code", button.parentElement);
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      // A page that is opened as a file may not write to the clipboard: select the text instead.
      getSelection().selectAllChildren(text);
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// --- tables: sort, filter, columns

function cellValue(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = (find("summary", cell) || cell).textContent.trim();
  return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
}

function compared(a, b) {
  if (a === "" || b === "") return (a === "") - (b === ""); // empty cells last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, head, ascending) {
  const column = head.cellIndex;
  const rows = all("tr", table.tBodies[0]).filter((row) => row.parentElement === table.tBodies[0]);
  const isEmpty = (row) => cellValue(row, column) === "";
  rows.sort((a, b) => (isEmpty(a) || isEmpty(b) ? isEmpty(a) - isEmpty(b)
    : (ascending ? 1 : -1) * compared(cellValue(a, column), cellValue(b, column))));
  table.tBodies[0].append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const button of all("table.sortable button.sort")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    sortBy(button.closest("table"), head, head.getAttribute("aria-sort") !== "ascending");
    keep();
  });
}

function applyFilter(input) {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const card = input.closest("section");
  const rows = all("table.sortable > tbody > tr", card);
  let count = 0;
  for (const row of rows) {
    const setting = all("td.setting", row);
    const cells = setting.length ? setting : [...row.cells].map((cell) => find("summary", cell) || cell);
    const text = cells.map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    count += row.hidden ? 0 : 1;
  }
  const status = find(".filtered", card);
  if (status) status.textContent = words.length ? `${count} of ${rows.length}` : "";
}

for (const input of all("input.filter")) {
  input.addEventListener("input", () => { applyFilter(input); keep(); });
}

function applyColumn(box) {
  for (const cell of all(`[data-column="${box.value}"]`, box.closest("section"))) {
    cell.classList.toggle("off", !box.checked);
  }
}

for (const box of all("input.column")) {
  box.addEventListener("change", () => { applyColumn(box); keep(); });
}

const sampleFilter = find("#sample-filter");

function applySampleFilter() {
  const words = sampleFilter.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const figure of all("figure[data-label]")) {
    figure.hidden = !words.every((word) => figure.dataset.label.toLowerCase().includes(word));
  }
}

if (sampleFilter) sampleFilter.addEventListener("input", () => { applySampleFilter(); keep(); });

// --- charts

const dark = matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line") };
  return {
    ...layout,
    template: undefined,
    paper_bgcolor: color("--card"),
    plot_bgcolor: color("--card"),
    font: { ...layout.font, color: color("--ink") },
    xaxis: { ...axis, ...layout.xaxis, automargin: true },
    yaxis: { ...axis, ...layout.yaxis, automargin: true },
  };
}

const settings = { responsive: true, displaylogo: false };

function drawCharts() {
  page.charts.forEach((chart, number) => {
    const target = find(`#chart${number}`);
    Plotly.react(target, chart.figure.data, themed(chart.figure.layout), settings);
    const select = find(`select.choice[data-chart="${number}"]`);
    if (select) Plotly.update(target, ...chart.choices[select.value]);
  });
  drawCurves();
}

for (const select of all("select.choice")) {
  select.addEventListener("change", () => {
    Plotly.update(find(`#chart${select.dataset.chart}`), ...page.charts[select.dataset.chart].choices[select.value]);
    keep();
  });
}

// An exponential mean, corrected for its start.
function smoothed(values, weight) {
  let total = 0, totalWeight = 0;
  return values.map((value) => {
    if (value === null) return null;
    total = weight * total + (1 - weight) * value;
    totalWeight = weight * totalWeight + (1 - weight);
    return total / totalWeight;
  });
}

const hiddenSettings = new Set();

function drawCurves() {
  const target = find("#curve");
  if (!target) return;
  const column = find("#curve-column").value;
  const noisy = column === "loss" || column === "grad_norm";
  find("#curve-smoothing").disabled = !noisy;
  const weight = noisy ? Number(find("#curve-smoothing").value) : 0;
  const shown = new Set();
  const traces = page.curves[column].map(([run, x, values]) => {
    const place = page.runs[run].setting;
    const first = !shown.has(place);
    shown.add(place);
    return {
      x, y: smoothed(values, weight), mode: x.length > 1 ? "lines" : "markers", name: page.labels[place],
      legendgroup: String(place), showlegend: first && page.labels.length > 1,
      visible: hiddenSettings.has(String(place)) ? "legendonly" : true,
      line: { color: page.colors[place % page.colors.length], width: 1.6,
        dash: ["solid", "dash", "dot"][Math.floor(place / page.colors.length) % 3] },
      hovertemplate: `${page.runs[run].name}: %{y:.5g} at step %{x}<extra></extra>`,
    };
  });
  Plotly.react(target, traces, themed({
    height: 440, margin: { l: 60, r: 20, t: 20, b: 50 }, font: { family: "system-ui, sans-serif", size: 13 },
    xaxis: { title: { text: "step" } },
    yaxis: { title: { text: column }, type: find("#curve-log").checked ? "log" : "linear" },
    legend: { orientation: "h", y: -0.22, yanchor: "top" },
  }), settings);
  if (target.dataset.ready) return;
  target.dataset.ready = "true";
  // Clicks in the legend hide and show settings, also after another column is chosen.
  target.on("plotly_restyle", ([change, indices]) => {
    if (change.visible === undefined) return;
    indices.forEach((index, number) => {
      const value = Array.isArray(change.visible) ? change.visible[number % change.visible.length] : change.visible;
      const group = target.data[index].legendgroup;
      if (value === "legendonly") hiddenSettings.add(group);
      else hiddenSettings.delete(group);
    });
    keep();
  });
}

for (const id of ["#curve-column", "#curve-smoothing", "#curve-log"]) {
  const input = find(id);
  if (input) input.addEventListener("input", () => { drawCurves(); keep(); });
}
dark.addEventListener("change", drawCharts);

// --- viewer of one sample

const viewer = find("#viewer");
const view = { block: 0, setting: 0, entry: 0, step: null };

function entries() {
  return page.samples[view.block].cells[view.setting];
}

function showView() {
  const block = page.samples[view.block];
  const entry = entries()[view.entry];
  const step = Math.min(view.step ?? entry.steps.length - 1, entry.steps.length - 1);
  find(".viewer-label").textContent = page.labels[view.setting];
  find(".viewer-prompt").textContent = `${block.prompt} (seed ${block.seed})`;
  const base = find(".viewer-base");
  base.parentElement.hidden = !block.base;
  if (block.base) base.src = page.images[block.base];
  const image = find(".viewer-image");
  image.src = page.images[entry.steps[step][1]];
  image.alt = `${page.labels[view.setting]}, step ${entry.steps[step][0]}`;
  find(".viewer-step").textContent = `step ${entry.steps[step][0]} (${step + 1} of ${entry.steps.length})`;
  const slider = find(".viewer-slider");
  slider.max = entry.steps.length - 1;
  slider.value = step;
  slider.disabled = entry.steps.length < 2;
  slider.setAttribute("aria-valuetext", `step ${entry.steps[step][0]}`);
  const select = find(".viewer-run");
  select.replaceChildren(...entries().map((other, number) => new Option(page.runs[other.run].seed || page.runs[other.run].name, number)));
  select.value = view.entry;
  find(".viewer-seeds").hidden = entries().length < 2;
}

function openView(button) {
  view.block = Number(button.dataset.block);
  view.setting = Number(button.dataset.setting);
  view.entry = Math.max(entries().findIndex((entry) => entry.run === Number(button.dataset.run)), 0);
  view.step = button.dataset.step === undefined ? null : Number(button.dataset.step);
  showView();
  viewer.showModal();
}

// Move to the next image: settings first, then prompts.
function moveView(by) {
  const count = page.labels.length, places = count * page.samples.length;
  let place = view.block * count + view.setting;
  do place = (place + by + places) % places; while (!page.samples[Math.floor(place / count)].cells[place % count].length);
  view.block = Math.floor(place / count);
  view.setting = place % count;
  view.entry = 0;
  showView();
}

for (const button of all("button.open")) button.addEventListener("click", () => openView(button));
find(".viewer-slider").addEventListener("input", (event) => { view.step = Number(event.target.value); showView(); });
find(".viewer-run").addEventListener("change", (event) => { view.entry = Number(event.target.value); showView(); });
find(".viewer-previous").addEventListener("click", () => moveView(-1));
find(".viewer-next").addEventListener("click", () => moveView(1));
find(".viewer-close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select")) return;
  if (event.key === "ArrowLeft") moveView(-1);
  if (event.key === "ArrowRight") moveView(1);
});

// --- blind comparison

const blind = { choices: [], pairs: [], pair: null };
const blindKey = `sdtune blind ${location.pathname} ${page.title}`;

// Pairs of the last images of two settings, for the same prompt, seed, training seed and step.
function blindPairs(a, b) {
  const pairs = [];
  const trained = (entry) => entry.steps.at(-1)[0] > 0;
  page.samples.forEach((block, number) => {
    for (const first of block.cells[a].filter(trained)) {
      const seed = page.runs[first.run].seed;
      const second = block.cells[b].filter(trained).find((entry) => page.runs[entry.run].seed === seed);
      if (second) pairs.push({ block: number, a, b, seed, images: [first.steps.at(-1)[1], second.steps.at(-1)[1]] });
    }
  });
  for (let i = pairs.length - 1; i > 0; i -= 1) {
    const j = Math.floor(Math.random() * (i + 1));
    [pairs[i], pairs[j]] = [pairs[j], pairs[i]];
  }
  return pairs;
}

function nextPair() {
  blind.pair = blind.pairs.pop() || null;
  find("#blind-stage").hidden = !blind.pair;
  if (!blind.pair) {
    showResult();
    return;
  }
  blind.pair.swapped = Math.random() < 0.5;
  const [left, right] = blind.pair.swapped ? [1, 0] : [0, 1];
  find("#blind-1 img").src = page.images[blind.pair.images[left]];
  find("#blind-2 img").src = page.images[blind.pair.images[right]];
  find("#blind-prompt").textContent = page.samples[blind.pair.block].prompt;
  find("#blind-result").textContent = `${blind.pairs.length + 1} left`;
}

function choose(number) {
  if (!blind.pair) return;
  const { block, a, b, seed, swapped } = blind.pair;
  const better = number === 0 ? "equal" : (number === 1) !== swapped ? page.labels[a] : page.labels[b];
  const { prompt, seed: sampleSeed } = page.samples[block];
  const choice = { first: page.labels[a], second: page.labels[b], prompt, seed: sampleSeed, training_seed: seed, better };
  // A pair counts once, however often it is judged.
  const pairOf = (other) => JSON.stringify([[other.first, other.second].sort(), other.prompt, other.seed, other.training_seed]);
  blind.choices = [...blind.choices.filter((other) => pairOf(other) !== pairOf(choice)), choice];
  store("localStorage", blindKey, blind.choices);
  nextPair();
}

// Wilson's interval at 95% of a share of n (Wilson 1927).
function wilson(wins, n) {
  const z = 1.959964, share = wins / n, scale = 1 + z * z / n;
  const middle = (share + z * z / (2 * n)) / scale;
  const half = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale;
  return [Math.max(middle - half, 0), Math.min(middle + half, 1)];
}

function showResult() {
  const a = page.labels[find("#blind-a").value], b = page.labels[find("#blind-b").value];
  const made = blind.choices.filter((choice) => [choice.first, choice.second].sort().join("\n") === [a, b].sort().join("\n"));
  const wins = made.filter((choice) => choice.better === a).length;
  const losses = made.filter((choice) => choice.better === b).length;
  let text = made.length ? `${a}: ${wins} wins. ${b}: ${losses} wins. Equal: ${made.length - wins - losses}.` : "No choices yet.";
  if (wins + losses) {
    const [low, high] = wilson(wins, wins + losses).map((share) => Math.round(100 * share));
    const clear = low > 50 || high < 50;
    text += ` ${a} wins ${Math.round(100 * wins / (wins + losses))}% (95% interval ${low}% to ${high}%): `
      + (clear ? "a clear difference." : "not clear, it could be chance.");
  }
  find("#blind-result").textContent = text;
  find("#blind-stage").hidden = true;
  find("#blind-save").hidden = find("#blind-clear").hidden = !blind.choices.length;
}

if (find("#blind-start")) {
  blind.choices = stored("localStorage", blindKey, []);
  find("#blind-save").hidden = find("#blind-clear").hidden = !blind.choices.length;
  find("#blind-start").addEventListener("click", () => {
    const [a, b] = ["#blind-a", "#blind-b"].map((id) => Number(find(id).value));
    blind.pairs = a === b ? [] : blindPairs(a, b);
    if (blind.pairs.length) {
      nextPair();
      return;
    }
    find("#blind-stage").hidden = true;
    find("#blind-result").textContent = a === b ? "Choose two different settings." : "These settings have no samples in common.";
  });
  for (const number of [0, 1, 2]) find(`#blind-${number}`).addEventListener("click", () => choose(number));
  find("#blind-stop").addEventListener("click", () => { blind.pair = null; blind.pairs = []; showResult(); });
  find("#blind-save").addEventListener("click", () => {
    const blob = new Blob([JSON.stringify(blind.choices, null, 2)], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = "choices.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  find("#blind-clear").addEventListener("click", () => {
    blind.choices = [];
    store("localStorage", blindKey, []);
    showResult();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (find("#blind-stage").hidden || event.target.matches("input, select") || viewer.open) return;
    if (["0", "1", "2"].includes(event.key)) choose(Number(event.key));
  });
}

// --- reload without losing the place

const placeKey = `sdtune place ${location.pathname}`;

const typed = { time: 0 };
document.addEventListener("input", () => { typed.time = Date.now(); });

// A name of an element that stays the same when runs, settings or metrics are added.
function nameOf(element) {
  if (element.id) return element.id;
  const section = element.closest("section, .answer");
  const heading = section && section.previousElementSibling ? section.previousElementSibling.textContent.trim().slice(0, 60) : "";
  const own = element.dataset.name || element.dataset.chart || (element.tagName === "DETAILS" ? find("summary", element).textContent : "")
    || element.textContent.trim().slice(0, 60);
  return [heading, element.tagName, element.className, own].join(" | ");
}

function valueOf(element) {
  if (element.type === "checkbox") return element.checked;
  return element.tagName === "SELECT" ? element.selectedOptions[0]?.textContent : element.value;
}

function setValue(element, value) {
  if (element.type === "checkbox") element.checked = value;
  else if (element.tagName !== "SELECT") element.value = value;
  else for (const option of element.options) if (option.textContent === value) element.value = option.value;
}

function keep() {
  if (!page.reload) return;
  const inputs = Object.fromEntries(all("main input, main select").map((input) => [nameOf(input), valueOf(input)]));
  const open = all("details[open]").map(nameOf);
  const sorts = Object.fromEntries(all("th[aria-sort]").map((head) => [nameOf(find("button", head)), head.getAttribute("aria-sort")]));
  const focused = document.activeElement && document.activeElement !== document.body ? nameOf(document.activeElement) : null;
  const hidden = [...hiddenSettings].map((group) => page.labels[group]);
  store("sessionStorage", placeKey, { inputs, open, sorts, focused, hidden, x: scrollX, y: scrollY });
}

function restore(place) {
  for (const input of all("main input, main select")) {
    const value = place.inputs[nameOf(input)];
    if (value !== undefined) setValue(input, value);
  }
  all("input.column").forEach(applyColumn);
  all("input.filter").forEach(applyFilter);
  if (sampleFilter) applySampleFilter();
  for (const element of all("details")) element.open = place.open.includes(nameOf(element));
  for (const button of all("button.sort")) {
    const order = place.sorts[nameOf(button)];
    if (order) sortBy(button.closest("table"), button.closest("th"), order === "ascending");
  }
  page.labels.forEach((label, number) => { if (place.hidden.includes(label)) hiddenSettings.add(String(number)); });
  const focused = all("a, button, input, select, summary, [tabindex]").find((element) => nameOf(element) === place.focused);
  if (focused) focused.focus({ preventScroll: true });
}

function reloadWhenIdle() {
  const comparing = find("#blind-stage") && !find("#blind-stage").hidden;
  const pausing = Date.now() - typed.time > 3000;
  if (viewer.open || comparing || !pausing || document.activeElement.tagName === "SELECT") {
    setTimeout(reloadWhenIdle, 1000);
    return;
  }
  keep();
  location.reload();
}

const place = page.reload ? stored("sessionStorage", placeKey, null) : null;
if (place) restore(place);
drawCharts();
if (page.reload) {
  history.scrollRestoration = "manual";
  if (place) scrollTo(place.x, place.y); // charts have their height now
  setTimeout(reloadWhenIdle, 1000 * page.reload);
}

// A tip of a column can be dismissed.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.activeElement.closest(".hint")) document.activeElement.blur();
});
