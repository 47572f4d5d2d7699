// One server: tiles, curves, experts, accounts.
import { Chart } from "./chart.js";
import { bytes, dollars, h, joules, known, percent, rows, seconds, short, watts } from "./dom.js";
import { HeatMap } from "./heatmap.js";

export class Tile {
  constructor(name, unit = "", bar = false) {
    this.value = h("span", {}, "–");
    this.note = h("div.note");
    this.fill = bar ? h("i") : null;
    this.element = h("section.card.tile", {}, h("div.name", {}, name),
      h("div.value", {}, this.value, h("small", {}, unit)),
      this.note, this.fill ? h("div.bar", {}, this.fill) : null);
  }

  show(value, note = "", share = null) {
    this.value.textContent = value;
    this.note.textContent = note;
    if (this.fill) this.fill.style.width = `${Math.round((share ?? 0) * 100)}%`;
  }
}

export function facts(entries) {
  return entries.filter(([, value]) => value).map(([name, value]) => h("span", {}, `${name} `, h("b", {}, String(value))));
}

const COLUMNS = ["API key", "Requests", "Prompt", "Output", "Prefill", "Decode", "Total", "Energy"];
const rate = (value) => (known(value) ? `${short(value)}/s` : "–");

export class ServerView {
  kind = "server";

  constructor() {
    this.facts = h("div.facts");
    this.tiles = {
      output: new Tile("Output", "tokens/s"),
      ttft: new Tile("Time to first token"),
      tpot: new Tile("Time per output token"),
      load: new Tile("Requests running"),
      kv: new Tile("KV cache", "", true),
      price: new Tile("Cost per million tokens"),
    };
    this.charts = this.#charts();
    this.heat = new HeatMap();
    this.heat.element.hidden = true;
    this.accounts = h("tbody");
    this.costNote = h("span.hint");
    this.accountsCard = h("section.card", {}, h("header", {}, h("h2", {}, "Spending per key"), this.costNote),
      h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {},
        ...COLUMNS.map((name) => h("th", {}, name)))), this.accounts)));
    this.element = h("div", { style: { display: "contents" } },
      this.facts,
      h("div.tiles", {}, ...Object.values(this.tiles).map((tile) => tile.element)),
      h("div.grid", {}, ...this.charts.map((chart) => chart.element)),
      this.heat.element,
      this.accountsCard);
  }

  #charts() {
    const pair = (name) => [
      { name: `${name}_p50`, label: "median", color: "s1" },
      { name: `${name}_p95`, label: "95 %", color: "s2" },
    ];
    this.draftNote = h("span");
    this.speculation = new Chart([{ name: "acceptance", label: "drafts accepted", color: "s1" }],
      { title: "Speculation", hint: this.draftNote, format: percent, range: [0, 1] });
    this.processors = new Chart([{ name: "cpus", label: "cores in use", color: "s1", fill: true }], { title: "CPU of this process", format: short });
    this.memory = new Chart([{ name: "memory", label: "resident, mapped files included", color: "s3", fill: true }], { title: "Memory", format: bytes });
    this.power = new Chart([{ name: "watts", label: "", color: "s3", fill: true }], { title: "Power", format: watts });
    return [
      new Chart([
        { name: "generation_tps", label: "output", color: "s1", fill: true },
        { name: "prompt_tps", label: "prompt", color: "s2" },
      ], { title: "Tokens per second", format: short }),
      new Chart(pair("ttft"), { title: "Time to first token", format: seconds }),
      new Chart(pair("tpot"), { title: "Time per output token", format: seconds }),
      new Chart([
        { name: "running", label: "running", color: "s1", fill: true },
        { name: "waiting", label: "waiting", color: "s2" },
      ], { title: "Requests", format: short }),
      new Chart([
        { name: "kv", label: "KV in use", color: "s1", fill: true },
        { name: "prefix_hit", label: "prefix hits", color: "s3" },
      ], { title: "Cache", format: percent, range: [0, 1] }),
      new Chart([
        { name: "refused_ps", label: "refused", color: "s2" },
        { name: "errors_ps", label: "failed", color: "s4" },
        { name: "preemptions_ps", label: "preempted", color: "s3" },
      ], { title: "Refusals, failures and preemptions per second", format: short }),
      this.processors,
      this.memory,
      this.speculation,
      new Chart([{ name: "usd_per_million", label: "idle time included", color: "s1" }], { title: "Dollars per million tokens", format: dollars }),
      this.power,
    ];
  }

  show(data, points) {
    const { columns } = points;
    this.facts.replaceChildren(...facts([...Object.entries(data.facts ?? {}),
      ["price", data.cost ? `${dollars(data.cost.usd_per_hour)} an hour for ${data.cost.hardware}, declared ${data.cost.declared}` : ""]]));
    this.#tiles(data, points);
    this.speculation.element.hidden = !data.counters.draft_tokens;
    this.power.element.hidden = !data.cost;
    this.processors.element.hidden = data.counters.cpu_seconds === undefined;
    this.memory.element.hidden = data.gauges.memory === undefined;
    this.power.series[0].text.data = data.cost?.joules_source ?? "";
    this.draftNote.textContent = `${short(data.counters.accepted_tokens / data.counters.drafts)} tokens accepted a step`;
    for (const chart of this.charts) if (!chart.element.hidden) chart.show(columns);
    this.heat.show(data.now, data.experts ?? {}, data.layers);
    this.#accounts(data.cost);
  }

  #tiles(data, points) {
    const t = this.tiles;
    const last = (name) => points.last(name);
    t.output.show(short(last("generation_tps") ?? 0), `prompt ${rate(last("prompt_tps"))}`);
    const cost = data.cost;
    const idle = !last("generation_tps") && !last("prompt_tps"); // then a price would be that of waiting
    t.price.show(idle ? "–" : dollars(last("usd_per_million")), cost ? idle ? "idle now" : `${dollars(cost.usd_per_million_tokens)} since the start` : "no prices");
    t.ttft.show(seconds(last("ttft_p50")), `95 % within ${seconds(last("ttft_p95"))}`);
    t.tpot.show(seconds(last("tpot_p50")), `95 % within ${seconds(last("tpot_p95"))}`);
    t.load.show(short(data.gauges.running), `${short(data.gauges.waiting)} waiting`);
    const c = data.counters;
    const hits = c.prefix_cache_queries ? c.prefix_cache_hits / c.prefix_cache_queries : null;
    t.kv.show(percent(data.gauges.kv), `prefix hits ${percent(hits)}`, data.gauges.kv);
  }

  #accounts(cost) {
    this.accountsCard.hidden = !cost;
    if (!cost) return;
    const whole = cost.idle_usd != null; // only an admin key sees what others spend
    this.costNote.textContent = `energy ${cost.joules_source}; ` + (whole
      ? `busy ${percent(cost.utilization)} of the time; saved by cached prompts ${dollars(cost.saved_usd)} (estimated)`
      : "the spending of your key");
    const spent = cost.accounts.map((a) => [a.api_key || "–", short(a.requests), short(a.prompt_tokens), short(a.output_tokens),
      dollars(a.prefill_usd), dollars(a.decode_usd), dollars(a.prefill_usd + a.decode_usd), joules(a.joules)]);
    const idle = whole ? [["idle time", "", "", "", "", "", dollars(cost.idle_usd), ""]] : [];
    this.accounts.replaceChildren(...rows(COLUMNS, spent), ...rows(COLUMNS, idle, "tr.muted"),
      ...rows(COLUMNS, [[whole ? "all" : "sum", "", "", "", "", "", dollars(cost.usd), joules(cost.joules)]]));
  }
}
