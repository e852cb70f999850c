/* The top of the page, the last sections, and what redraws it. */

function spanText(list) {
  const known = list.filter(isNumber);
  if (!known.length) return "–";
  const least = Math.min(...known), most = Math.max(...known);
  return least === most ? exact(least) : `${exact(least)} to ${exact(most)}`;
}
/** "64, 32, 2 × 16, 2 × 8, 4 × 4" */
function rankText(ranks) {
  const known = ranks.filter(isNumber);
  if (!known.length) return "–";
  const values = unique(known).sort((a, b) => b - a);
  if (values.length > 8) return spanText(known);
  return values.map((r) => { const n = known.filter((x) => x === r).length; return n > 1 ? `${n} × ${r}` : String(r); }).join(", ");
}
/** The leading measure of a series at its last round, with its deviation. */
function outcome(panel, x) {
  const c = x.curve, last = c.mean.length - 1;
  const sd = isNumber(c.sd[last]) ? ` ± ${value(c.sd[last], panel.percent).replace(" %", "")}` : "";
  return { last: value(c.mean[last], panel.percent).replace(" %", "") + sd + (panel.percent ? " %" : ""), first: c.rounds[0] === 0 && last > 0 ? value(c.mean[0], panel.percent) : null, round: c.rounds[last] };
}
function header(main) {
  const run = D.runs[0];
  const models = unique(D.runs.map((x) => x.model).filter(Boolean));
  const parameters = unique(D.runs.map((x) => x.parameters).filter(isNumber));
  const n = D.runs.length;
  main.append(
    el("p", { class: "kicker" }, `fedlora report · ${plural(n, "run")} · made ${D.made}`),
    el("h1", {}, D.title));
  const problems = D.runs.filter((x) => x.problems.length);
  const unfinished = D.runs.filter((x) => !x.finished).length;
  const done = spanText(D.runs.map((x) => x.done)), planned = unique(D.runs.map((x) => x.planned).filter(isNumber));
  const seeds = Math.max(...D.series.map((x) => x.runs.length));
  main.append(el("p", { class: "lead" }, [
    n > 1 ? `${plural(n, "run")} of ${plural(D.series.length, "configuration")}${seeds > 1 ? `, up to ${seeds} seeds each` : ""}. ` : "",
    run.clients.ids.length ? `${spanText(D.runs.map((x) => x.clients.ids.length).filter(Boolean))} clients` : "Clients not known",
    some(run.clients.ranks) ? ` of rank ${rankText(run.clients.ranks)}` : "",
    `, ${done}${planned.length === 1 ? ` of ${planned[0]}` : ""} rounds`,
    unfinished ? ` (${n > 1 ? `${unfinished} of ${n} runs` : "the run has"} not finished)` : "", "."].join("")));
  const facts = el("dl", { class: "facts" });
  const fact = (name, text, small, wide) => facts.append(el("div", { class: wide ? "wide" : null }, el("dt", {}, name), el("dd", {}, text, small ? el("small", {}, small) : null)));
  fact("Model", models.length === 1 ? models[0].replace(/\/+$/, "").split("/").pop() : `${models.length || "–"} models`,
    [run.architecture, parameters.length === 1 ? `${count(parameters[0])} parameters` : "", run.modules ? `${run.modules} layers adapted` : ""].filter(Boolean).join(", "));
  const methods = unique(D.runs.map((x) => x.method));
  fact(methods.length > 1 ? "Methods" : "Method", methods.join(", "), D.series.length > 1 && D.series.length !== methods.length ? plural(D.series.length, "configuration") : "");
  fact("Clients", run.clients.ids.length ? spanText(D.runs.map((x) => x.clients.ids.length).filter(Boolean)) : "–", some(run.clients.rows) ? `${spanText(run.clients.rows)} rows each, ${exact(sum(run.clients.rows))} in all` : "");
  fact("Ranks", rankText(run.clients.ranks), unique(D.runs.map((x) => rankText(x.clients.ranks))).length > 1 ? "of the first run; not alike in all" : "");
  if (D.panels.length) {
    const panel = D.panels[0];
    const lines = D.series.length > 1 ? panel.lines : panel.lines.slice(0, 1);
    const outcomes = lines.map((x) => outcome(panel, x));
    const bases = unique(outcomes.map((o) => o.first).filter(Boolean)), ends = unique(outcomes.map((o) => o.round));
    const list = lines.slice(0, 6).map((x, i) => el("div", { class: "outcome" }, D.series.length > 1 ? el("span", {}, x.label) : "", outcomes[i].last));
    list.push(el("small", {}, [ends.length === 1 ? `after round ${ends[0]}` : "in the last round", bases.length === 1 ? `, base ${bases[0]}` : ""].join("")));
    facts.append(el("div", { class: lines.length > 1 ? "wide" : null }, el("dt", {}, `${panel.title}, held-out rows`), el("dd", { class: "outcomes" }, list, lines.length > 6 ? el("small", {}, `and ${lines.length - 6} more below`) : null)));
  }
  const total = (way) => D.runs.map((x) => x.traffic[`total_${way}`]);
  const between = (list, f) => { const a = Math.min(...list), b = Math.max(...list); return f(a) === f(b) ? f(a) : `${f(a)} to ${f(b)}`; };
  const time = D.runs.map((x) => sum(Object.values(x.seconds).flat()));
  if (D.runs.some((x) => x.traffic.rounds.length)) {
    fact(n > 1 ? "Sent, by run" : "Sent", `${between(total("up"), bytes)} up`, `${between(total("down"), bytes)} down`);
    fact(n > 1 ? "Time, by run" : "Time", between(time, seconds), D.runs[0].environment.device ? `on ${D.runs[0].environment.device}${D.runs[0].environment.threads ? `, ${plural(Number(D.runs[0].environment.threads), "thread")}` : ""}` : "");
  }
  const data = el("div", {});
  main.append(el("h2", { class: "hidden" }, "What was run"), el("div", { class: "first" }, facts, data));
  dataFigure(data);
  if (problems.length) {
    const list = (x) => el("ul", {}, x.problems.map((p) => el("li", {}, p)));
    main.append(el("aside", { class: "notice", id: "missing", "aria-label": "What is missing", style: "margin-top:26px" }, el("strong", {}, "What is missing"),
      n === 1 ? list(problems[0]) : problems.length <= 3 ? problems.map((x) => [el("div", {}, x.label), list(x)]) : el("details", { class: "print-details" }, el("summary", {}, `${problems.length} of ${n} runs are not whole`), problems.map((x) => [el("div", {}, x.label), list(x)]))));
  }
}
function dataFigure(parent) {
  const select = runSelect();
  if (select) parent.append(el("div", { class: "controls" }, select));
  forRun(parent, (run, body) => {
    const c = run.clients;
    if (!some(c.rows)) { empty(body, "Rows per client are not known."); return; }
    const named = c.kinds.length > 0;
    // Counts may be of all rows that a client holds, its held-out ones among them.
    const all = named && c.rows.some((n, i) => isNumber(n) && sum(c.counts[i]) > n);
    const held = all ? "Rows, held-out ones among them," : "Rows to train on";
    figure(body, {
      id: "data", title: "Data and rank of every client", decal: named, height: (width) => dataHeight(c, width),
      note: `${held}${named && c.column ? ` by ${c.column}` : ""}; its adapter's rank below`,
      option: (t, width) => dataOption(t, c, width),
      tableCaption: "Data and rank of every client",
      table: () => ({
        head: ["client", "name", "rank", "rows", "held-out rows", "tokens", ...c.kinds],
        rows: c.ids.map((id, i) => [id, c.names[i], c.ranks[i], c.rows[i], c.eval_rows[i], c.tokens[i], ...(named ? c.counts[i] : [])]),
      }),
    });
  });
}
function navigation(main) {
  const links = [...document.querySelectorAll("main > section")].map((x) => el("li", {}, el("a", { href: `#${x.id}` }, x.dataset.brief)));
  main.insertBefore(el("nav", { "aria-label": "Sections" }, el("ul", {}, links)), document.querySelector("main > h2"));
}
function runsSection() {
  if (D.runs.length < 2) return;
  const node = section("runs", "Runs", "");
  const panel = D.panels[0];
  const last = (run) => { const rows = run.quality.filter((x) => x[panel.kind] && isNumber(x[panel.kind][panel.measure])); return rows.length ? rows[rows.length - 1][panel.kind][panel.measure] : null; };
  node.append(scrolling("All runs", {
    head: ["run", "directory", "seed", "rounds", ...(panel ? [`${panel.measure}, last`] : []), "best round", "bytes up", "bytes down", "seconds", "state"],
    rows: D.runs.map((run) => [run.label, run.name, run.seed, `${run.done}${run.planned ? ` of ${run.planned}` : ""}`, ...(panel ? [last(run)] : []), run.best, run.traffic.total_up, run.traffic.total_down, Number(sum(Object.values(run.seconds).flat()).toPrecision(D.digits)), run.finished ? "finished" : "not finished"]),
  }));
}
function timeSection() {
  const node = section("time", "Time by phase", "", true, "Time");
  forRun(node, (run, body) => {
    const phases = Object.keys(run.seconds).filter((p) => some(run.seconds[p]));
    if (!phases.length) { empty(body, "No times have been written."); return; }
    const totals = phases.map((p) => `${p} ${seconds(sum(run.seconds[p]))}`).join(", ");
    figure(body, {
      id: "seconds", wide: true, title: "Seconds of every round", note: `In all: ${totals}`, height: 290, decal: true,
      option: (t) => secondsOption(t, run),
      tableCaption: "Seconds by round and phase",
      table: () => ({ head: ["round", ...phases], rows: run.traffic.rounds.map((r, k) => [r, ...phases.map((p) => run.seconds[p][k])]) }),
    });
  });
}
function privacySection() {
  const spent = D.runs.filter((run) => run.privacy.some(([, epsilon]) => isNumber(epsilon)));
  if (!spent.length) return;
  const deltas = unique(spent.flatMap((run) => run.privacy.map(([, , delta]) => delta)).filter(isNumber));
  const node = section("privacy", "Privacy budget", `Epsilon spent up to each round${deltas.length ? `, for delta ${deltas.map((x) => short(x)).join(", ")}` : ""}; less is more private.`, false, "Privacy");
  const lines = spent.map((run, mark) => ({ label: run.label, mark, rounds: run.privacy.map(([r]) => r), mean: run.privacy.map(([, e]) => e) }));
  figure(node, {
    id: "privacy-plot", title: "Epsilon by round", height: 260,
    controls: lines.length > 1 ? key(lines.map((x) => [x.mark, x.label])) : null,
    option: (t) => byRound(t, lines, { log: false, format: (x) => short(x) }),
    table: () => ({ head: ["run", "round", "epsilon", "delta"], rows: spent.flatMap((run) => run.privacy.map(([r, e, d]) => [run.label, r, e, d])) }),
  });
}
function evalSection() {
  const rows = D.runs.flatMap((run) => run.evals.flatMap((x) => Object.entries(x.scores).map(([key, score]) => [run.label, x.name, x.model, x.round, key, score])));
  if (!rows.length) return;
  const node = section("evals", "Benchmarks", "What fedlora eval measured.");
  node.append(scrolling("Scores of fedlora eval", { head: ["run", "benchmark", "model", "round", "score", "value"], rows }));
}
function repeatSection() {
  const node = section("repeat", "Configuration, and how to repeat it", "", true, "Repeat");
  if (D.differing.length) {
    node.append(el("h3", {}, "What differs between the runs"), scrolling("Configuration keys that differ", { head: ["run", ...D.differing.map(([key]) => key)], rows: D.runs.map((run, i) => [run.label, ...D.differing.map(([, values]) => String(values[i]))]) }));
  }
  forRun(node, (run, body) => {
    const environment = Object.entries(run.environment).map(([k, x]) => `${k} ${x}`).join(", ");
    body.append(el("p", { style: "margin-top:16px" }, run.config ? "The configuration below is the whole of it: save it as config.yaml (it lies in the run's directory under that name too), then run it into a new directory. On a CPU the same versions and threads give the same numbers." : "The configuration is lost; the run cannot be repeated from this page."));
    if (run.config) body.append(el("pre", { class: "wrap", tabindex: "0", "aria-label": "Command" }, "fedlora run config.yaml --output_dir again"));
    body.append(el("p", { class: "soft" }, [run.started ? `Started ${run.started}. ` : "", environment ? `With ${environment}.` : "Versions and machine were not written."].join("")));
    if (run.config) body.append(el("h3", {}, "config.yaml"), el("pre", { id: "config", tabindex: "0", "aria-label": "config.yaml" }, run.config));
  });
}

const main = document.getElementById("main");
header(main);
runsSection();
qualitySection();
clientSection();
errorSection();
spectrumSection();
bytesSection();
attendanceSection();
timeSection();
privacySection();
evalSection();
repeatSection();
navigation(main);
main.append(el("footer", {}, `fedlora ${D.fedlora}. Numbers in tables are those of metrics.jsonl to ${D.digits} significant digits; whole numbers are exact. Charts: Apache ECharts, Apache License 2.0.`));
redraw();

let waiting = 0;
new ResizeObserver(() => {
  if (printing) return;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => charts.forEach((item) => { if (Math.floor(item.host.clientWidth) !== item.width) draw(item); }));
}).observe(main);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
/* Paper is white and narrower than most screens: charts are drawn for it, and back again. */
function paper(on) {
  if (printing === on) return;
  printing = on;
  document.body.classList.toggle("printing", on);
  redraw();
}
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
matchMedia("print").addEventListener("change", (e) => paper(e.matches));
document.documentElement.dataset.ready = "yes";
