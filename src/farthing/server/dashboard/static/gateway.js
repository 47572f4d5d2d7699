// A fleet behind the gateway: load, forecasts with their bands, replicas, decisions with reasons.
/* global uPlot */
import { Chart } from "./chart.js";
import { clock, dollars, h, known, rows, seconds, short } from "./dom.js";
import { facts, Tile } from "./server.js";

const HORIZONS = { "30 min": 1800, "3 h": 10800, "24 h": 86400 };
const FORECASTS = { short: ["minutes ahead", "s2"], realtime: ["real time", "s4"] };
const REPLICA = ["Name", "State", "In flight", "Served", "Failed"];
const STATES = { ready: "good", starting: "warn", draining: "warn", unhealthy: "bad" };

export class GatewayView {
  kind = "gateway";

  constructor() {
    this.facts = h("div.facts");
    this.tiles = {
      load: new Tile("Load"),
      replicas: new Tile("Replicas ready", "", true),
      waiting: new Tile("Requests waiting"),
      latency: new Tile("Time to first byte"),
      price: new Tile("Cost per hour"),
    };
    this.horizon = "30 min";
    this.buttons = Object.keys(HORIZONS).map((name) =>
      h("button", { type: "button", onclick: () => this.#choose(name), ariaPressed: String(name === this.horizon) }, name));
    this.forecast = this.#forecastChart();
    this.replicas = new Chart([
      { name: "desired", label: "desired", color: "s2", step: true, dash: [6, 4] },
      { name: "ready", label: "ready", color: "s1", step: true, fill: true },
    ], { title: "Replicas", format: short });
    this.rows = h("tbody");
    this.replicas.element.append(h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {},
      ...REPLICA.map((name) => h("th", {}, name)))), this.rows)));
    this.charts = [
      new Chart([{ name: "requests_ps", label: "arriving", color: "s1", fill: true }, { name: "errors_ps", label: "failed", color: "s2" }],
        { title: "Requests per second", format: short }),
      new Chart([{ name: "ttfb_p50", label: "median", color: "s1" }, { name: "ttfb_p95", label: "95 %", color: "s2" }],
        { title: "Time to first byte", format: seconds }),
    ];
    this.why = h("p.why");
    this.log = h("ol.log");
    this.element = h("div", { style: { display: "contents" } },
      this.facts,
      h("div.tiles", {}, ...Object.values(this.tiles).map((tile) => tile.element)),
      this.forecast.element,
      h("div.grid", {}, ...this.charts.map((chart) => chart.element)),
      h("div.grid.wide", {},
        h("section.card", {}, h("header", {}, h("h2", {}, "Decisions"), h("span.hint", {}, "newest first")), this.why, this.log),
        this.replicas.element));
  }

  #forecastChart() {
    const bands = Object.entries(FORECASTS).flatMap(([name, [label, color]]) => [
      { name: `${name}_p90`, label: "", color, band: `${name}_p50`, span: true, step: true },
      { name: `${name}_p50`, label, color, span: true, step: true, dash: name === "realtime" ? [3, 3] : undefined },
    ]);
    const load = { name: "load", label: "load", color: "s1", span: true, fill: true };
    return new Chart([load, ...bands], {
      title: "Load and forecasts", hint: "median to 90 %", format: short, tall: true, future: true, end: h("span.segments", {}, ...this.buttons),
    });
  }

  #choose(name) {
    this.horizon = name;
    this.buttons.forEach((b) => (b.ariaPressed = String(b.textContent === name)));
    if (this.data) this.#forecasts(this.data, this.columns);
  }

  show(data, points) {
    this.data = data;
    this.columns = points.columns;
    this.facts.replaceChildren(...facts(Object.entries(data.facts ?? {})));
    this.#tiles(data, points);
    this.#forecasts(data, points.columns);
    for (const chart of [this.replicas, ...this.charts]) chart.show(points.columns);
    this.#replicas(data.replicas ?? []);
    this.why.textContent = data.why ?? "";
    this.#decisions(data.decisions ?? []);
  }

  #tiles(data, points) {
    const { gauges } = data;
    const t = this.tiles;
    t.load.show(short(gauges.load ?? points.last("requests_ps")), data.unit ?? "requests/s");
    t.replicas.show(short(gauges.ready), known(gauges.desired) ? `${short(gauges.desired)} desired` : "",
      gauges.desired ? Math.min(1, gauges.ready / gauges.desired) : 0);
    t.waiting.show(short(gauges.waiting), known(gauges.running) ? `${short(gauges.running)} in flight` : "");
    t.latency.show(seconds(points.last("ttfb_p50")), `95 % within ${seconds(points.last("ttfb_p95"))}`);
    t.price.show(dollars(gauges.usd_per_hour), known(gauges.usd_per_million) ? `${dollars(gauges.usd_per_million)} per million tokens` : "");
  }

  #forecasts(data, columns) {
    const horizon = HORIZONS[this.horizon];
    const start = Math.max(columns.t[0], data.now - horizon / 2);
    const end = Math.min(data.now + horizon, Math.max(forecastEnd(data.forecasts ?? {}), data.now + (data.now - start) / 8));
    const tables = [[columns.t, columns.load ?? columns.requests_ps ?? columns.t.map(() => null)]];
    for (const name of Object.keys(FORECASTS)) tables.push(steps(data.forecasts?.[name], end));
    for (const series of this.forecast.series) {
      const [name, quantile] = series.name.split("_");
      const source = data.forecasts?.[name]?.source;
      if (quantile === "p50" && source && name !== "realtime") series.text.data = `${FORECASTS[name][0]} (${source})`;
    }
    const joined = uPlot.join(tables);
    const names = ["t", "load", ...Object.keys(FORECASTS).flatMap((name) => [`${name}_p90`, `${name}_p50`])];
    this.forecast.show(Object.fromEntries(names.map((name, i) => [name, joined[i]])), { min: Math.min(start, data.now - 60), max: end, now: data.now });
  }

  #replicas(replicas) {
    this.rows.replaceChildren(...rows(REPLICA, replicas.map((r) => [
      h("span", { title: r.url ?? "" }, r.name), h(`span.badge.${STATES[r.state] ?? "none"}`, {}, r.state),
      ...[r.inflight, r.served, r.failed].map(short)])));
    if (!replicas.length) this.rows.replaceChildren(h("tr", {}, h("td.hint", { colSpan: 5 }, "no replica yet")));
  }

  #decisions(decisions) {
    const newest = decisions.at(-1)?.time;
    if (newest === this.newest && this.log.children.length) return;
    this.newest = newest;
    if (!decisions.length) this.log.replaceChildren(h("li.empty", {}, "no decision yet"));
    else this.log.replaceChildren(...[...decisions].reverse().map(decision));
  }
}

/** When the last forecast ends; the current load is none. */
function forecastEnd(forecasts) {
  const found = forecasts.short;
  return found ? found.start + found.p50.length * found.step_s : 0;
}

/** A forecast's steps as [times, p90, p50]: one point where a step begins, one where the last ends. */
function steps(forecast, end) {
  if (!forecast) return [[], [], []];
  const times = forecast.p50.map((_, i) => forecast.start + i * forecast.step_s).filter((t) => t < end);
  const cut = (values) => [...values.slice(0, times.length), values[times.length - 1]];
  if (!times.length) return [[], [], []];
  return [[...times, Math.min(end, times.at(-1) + forecast.step_s)], cut(forecast.p90), cut(forecast.p50)];
}

function decision(d) {
  const sign = { up: "↑", down: "↓", hold: "=" }[d.action] ?? "";
  const why = d.reason.startsWith(`${d.decided_by}: `) ? d.reason.slice(d.decided_by.length + 2) : d.reason;
  return h(`li.${d.action}`, {},
    h("time", {}, clock(d.time)),
    h("span.move", {}, d.action === "hold" ? `${sign} ${d.current}` : `${sign} ${d.current} → ${d.target}`),
    h("p", {}, h("b", {}, d.decided_by.replaceAll("_", " ")), ` · ${why}`, ...(d.alarms ?? []).map((a) => h("div.alarm", {}, a))));
}
