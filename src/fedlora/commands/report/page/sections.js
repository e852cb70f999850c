/* The parts of the page, from top to bottom. */

function section(id, title, about, withRun, brief) {
  const node = el("section", { id, "data-brief": brief || title, "aria-labelledby": `${id}-title` },
    el("div", { class: "head" }, el("h2", { id: `${id}-title` }, title), withRun ? runSelect() : null),
    about ? el("p", { class: "soft" }, about) : null);
  document.getElementById("main").append(node);
  return node;
}
const empty = (parent, text) => parent.append(el("p", { class: "empty" }, text));

/** What is left of names when the parts that all share are cut off, at dots. */
function shortened(names) {
  const parts = names.map((name) => name.split("."));
  const least = Math.min(...parts.map((x) => x.length));
  let front = 0;
  while (front < least - 1 && parts.every((x) => x[front] === parts[0][front])) front += 1;
  return new Map(names.map((name, i) => [name, parts[i].slice(front).filter((x) => !["self_attn", "mlp", "attention", "attn"].includes(x)).join(".")]));
}

/* --- quality by round --- */

/** What can be switched off: series, or with one series what was measured on what. */
function toggled() { return unique(D.panels.flatMap((panel) => panel.lines.map((x) => x.label))); }
function qualitySection() {
  const several = D.series.length > 1;
  const bands = D.series.some((x) => x.runs.length > 1);
  const node = section("quality", "Quality by round",
    `Round 0 is the base before training.${bands ? " Lines are means over seeds, bands one standard deviation to either side." : ""}`, false, "Quality");
  if (!D.panels.length) {
    empty(node, "No evaluation was written, so there is nothing to draw.");
    return;
  }
  const labels = toggled();
  const controls = el("div", { class: "controls" });
  if (labels.length > 1) {
    controls.append(el("fieldset", { id: "toggles" }, el("legend", {}, several ? "Show" : "Measured on"),
      labels.map((label, i) => checkbox(label, true, (on) => { if (on) state.off.delete(label); else state.off.add(label); }, swatch(i)))));
  }
  // Until it is chosen for all, each plot has the scale that it can be read on.
  const log = (panel) => (state.log === null ? panel.log : state.log);
  const all = checkbox("log scale", D.panels.every(log), (on) => { state.log = on; });
  all.querySelector("input").indeterminate = D.panels.some(log) && !D.panels.every(log);
  controls.append(all);
  node.append(controls);
  if (!several) node.append(el("p", { class: "soft small" }, `${unique(D.panels.flatMap((x) => x.note.split("; "))).map((x) => x[0].toUpperCase() + x.slice(1)).join(". ")}.`));
  const panels = el("div", { class: "panels" });
  node.append(panels);
  D.panels.forEach((panel, i) => {
    const lines = panel.lines.map((x) => ({ label: x.label, mark: labels.indexOf(x.label), ...x.curve }));
    const visible = () => lines.filter((x) => !state.off.has(x.label));
    const better = panel.greater === null ? "" : panel.greater ? "More is better" : "Less is better";
    figure(panels, {
      id: `quality-${i}`, title: panel.title, note: [better, panel.log ? "starts on a log scale: the first round dwarfs the rest" : "", several && panel.kind !== "evaluation" ? panel.note : ""].filter(Boolean).join("; "), height: 280,
      wide: D.panels.length === 1,
      option: (t) => byRound(t, visible(), { log: log(panel), percentAxis: panel.percent, format: (x) => value(x, panel.percent) }),
      tableCaption: `${panel.title} by round (${panel.measure}${panel.percent ? ", as a share of 1" : ""})`,
      table: () => {
        const rounds = unique(lines.flatMap((x) => x.rounds)).sort((a, b) => a - b);
        const spread = lines.map((x) => x.sd.some(isNumber));
        return {
          head: ["round", ...lines.flatMap((x, k) => (spread[k] ? [`${x.label}, mean`, "sd", "runs"] : [x.label]))],
          rows: rounds.map((r) => [r, ...lines.flatMap((x, k) => {
            const at = x.rounds.indexOf(r);
            return spread[k] ? [x.mean[at], x.sd[at], x.count[at]] : [x.mean[at]];
          })]),
        };
      },
    });
  });
  forRun(node, (run, body) => {
    const head = unique(run.quality.flatMap((row) => Object.entries(row).filter(([k]) => k !== "round").flatMap(([kind, x]) => Object.keys(x).map((m) => `${kind}.${m}`))));
    if (D.runs.length > 1) {
      body.append(tableBehind(`every number of ${run.label}, as metrics.jsonl has it`, () => ({
        head: ["round", ...head], rows: run.quality.map((row) => [row.round, ...head.map((key) => { const at = key.indexOf("."); return (row[key.slice(0, at)] || {})[key.slice(at + 1)]; })]),
      })));
      body.querySelector("summary").firstChild.textContent = `All numbers of ${run.label}`;
    }
    const byLabel = Object.entries(run.per_class);
    if (byLabel.length) {
      body.append(el("h3", { style: "margin-top:22px" }, `By label, last evaluation${D.runs.length > 1 ? ` of ${run.label}` : ""}`),
        scrolling("Precision, recall, F1 and rows of every label", { head: ["label", "precision", "recall", "F1", "rows"], rows: byLabel.map(([name, x]) => [name, x.precision, x.recall, x.f1, x.support]) }));
    }
  });
}

/* --- clients --- */

function clientSection() {
  const node = section("clients", "Every client before and after", "On each client's own held-out rows: the base before training, the global model after its last round, and the model the client itself ended its round with.", true, "Clients");
  forRun(node, (run, body) => {
    if (!run.changes.length) {
      empty(body, "Not measured: this run evaluated nothing on clients' own rows (client_eval_fraction holds rows out at each client).");
      return;
    }
    const names = run.changes.map((x) => x.title);
    let chosen = 0;
    const select = el("select", { id: "change-measure", onchange: (e) => { chosen = Number(e.target.value); body.querySelector("h3").textContent = run.changes[chosen].title; redraw(); } },
      names.map((name, i) => el("option", { value: i }, name)));
    body.append(el("div", { class: "controls tool" }, el("label", { class: "tool" }, el("span", { class: "soft" }, "Measure"), select)));
    const rounds = [["the global model", run.changes[0].after_round], ["clients' own", run.changes[0].personal_round]].filter(([, r]) => isNumber(r)).map(([who, r]) => `${who} after round ${r}`);
    figure(body, {
      id: "change", wide: true, title: names[0], note: rounds.join(", ").replace(/^t/, "T"), height: 300,
      controls: key([["before", 7, "before training", "open"], ["after", 0, "global model", "circle"], ["personal", 1, "client's own model", "diamond"]].filter(([k]) => run.changes.some((x) => some(x[k]))).map((x) => x.slice(1))),
      option: (t) => changeOption(t, run, run.changes[chosen]),
      tableCaption: "Every client before and after (shares of 1)",
      table: () => ({
        head: ["client", "name", "rank", "rows", ...run.changes.flatMap((x) => [`${x.measure}, before`, "global", "own"])],
        rows: run.clients.ids.map((id, i) => [id, run.clients.names[i], run.clients.ranks[i], run.clients.rows[i], ...run.changes.flatMap((x) => [x.before[i], x.after[i], x.personal[i]])]),
      }),
    });
  });
}

/* --- aggregation error --- */

function errorSection() {
  const node = section("error", "Aggregation error", "How far what the server added to the global model is from the weighted sum of what the clients learnt, relative to that sum. 0 is exact; about 1e-7 is rounding.", true, "Error");
  forRun(node, (run, body) => {
    const e = run.errors;
    const panels = el("div", { class: "panels" });
    body.append(panels);
    const lines = [["aggregation error", e.total], ["truncation error", e.truncation]].filter(([, x], i) => some(x) && (i === 0 || x.some((y) => y > 0)));
    if (!lines.length) empty(panels, "Not measured: no round has an aggregation error (with a server optimiser the step is not meant to be that sum).");
    else {
      const positive = lines.flatMap(([, x]) => x).filter((x) => x > 0);
      const floor = positive.length ? 10 ** (Math.floor(Math.log10(Math.min(...positive))) - 1) : 1e-8;
      const zeros = lines.some(([, x]) => x.includes(0));
      figure(panels, {
        id: "error-total", wide: true, height: 240, title: "Of the whole model by round",
        note: `Log scale${zeros ? "; an error of exactly 0 stands at the lower edge" : ""}`,
        controls: lines.length > 1 ? key(lines.map(([name], i) => [i, name])) : null,
        option: (t) => byRound(t, lines.map(([label, x], mark) => ({ label, mark, rounds: e.rounds, mean: x.map((y) => (y === 0 ? floor : y)) })), { log: true, format: (y) => (y <= floor ? "0" : short(y, 3)) }),
        table: () => ({
          head: ["round", "aggregation_error", "truncation_error", "update_norm", "global_rank"],
          rows: e.rounds.map((r, k) => [r, e.total[k], e.truncation[k], e.norm[k], e.rank[k]]),
        }),
      });
    }
    layerMap(panels, run, "error-layers", "error", "Error by layer and round", e.cells, true);
    layerMap(panels, run, "norm-layers", "norm", "Norm of the update by layer and round", e.norms, false);
  });
}
function layerMap(panels, run, id, which, title, table, needed) {
  const e = run.errors;
  const cells = table.flatMap((row, y) => row.map((v, x) => [x, y, v])).filter((c) => isNumber(c[2]));
  if (!cells.length) {
    if (needed) empty(panels, "By layer: not written (an older version, or no round has it).");
    return;
  }
  const short_ = shortened(e.layers);
  const height = heatHeight(e.layers.length);
  figure(panels, {
    id, title, note: which === "error" ? `Dark is small, by its logarithm${cells.some((c) => c[2] === 0) ? "; grey is exactly 0" : ""}` : "Frobenius norm; dark is small", height, canvas: cells.length > 2500,
    option: (t, width) => heatOption(t, { columns: e.rounds, rows: e.layers, cells, log: which === "error", format: (x) => short(x, 3), columnName: "round", height, width, shorten: (x) => short_.get(x) || x }),
    tableCaption: `${title} (${which})`,
    table: () => ({ head: ["layer", ...e.rounds.map((r) => `round ${r}`)], rows: e.layers.map((name, y) => [name, ...table[y]]) }),
  });
}

/* --- spectrum --- */

function spectrumSection() {
  const node = section("spectrum", "Singular values of the global update", "What all clients together changed, layer by layer: how many directions it has, and how their sizes fall off.", true, "Spectrum");
  forRun(node, (run, body) => {
    const s = run.spectrum;
    if (s.note) empty(body, s.note[0].toUpperCase() + s.note.slice(1) + ".");
    if (!s.layers.length) return;
    const kinds = unique(s.layers.map((x) => x.name.split(".").pop()));
    let chosen = s.layers.length > 24 && kinds.length > 1 ? kinds[0] : "";
    const of = () => s.layers.filter((x) => !chosen || x.name.split(".").pop() === chosen);
    const controls = el("div", { class: "controls tool" });
    if (kinds.length > 1) {
      controls.append(el("label", { class: "tool" }, el("span", { class: "soft" }, "Layers"),
        el("select", { id: "spectrum-kind", onchange: (e) => { chosen = e.target.value; redraw(); } },
          ["", ...kinds].map((kind) => el("option", { value: kind, selected: kind === chosen }, kind || `all ${s.layers.length}`)))));
    }
    controls.append(checkbox("log scale", state.spectrumLog, (on) => { state.spectrumLog = on; }));
    body.append(controls);
    const most = Math.max(...s.layers.map((x) => x.values.length));
    const cut = s.layers.some((x) => x.rank === null || x.rank > x.values.length);
    const names = s.layers.map((x) => x.name);
    const short_ = shortened(names);
    figure(body, {
      id: "spectrum-lines", title: `Of ${s.source}/`, height: 340,
      note: `A line per layer, dark to light from the first layer to the last${cut ? `; the ${most} largest values` : ""}`,
      option: (t) => spectrumOption(t, of(), of().map((x) => x.name), state.spectrumLog),
      tableCaption: "Singular values of the global update by layer",
      table: () => ({
        head: ["layer", "norm", "rank", "rank for 99 % of the squared norm", ...range(most).map((i) => `value ${i + 1}`)],
        rows: s.layers.map((x) => [x.name, x.norm, x.rank, x.energy_rank, ...range(most).map((i) => x.values[i])]),
      }),
    });
    const known = s.layers.filter((x) => isNumber(x.energy_rank));
    if (known.length > 1) {
      const height = (width) => (width < 520 ? Math.max(240, 70 + 15 * s.layers.length) : 270);
      figure(body, {
        id: "spectrum-rank", title: "Directions that hold 99 % of the squared norm", note: "By layer, in the model's order", height: 270,
        option: (t) => ({
          grid: { left: 8, right: 16, top: 14, bottom: 8, containLabel: true },
          tooltip: tooltip(t, { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => { const x = s.layers[items[0].dataIndex]; return `${escaped(x.name)}<br>99 %: <b>${exact(x.energy_rank)}</b> of ${exact(x.rank)} directions<br>norm ${short(x.norm)}`; } }),
          xAxis: axis(t, { type: "category", data: names, lines: false, axisLabel: { rotate: 50, formatter: (x) => short_.get(x), fontSize: 10.5, width: 110, overflow: "truncate" } }),
          yAxis: yAxis(t, { log: false, values: [], format: (y) => short(y), minInterval: 1 }),
          series: [{ type: "bar", data: s.layers.map((x) => x.energy_rank), itemStyle: { color: t.colour(0) }, barMaxWidth: 34 }],
        }),
      });
    }
  });
}

/* --- bytes --- */

function bytesSection() {
  const node = section("bytes", "Bytes up and down", "Against two bounds: a client's own trained factors (its rank times all rows and columns it adapts, in float32) and the whole base model in float32, which full fine-tuning would send. Methods that send one of two factors lie below the first.", true, "Bytes");
  forRun(node, (run, body) => {
    const f = run.traffic;
    if (!f.rounds.length || !f.up.some((row) => some(row))) {
      empty(body, "No round has been written, so no bytes are known.");
      return;
    }
    const took = f.up.map((row) => range(row.length).filter((i) => isNumber(row[i])));
    const lower = took.map((own) => (own.every((i) => isNumber(f.lower[i])) ? sum(own.map((i) => f.lower[i])) : null));
    const upper = took.map((own) => (isNumber(f.upper) ? own.length * f.upper : null));
    const lines = [["up", f.up.map(sum)], ["down", f.down.map(sum)], ["own trained factors", lower], ["whole base", upper]]
      .map(([label, mean], mark) => ({ label, mean, mark, bound: mark > 1, rounds: f.rounds })).filter((x) => some(x.mean));
    const controls = el("div", { class: "controls tool" }, checkbox("log scale", state.bytesLog, (on) => { state.bytesLog = on; }));
    body.append(controls);
    if (!some(f.lower) || !isNumber(f.upper)) empty(body, "Bounds are not known: the run has no line on its model and modules.");
    const panels = el("div", { class: "panels" });
    body.append(panels);
    figure(panels, {
      id: "bytes-rounds", title: "All clients by round", height: 300, note: "A round that sent nothing has no mark on a log scale",
      controls: key(lines.map((x) => [x.mark, x.label, x.bound ? "bound" : "line"])),
      option: (t) => byRound(t, lines, { log: state.bytesLog, format: bytes }),
      tableCaption: "Bytes of all clients by round",
      table: () => ({ head: ["round", ...lines.map((x) => x.label), "clients"], rows: f.rounds.map((r, k) => [r, ...lines.map((x) => x.mean[k]), took[k].length]) }),
    });
    const mean = (rows) => run.clients.ids.map((_, i) => { const own = rows.map((row) => row[i]).filter(isNumber); return own.length ? sum(own) / own.length : null; });
    const means = { up: mean(f.up), down: mean(f.down) };
    figure(panels, {
      id: "bytes-clients", title: "Each client in a round", height: 300, note: "Mean over the rounds it took part in",
      controls: key([[0, "up", "up"], [1, "down", "down"], ...(some(f.lower) ? [[2, "own trained factors", "bound"]] : []), ...(isNumber(f.upper) ? [[3, "whole base", "bound"]] : [])]),
      option: (t) => clientBytesOption(t, run, means, state.bytesLog),
      tableCaption: "Bytes of each client, all rounds together",
      table: () => ({
        head: ["client", "rank", "rounds", "up", "down", "own trained factors, a round", "whole base, a round"],
        rows: run.clients.ids.map((id, i) => [id, run.clients.ranks[i], f.up.filter((row) => isNumber(row[i])).length, sum(f.up.map((row) => row[i])), sum(f.down.map((row) => row[i])), f.lower[i], f.upper]),
      }),
    });
    for (const way of ["up", "down"]) {
      const cells = f[way].flatMap((row, x) => row.map((v, y) => [x, y, v])).filter((c) => isNumber(c[2]));
      const height = Math.max(230, Math.min(560, 120 + 15 * run.clients.ids.length));
      if (!cells.length) continue;
      figure(panels, {
        id: `bytes-${way}`, title: `Bytes ${way} by client and round`, note: `Dark is small, by its logarithm; ${cells.some((c) => c[2] === 0) ? "grey: sent nothing; " : ""}blank: did not take part`, height, canvas: cells.length > 2500,
        option: (t, width) => heatOption(t, { columns: f.rounds, rows: run.clients.ids, cells, log: true, format: bytes, rowName: "client", columnName: "round", height, width }),
        tableCaption: `Bytes ${way} by round and client`,
        table: () => ({ head: ["client", ...f.rounds.map((r) => `round ${r}`)], rows: run.clients.ids.map((id, y) => [id, ...f[way].map((row) => row[y])]) }),
      });
    }
  });
}

/* --- who took part --- */

function attendanceSection() {
  const node = section("attendance", "Who took part", "An update counts, or its client failed, was late, was not needed because the round was full, or was not sampled.", true, "Took part");
  forRun(node, (run, body) => {
    const a = run.attendance;
    if (!a.rounds.length) { empty(body, "No round has been written, so it is not known who took part."); return; }
    const again = a.rounds.map((r, i) => [r, a.attempts[i]]).filter(([, attempts]) => attempts > 1);
    const words = Object.keys(a.times).filter((outcome) => outcome === "counted" || some(a.times[outcome].map((n) => n || null)));
    body.append(el("p", { class: "soft small" }, [
      words.length === 1 ? "Every client counts in every round." : "",
      again.length ? `${plural(again.length, "round")} ${again.length > 1 ? "were" : "was"} tried more than once.` : "",
    ].filter(Boolean).join(" ")));
    if (words.length > 1) {
      body.append(scrolling("Rounds of each client, by what became of it", {
        head: ["client", "rank", ...words.map((outcome) => outcome.replace("_", " "))],
        rows: run.clients.ids.map((id, i) => [id, run.clients.ranks[i], ...words.map((outcome) => a.times[outcome][i])]),
      }));
    }
    if (a.absent.length) {
      body.append(el("h3", { style: "margin-top:22px" }, "Who was left out, and why"),
        scrolling("Updates that do not count", { head: ["round", "client", "what", "why"], rows: a.absent.map(([r, c, what, why]) => [r, String(c), what, why]) }));
    }
    if (again.length) {
      body.append(el("h3", { style: "margin-top:22px" }, "Rounds that were tried again"),
        scrolling("How often a round was tried", { head: ["round", "attempts"], rows: again }));
    }
  });
}
