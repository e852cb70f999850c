"use strict";
/* What every part of the page uses: the data, elements, numbers, colours, tables, charts. */
const D = JSON.parse(document.getElementById("data").textContent);
const state = { run: 0, off: new Set(), log: null, bytesLog: true, spectrumLog: true };
const charts = [];
let printing = false;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== "") node.append(child);
  }
  return node;
}
const escaped = (x) => String(x).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const isNumber = (x) => typeof x === "number";
const some = (list) => list.some(isNumber);
const sum = (list) => list.reduce((a, x) => a + (x || 0), 0);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const unique = (list) => [...new Set(list)];
const plural = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;

/* --- numbers --- */

/** As it is embedded: nothing is lost that the data holds. */
function exact(x) {
  if (!isNumber(x)) return "–";
  if (Number.isInteger(x)) return x.toLocaleString("en").replace(/,/g, "\u202f");
  return String(x);
}
function short(x, digits = 4) {
  if (!isNumber(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(Math.min(2, digits - 1)).replace(/\.?0*e\+?/, "e");
  return String(Number(x.toPrecision(digits)));
}
const percent = (x) => (isNumber(x) ? `${(100 * x).toFixed(1)} %` : "–");
function scaled(x, units, step) {
  if (!isNumber(x)) return "–";
  let i = 0;
  while (Math.abs(x) >= step * 0.9995 && i < units.length - 1) { x /= step; i += 1; }
  const digits = i === 0 || Math.abs(x) >= 100 ? 0 : 1;
  return `${x.toFixed(digits).replace(/\.0$/, "")}${units[i]}`;
}
const bytes = (x) => scaled(x, [" B", " KB", " MB", " GB", " TB"], 1000);
const count = (x) => scaled(x, ["", " K", " M", " G", " T"], 1000);
function seconds(x) {
  if (!isNumber(x)) return "–";
  if (x < 100) return `${short(x, 3)} s`;
  if (x < 6000) return `${(x / 60).toFixed(1)} min`;
  return `${(x / 3600).toFixed(1)} h`;
}
const value = (x, isPercent) => (isPercent ? percent(x) : short(x, 5));

/* --- colours and marks: every series has a colour, a dash and a symbol --- */

const DASHES = ["solid", [7, 4], [2, 3], [10, 3, 2, 3], [14, 4], [4, 2]];
const BOUND_DASHES = { 3: [9, 4] };
const SYMBOLS = ["circle", "rect", "triangle", "diamond", "roundRect", "pin"];
const PATHS = {
  circle: "M13 7a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", rect: "M13.5 3.5h7v7h-7z",
  triangle: "M17 2.5l4.5 8.5h-9z", diamond: "M17 2l5 5l-5 5l-5-5z",
  roundRect: "M15 3.5h4l1.5 1.5v4l-1.5 1.5h-4l-1.5-1.5v-4z", pin: "M17 12l-4-6a4 4 0 1 1 8 0z",
};
function theme() {
  const style = getComputedStyle(document.body);
  const get = (name) => style.getPropertyValue(name).trim();
  const colours = range(8).map((i) => get(`--c${i}`));
  return {
    text: get("--text"), soft: get("--soft"), line: get("--line"), grid: get("--grid"),
    page: get("--page"), quiet: get("--quiet"), colours,
    colour: (i) => colours[i % colours.length],
    dash: (i) => DASHES[i % DASHES.length],
    symbol: (i) => SYMBOLS[i % SYMBOLS.length],
    dark: !printing && matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches,
  };
}
/** A piece of the line as it is drawn: the legend that does not need colours. */
function swatch(i, kind = "line") {
  const dash = DASHES[i % DASHES.length];
  const node = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  node.setAttribute("viewBox", "0 0 34 14");
  node.setAttribute("class", "swatch");
  node.setAttribute("aria-hidden", "true");
  const colour = `var(--c${i % 8})`;
  const shapes = {
    line: [["M0 7H34", false], [PATHS[SYMBOLS[i % SYMBOLS.length]], true]], bound: [["M0 7H34", false]],
    open: [[PATHS.circle, false]], circle: [[PATHS.circle, true]], diamond: [[PATHS.diamond, true]],
    up: [[PATHS.triangle, true]], down: [["M17 11.5l4.5-8.5h-9z", true]],
  };
  for (const [d, fill] of shapes[kind]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    path.style.stroke = colour;
    path.style.strokeWidth = kind === "bound" ? "6" : "2";
    if (kind === "bound") path.style.opacity = "0.4";
    path.style.fill = fill ? colour : "none";
    const broken = kind === "bound" ? BOUND_DASHES[i] : kind === "line" && dash !== "solid" ? dash : null;
    if (!fill && broken) path.setAttribute("stroke-dasharray", broken.join(" "));
    node.append(path);
  }
  return node;
}

/** What marks mean, as text in the page: it wraps where a legend in a chart would cover data. */
function key(entries) {
  return el("div", { class: "controls key", "aria-hidden": "true" }, entries.map(([i, name, kind]) => el("span", {}, swatch(i, kind), name)));
}

/* --- tables --- */

/** A table that is built when it is first opened: `make` returns {head, rows}. */
function tableBehind(caption, make) {
  const summary = el("summary", {}, "Numbers as a table");
  summary.append(el("span", { class: "hidden" }, `: ${caption}`));
  const details = el("details", { class: "numbers" }, summary);
  details.addEventListener("toggle", () => {
    if (details.open && !details.querySelector("table")) details.append(scrolling(caption, make()));
  });
  return details;
}
function scrolling(caption, made) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table(caption, made));
}
function table(caption, { head, rows }) {
  const cell = (x, j) => {
    if (j === 0) return el("th", { scope: "row" }, isNumber(x) ? String(x) : x);
    if (isNumber(x) || x === null || x === undefined) return el("td", {}, exact(x));
    const long = typeof x === "string" && x.length > 40;
    return el("td", { class: long ? "text long" : "text" }, x);
  };
  const texts = head.map((_, j) => rows.length > 0 && typeof rows[0][j] === "string");
  return el("table", {},
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, head.map((x, j) => el("th", { scope: "col", class: texts[j] ? "text" : null }, String(x))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))));
}

/* --- charts --- */

/**
 * A figure: title, note, drawing, and its numbers behind it.
 * spec: {title, note, height | height(width), option(theme, width), table, tableCaption, id, wide, canvas}
 */
function figure(parent, spec) {
  const host = el("div", { class: "chart" });
  const caption = el("figcaption", {}, el("h3", {}, spec.title), spec.note ? el("span", { class: "soft" }, spec.note) : null);
  const node = el("figure", { class: spec.wide ? "wide" : null, id: spec.id || null }, caption, spec.controls || null, host);
  if (spec.table) node.append(tableBehind(spec.tableCaption || spec.title, spec.table));
  parent.append(node);
  charts.push({ spec, host, chart: null, width: 0 });
  return node;
}
function draw(item) {
  const width = Math.floor(item.host.clientWidth);
  if (!width) return;
  const t = theme();
  const option = item.spec.option(t, width);
  const height = typeof item.spec.height === "function" ? item.spec.height(width) : item.spec.height || 260;
  item.host.style.height = `${height}px`;
  if (!item.chart) {
    item.chart = echarts.init(item.host, null, { renderer: item.spec.canvas ? "canvas" : "svg", width, height });
  } else item.chart.resize({ width, height });
  item.width = width;
  const described = `${item.spec.title}. ${item.spec.note || ""} ${item.spec.table ? "The numbers are in the table below." : ""}`;
  item.chart.setOption({
    animation: false, backgroundColor: "transparent", darkMode: t.dark,
    textStyle: { color: t.text, fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 12 },
    aria: { enabled: true, label: { description: described }, decal: { show: Boolean(item.spec.decal) } },
    ...option,
  }, true);
}
function redraw() { charts.forEach(draw); }
/** Charts whose place has gone are given back before their successors are drawn. */
function sweep() {
  for (let i = charts.length - 1; i >= 0; i -= 1) {
    if (!charts[i].host.isConnected) {
      if (charts[i].chart) charts[i].chart.dispose();
      charts.splice(i, 1);
    }
  }
}
function tooltip(t, more) {
  return {
    confine: true, backgroundColor: t.page, borderColor: t.line, padding: [8, 12],
    textStyle: { color: t.text, fontSize: 12 }, ...more,
  };
}
function axis(t, more) {
  return {
    axisLine: { show: true, lineStyle: { color: t.line } }, axisTick: { show: false },
    axisLabel: { color: t.soft, hideOverlap: true, ...(more.axisLabel || {}) },
    splitLine: { show: more.lines !== false, lineStyle: { color: t.grid } },
    nameTextStyle: { color: t.soft }, nameLocation: "middle",
    ...Object.fromEntries(Object.entries(more).filter(([key]) => !["axisLabel", "lines"].includes(key))),
  };
}
const bottomName = { nameLocation: "middle", nameGap: 26 };

/** A select in a section's head that goes through the runs; all of them move together. */
function runSelect() {
  if (D.runs.length < 2) return null;
  const select = el("select", { class: "run-select", onchange: (e) => showRun(Number(e.target.value)) },
    D.runs.map((run, i) => el("option", { value: i, selected: i === state.run }, run.label)));
  return el("label", {}, el("span", { class: "soft" }, "Run"), select);
}
const perRun = [];
/** A part of the page that is built for the chosen run, and built anew for another. */
function forRun(parent, build) {
  const body = el("div", {});
  parent.append(body);
  const item = () => { body.replaceChildren(); build(D.runs[state.run], body); };
  perRun.push(item);
  item();
}
function showRun(i) {
  state.run = i;
  document.querySelectorAll("select.run-select").forEach((select) => { select.value = String(i); });
  perRun.forEach((build) => build());
  sweep();
  redraw();
}
function checkbox(text, checked, change, mark) {
  const input = el("input", { type: "checkbox", checked, onchange: (e) => { change(e.target.checked); redraw(); } });
  return el("label", { class: mark ? null : "tool" }, input, mark || null, el("span", {}, text));
}
