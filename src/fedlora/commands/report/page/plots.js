/* Options of the charts: functions of numbers, theme and width. */

const BARS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c", "#9467bd", "#a6761d"];
const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];

/** A value axis by number; on a log scale powers of ten have labels. */
function yAxis(t, { log, format, values, ...more }) {
  const found = values.filter((x) => isNumber(x) && (!log || x > 0));
  const limits = {};
  if (log && found.length) {
    // A scale that spans less than a decade would have no label at all.
    limits.min = 10 ** Math.floor(Math.log10(Math.min(...found)));
    limits.max = 10 ** Math.ceil(Math.log10(Math.max(...found)) + 1e-9);
  }
  return axis(t, { type: log ? "log" : "value", axisLabel: { formatter: format }, ...limits, ...more });
}
/** Marks of a line, few enough to be told apart, each line's at places of its own. */
function marks(points, i, room) {
  const every = Math.max(1, Math.ceil(points.length / room));
  return points.map((point, k) => ({ value: point, symbol: (k + i) % every === 0 || points.length === 1 ? SYMBOLS[i % SYMBOLS.length] : "none" }));
}
function line(t, i, name, points, more) {
  return {
    name, type: "line", data: marks(points, i, 14), symbolSize: 8, showAllSymbol: true,
    lineStyle: { color: t.colour(i), width: 2.2, type: t.dash(i), ...(more && more.lineStyle) },
    itemStyle: { color: t.colour(i) }, emphasis: { focus: "series" }, z: 3,
    ...Object.fromEntries(Object.entries(more || {}).filter(([key]) => key !== "lineStyle")),
  };
}
const boundStyle = (t, i) => ({ color: t.colour(i), width: 6, opacity: 0.45, type: BOUND_DASHES[i] || "solid" });
/** A limit: broad and pale, so that what lies on it is still seen. */
function bound(t, x, points) {
  return {
    name: x.label, type: "line", data: points, symbol: points.length > 1 ? "none" : "rect", symbolSize: [40, 6], z: 2,
    lineStyle: boundStyle(t, x.mark), itemStyle: { color: t.colour(x.mark), opacity: 0.4 },
  };
}
/** A band between two values, as one shape; it bounds the axis like other data. */
function band(t, i, name, points) {
  return {
    name: `${name} band`, type: "custom", silent: true, z: 1, clip: true,
    data: points, encode: { x: 0, y: [1, 2] }, tooltip: { show: false },
    renderItem: (params, api) => {
      if (params.dataIndex !== 0) return null;
      const upper = points.map(([x, , high]) => api.coord([x, high]));
      const lower = points.map(([x, low]) => api.coord([x, low])).reverse();
      return { type: "polygon", shape: { points: [...upper, ...lower] }, style: { fill: t.colour(i), opacity: 0.18 } };
    },
  };
}
/**
 * Lines by round. lines: [{label, mark, rounds, mean, sd, count}]; format: numbers in the tooltip.
 */
function byRound(t, lines, { log, format, percentAxis, extra = [] }) {
  const usable = (y) => isNumber(y) && (!log || y > 0);
  const series = [];
  const values = [];
  for (const x of lines) {
    const points = x.rounds.map((r, k) => [r, x.mean[k]]).filter(([, y]) => usable(y));
    if (!points.length) continue;
    values.push(...points.map(([, y]) => y));
    const spread = x.rounds.map((r, k) => [r, x.mean[k], (x.sd || [])[k]])
      .filter(([, m, s]) => isNumber(m) && isNumber(s) && (!log || m - s > 0))
      .map(([r, m, s]) => (percentAxis ? [r, Math.max(m - s, 0), Math.min(m + s, 1)] : [r, m - s, m + s]));
    if (spread.length > 1) {
      series.push(band(t, x.mark, x.label, spread));
      values.push(...spread.flatMap(([, low, high]) => [low, high]));
    }
    series.push(x.bound ? bound(t, x, points) : line(t, x.mark, x.label, points));
  }
  const told = new Map(lines.map((x) => [x.label, new Map(x.rounds.map((r, k) => [r, k]))]));
  const rounds = lines.flatMap((x) => x.rounds);
  return {
    grid: { left: 8, right: 16, top: 14, bottom: 24, containLabel: true },
    tooltip: tooltip(t, {
      trigger: "axis", axisPointer: { lineStyle: { color: t.soft } },
      formatter: (items) => {
        const round = items[0].axisValue;
        const rows = lines.filter((x) => told.get(x.label).has(round)).map((x) => {
          const k = told.get(x.label).get(round);
          const sd = isNumber((x.sd || [])[k]) ? ` ± ${format(x.sd[k])}` : "";
          const n = x.count && x.count[k] > 1 ? ` <span style="opacity:.7">(${x.count[k]} runs)</span>` : "";
          return `<span style="color:${t.colour(x.mark)}">●</span> ${escaped(x.label)}: <b>${escaped(format(x.mean[k]) + sd)}</b>${n}`;
        });
        return [`round ${escaped(round)}`, ...rows].join("<br>");
      },
    }),
    xAxis: axis(t, {
      type: "value", name: "round", ...bottomName, minInterval: 1, lines: false,
      min: Math.min(...rounds, 1), max: Math.max(...rounds, 1),
    }),
    yAxis: yAxis(t, {
      log, values, scale: true,
      format: percentAxis ? (y) => `${Number((100 * y).toPrecision(3))} %` : (y) => format(y),
    }),
    series: [...series, ...extra],
  };
}

/** Rows of every client by kind, and its rank below, both against the same clients. */
function dataOption(t, clients, width) {
  const names = clients.ids.map((id) => String(id));
  const kinds = clients.kinds.length ? clients.kinds : ["rows"];
  const cells = clients.kinds.length ? clients.counts : clients.rows.map((n) => [n]);
  const named = clients.kinds.length > 1;
  const legendRows = named ? Math.ceil(kinds.reduce((n, k) => n + 34 + 7 * Math.min(k.length, 24), 0) / Math.max(width - 20, 100)) : 0;
  const bottom = 30 + legendRows * 24;
  const ranked = some(clients.ranks);
  const height = dataHeight(clients, width);
  const rankHeight = ranked ? 66 : 0;
  const category = (more) => axis(t, { type: "category", data: names, lines: false, ...more });
  const last = { name: "client", nameLocation: "middle", nameGap: 24 };
  const common = { left: 54, right: 12 };
  const grids = [{ ...common, top: 26, height: height - 26 - bottom - rankHeight - (ranked ? 26 : 8) }];
  if (ranked) grids.push({ ...common, top: height - bottom - rankHeight, height: rankHeight - 4 });
  const series = kinds.map((kind, j) => ({
    name: kind, type: "bar", stack: "rows", data: cells.map((row) => row[j]), barCategoryGap: "18%",
    itemStyle: { color: BARS[j % BARS.length], borderColor: t.page, borderWidth: names.length > 40 ? 0 : 0.5 },
    emphasis: { focus: "series" },
  }));
  if (ranked) {
    series.push({
      name: "rank", type: "bar", xAxisIndex: 1, yAxisIndex: 1, data: clients.ranks, barCategoryGap: "18%",
      itemStyle: { color: t.soft, decal: { symbol: "none" } },
      label: { show: names.length <= 24, position: "top", color: t.text, fontSize: 11 },
    });
  }
  return {
    grid: grids,
    legend: named
      ? { bottom: 0, left: 0, right: 0, data: kinds, textStyle: { color: t.text }, itemWidth: 18, itemHeight: 12, itemGap: 12, formatter: (k) => (k.length > 24 ? `${k.slice(0, 22)}…` : k) }
      : undefined,
    tooltip: tooltip(t, {
      trigger: "axis", axisPointer: { type: "shadow" },
      formatter: (items) => {
        const i = items[0].dataIndex;
        const name = clients.names[i] ? ` (${escaped(clients.names[i])})` : "";
        const facts = [`<b>client ${names[i]}</b>${name}`, `rank ${exact(clients.ranks[i])}, ${exact(clients.rows[i])} rows`];
        if (named) kinds.forEach((kind, j) => { if (cells[i][j]) facts.push(`${escaped(kind)}: ${exact(cells[i][j])}`); });
        return facts.join("<br>");
      },
    }),
    xAxis: ranked ? [category({ axisLabel: { show: false } }), category({ gridIndex: 1, ...last })] : [category(last)],
    yAxis: [
      axis(t, { type: "value", name: "rows", nameLocation: "end", nameGap: 10, minInterval: 1, splitNumber: 4 }),
      ...(ranked ? [axis(t, { type: "value", gridIndex: 1, name: "rank", nameLocation: "middle", nameGap: 36, splitNumber: 1, lines: false, max: (x) => Math.ceil(x.max * 1.45), axisLabel: { show: false } })] : []),
    ],
    series,
  };
}
function dataHeight(clients, width) {
  return width < 520 ? 400 : 380;
}

/** Before and after for every client: open mark before, filled after, a diamond for its own model. */
function changeOption(t, run, change) {
  const names = run.clients.ids.map(String);
  const show = (x) => value(x, change.percent);
  const parts = [
    ["before training", change.before, "emptyCircle", t.colour(7)],
    ["global model", change.after, "circle", t.colour(0)],
    ["client's own model", change.personal, "diamond", t.colour(1)],
  ].filter(([, values]) => some(values));
  const spans = names.map((_, i) => {
    const own = [change.before[i], change.after[i], change.personal[i]].filter(isNumber);
    return own.length > 1 ? [i, Math.min(...own), Math.max(...own)] : null;
  }).filter(Boolean);
  const size = names.length > 40 ? 7 : 11;
  return {
    grid: { left: 8, right: 16, top: 14, bottom: 24, containLabel: true },
    tooltip: tooltip(t, {
      trigger: "axis", axisPointer: { type: "shadow" },
      formatter: (items) => {
        const i = items.find((x) => x.seriesType !== "custom")?.dataIndex ?? items[0].dataIndex;
        const rows = run.clients.rows[i];
        return [`<b>client ${names[i]}</b>, rank ${exact(run.clients.ranks[i])}, ${exact(rows)} rows`,
          ...parts.map(([name, values]) => `${name}: <b>${show(values[i])}</b>`)].join("<br>");
      },
    }),
    xAxis: axis(t, { type: "category", data: names, name: "client", ...bottomName, lines: false }),
    yAxis: yAxis(t, { log: false, values: [], scale: !change.percent, format: change.percent ? (y) => `${Number((100 * y).toPrecision(3))} %` : (y) => short(y) }),
    series: [
      {
        name: "span", type: "custom", silent: true, data: spans, encode: { x: 0, y: [1, 2] }, z: 1,
        renderItem: (params, api) => {
          const [x, top] = api.coord([api.value(0), api.value(2)]);
          const [, bottom] = api.coord([api.value(0), api.value(1)]);
          return { type: "line", shape: { x1: x, x2: x, y1: top, y2: bottom }, style: { stroke: t.soft, lineWidth: 1.5 } };
        },
      },
      ...parts.map(([name, values, symbol, colour]) => ({
        name, type: "scatter", symbol, symbolSize: size, data: values.map((x) => (isNumber(x) ? x : "-")),
        itemStyle: { color: colour }, z: 3,
      })),
    ],
  };
}

/** Layers (or clients) by rounds. cells: [column, row, value]; the colour follows its logarithm. */
function heatOption(t, { columns, rows, cells, log, format, rowName, columnName, height, width, shorten }) {
  const positive = cells.map((c) => c[2]).filter((x) => x > 0);
  const least = positive.length ? Math.min(...positive) : 1;
  const most = positive.length ? Math.max(...positive) : 1;
  const place = (x) => (log ? Math.log10(x > 0 ? x : least) : x);
  let low = log ? place(least) : Math.min(...cells.map((c) => c[2]));
  let high = log ? place(most) : Math.max(...cells.map((c) => c[2]));
  if (!(high > low)) { low -= 0.5; high += 0.5; }
  const back = (x) => (log ? 10 ** x : x);
  const room = Math.min(0.42 * width, 230);
  const label = shorten || ((x) => x);
  return {
    grid: { left: 8, right: 12, top: 8, bottom: 62, containLabel: true },
    tooltip: tooltip(t, {
      trigger: "item",
      formatter: (item) => {
        const [x, y, , shown] = item.value;
        return `${columnName} ${escaped(columns[x])}<br>${rowName ? `${rowName} ` : ""}${escaped(rows[y])}<br><b>${escaped(format(shown))}</b>`;
      },
    }),
    xAxis: axis(t, { type: "category", data: columns.map(String), name: columnName, ...bottomName, lines: false, splitArea: { show: false } }),
    yAxis: axis(t, {
      type: "category", data: rows.map(String), inverse: true, lines: false, name: "",
      axisLabel: { formatter: label, width: room, overflow: "truncate", interval: Math.max(0, Math.ceil((rows.length * 13) / Math.max(height - 100, 60)) - 1) },
    }),
    visualMap: {
      type: "continuous", min: low, max: high, dimension: 2, orient: "horizontal", left: "center", bottom: 0,
      itemWidth: 12, itemHeight: Math.min(240, width - 190), calculable: false,
      text: [format(back(high)), format(back(low))], textStyle: { color: t.text },
      inRange: { color: VIRIDIS }, hoverLink: false,
    },
    series: [{
      type: "heatmap", progressive: 0, data: cells.map(([x, y, v]) => (log && v === 0 ? { value: [x, y, low, v], visualMap: false, itemStyle: { color: t.line }, label: { show: cells.length <= 600, formatter: "0", color: t.soft, fontSize: 9 } } : [x, y, place(v), v])), encode: { x: 0, y: 1, value: 2 },
      itemStyle: { borderColor: t.page, borderWidth: cells.length > 1500 ? 0 : 0.6 },
      emphasis: { itemStyle: { borderColor: t.text, borderWidth: 2 } },
    }],
  };
}
const heatHeight = (rows) => Math.max(230, Math.min(720, 120 + 17 * rows));

/** Singular values of layers, the largest first; lines are shaded by depth. */
function spectrumOption(t, layers, names, log) {
  const shade = (i) => {
    const scale = t.dark ? VIRIDIS.slice(2) : VIRIDIS.slice(0, 7);
    return scale[Math.round((i / Math.max(layers.length - 1, 1)) * (scale.length - 1))];
  };
  const values = layers.flatMap((x) => x.values);
  const longest = Math.max(...layers.map((x) => x.values.length), 1);
  return {
    grid: { left: 8, right: 16, top: 14, bottom: 24, containLabel: true },
    tooltip: tooltip(t, {
      trigger: "item",
      formatter: (item) => `${escaped(names[item.seriesIndex])}<br>value ${item.value[0]}: <b>${short(item.value[1], 6)}</b>`,
    }),
    xAxis: axis(t, { type: "value", name: "singular value, the largest first", ...bottomName, min: 1, max: longest, minInterval: 1, lines: false }),
    yAxis: yAxis(t, { log, values, format: (y) => short(y, 3) }),
    series: layers.map((x, i) => ({
      name: names[i], type: "line", data: marks(x.values.map((y, k) => [k + 1, y]), i, 8), symbolSize: 6, showAllSymbol: true,
      lineStyle: { color: shade(i), width: 1.7, type: t.dash(i) }, itemStyle: { color: shade(i) },
      emphasis: { focus: "series", lineStyle: { width: 3.5 } }, triggerLineEvent: true,
    })),
  };
}

/** Bytes of each client in a round (mean over its rounds), with both bounds. */
function clientBytesOption(t, run, means, log) {
  const { lower, upper } = run.traffic;
  const names = run.clients.ids.map(String);
  const usable = (x) => (isNumber(x) && (!log || x > 0) ? x : "-");
  const all = [...means.up, ...means.down, ...lower, upper];
  const limit = (name, values, i) => ({
    name, type: "line", data: values.map(usable), step: "middle", symbol: "none", z: 2,
    lineStyle: boundStyle(t, i),
  });
  const dots = (name, values, i, symbol) => ({
    name, type: "scatter", data: values.map(usable), symbol, symbolSize: names.length > 40 ? 7 : 11, itemStyle: { color: t.colour(i) }, z: 3,
  });
  const series = [dots("up", means.up, 0, "triangle"), { ...dots("down", means.down, 1, "triangle"), symbolRotate: 180 }];
  if (some(lower)) series.push(limit("own trained factors", lower, 2));
  if (isNumber(upper)) series.push(limit("whole base", names.map(() => upper), 3));
  return {
    grid: { left: 8, right: 16, top: 14, bottom: 24, containLabel: true },
    tooltip: tooltip(t, {
      trigger: "axis",
      formatter: (items) => {
        const i = items[0].dataIndex;
        return [`<b>client ${names[i]}</b>, rank ${exact(run.clients.ranks[i])}`, `up ${bytes(means.up[i])} a round`, `down ${bytes(means.down[i])} a round`,
          `own trained factors ${bytes(lower[i])}`, `whole base ${bytes(upper)}`].join("<br>");
      },
    }),
    xAxis: axis(t, { type: "category", data: names, name: "client", ...bottomName, lines: false }),
    yAxis: yAxis(t, { log, values: all, format: bytes }),
    series,
  };
}

/** Seconds of every phase, stacked by round. */
function secondsOption(t, run) {
  const phases = Object.keys(run.seconds);
  return {
    grid: { left: 8, right: 16, top: 40, bottom: 24, containLabel: true },
    legend: { top: 0, left: 0, textStyle: { color: t.text } },
    tooltip: tooltip(t, {
      trigger: "axis", axisPointer: { type: "shadow" },
      formatter: (items) => {
        const i = items[0].dataIndex;
        return [`round ${run.traffic.rounds[i]}`, ...phases.map((p) => `${escaped(p)}: <b>${seconds(run.seconds[p][i])}</b>`)].join("<br>");
      },
    }),
    xAxis: axis(t, { type: "category", data: run.traffic.rounds.map(String), name: "round", ...bottomName, lines: false }),
    yAxis: yAxis(t, { log: false, values: [], format: seconds }),
    series: phases.map((phase, i) => ({
      name: phase, type: "bar", stack: "time", data: run.seconds[phase], itemStyle: { color: BARS[i % BARS.length], borderColor: t.page, borderWidth: 0.5 },
      barMaxWidth: 60,
    })),
  };
}
