// A card with curves over time: uPlot, our colours, and a legend that follows the cursor.
/* global uPlot */
import { clock, h, known } from "./dom.js";
import { colour, onTheme } from "./theme.js";

const TICKS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
const charts = new Set();
onTheme(() => charts.forEach((chart) => chart.redraw()));

const USUAL = 0.97; // share of the values that an axis shows whole
const SPIKE = 3; // times the largest of them: what is drawn beyond the axis, with its value

const sync = () => ({ key: "time", setSeries: false });

/** A theme colour (#rrggbb) with an alpha. */
const fade = (name, alpha) => colour(name) + Math.round(alpha * 255).toString(16).padStart(2, "0");

export class Chart {
  /**
   * series: [{name, label, color: "s1", format, fill: bool, dash: [..], step: bool}], band: [high, low, color]
   * options: {title, hint, format, height: "tall", range: [min, max], future: bool, end: Element}
   */
  constructor(series, options) {
    this.series = series;
    this.options = options;
    this.values = series.map(() => h("b"));
    this.plot = h(options.tall ? "div.plot.tall" : "div.plot");
    this.legend = h("div.legend", {}, ...series.map((s, i) => this.#key(s, i)));
    this.element = h(options.tall ? "section.card.chart.big" : "section.card.chart", {},
      h("header", {}, h("h2", {}, options.title), options.hint ? h("span.hint", {}, options.hint) : null, this.legend, options.end ?? null),
      this.plot);
    this.data = [[], ...series.map(() => [])];
    new ResizeObserver(() => this.#fit()).observe(this.plot);
    charts.add(this);
  }

  /** columns: {t: […], name: […]}, each as long as t. min, max: of the time axis; now: where a line stands. */
  show(columns, { min, max, now } = {}) {
    this.now = now;
    this.data = [columns.t, ...this.series.map((s) => columns[s.name] ?? columns.t.map(() => null))];
    this.window = [min ?? columns.t[0], max ?? columns.t.at(-1)];
    if (this.u) this.u.setData(this.data);
    else this.#fit();
    this.#legend(null);
  }

  redraw() {
    this.u?.redraw(true, true);
  }

  #key(series) {
    const value = this.values[this.series.indexOf(series)];
    series.text = document.createTextNode(series.label);
    return h("span", { hidden: Boolean(series.band) }, h("i", { style: { background: `var(--${series.color})` } }), series.text, value);
  }

  #fit() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!width || !this.data[0].length) return;
    if (this.u) this.u.setSize({ width, height });
    else this.u = new uPlot(this.#settings(width, height), this.data, this.plot);
  }

  #settings(width, height) {
    const format = this.options.format;
    const axis = {
      stroke: () => colour("ink-3"), font: "11px system-ui, sans-serif",
      grid: { stroke: () => colour("grid"), width: 1 }, ticks: { show: false },
    };
    return {
      width, height,
      padding: [8, 6, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 8 }, drag: { x: false, y: false }, sync: this.options.future ? undefined : sync() },
      scales: { x: { time: true, range: () => this.window }, y: { range: (u, low, high) => this.#range(low, high) } },
      series: [{}, ...this.series.map((s) => this.#line(s))],
      bands: this.series.flatMap((s, i) => (s.band ? [{ series: [i + 1, this.series.findIndex((o) => o.name === s.band) + 1], fill: () => fade(s.color, 0.18) }] : [])),
      axes: [
        { ...axis, grid: { show: false }, space: 62, size: 26, incrs: TICKS, values: (u, ticks, at, space, step) => ticks.map((t) => clock(t).slice(0, step < 60 ? 8 : 5)) },
        { ...axis, size: 54, space: 34, values: (u, ticks) => ticks.map((tick) => format(tick)) },
      ],
      hooks: { setCursor: [(u) => this.#legend(u.cursor.idx)], draw: [(u) => this.#now(u), (u) => this.#spikes(u)] },
    };
  }

  #line(series) {
    return {
      stroke: () => (series.band ? fade(series.color, 0.45) : colour(series.color)),
      width: series.band ? 1 : 2,
      dash: series.dash,
      points: { show: false },
      spanGaps: Boolean(series.span),
      paths: series.step ? uPlot.paths.stepped({ align: 1 }) : undefined,
      fill: series.fill ? () => fade(series.color, 0.12) : undefined,
    };
  }

  #range(low, high) {
    if (this.options.range) return this.options.range;
    if (!known(high) || high <= 0) return [0, 1];
    const values = this.data.slice(1).flat().filter((value) => known(value) && value > 0).sort((a, b) => a - b);
    const usual = values[Math.floor((values.length - 1) * USUAL)] ?? high;
    return [0, (high > SPIKE * usual ? usual * 1.5 : high) * 1.12];
  }

  /** Marks above the axis where it cuts off a spike: a triangle and the largest value. */
  #spikes(u) {
    const top = u.scales.y.max;
    const ratio = devicePixelRatio;
    this.series.forEach((s, i) => {
      const values = this.data[i + 1];
      for (let at = 0; at < values.length; at += 1) {
        if (!(values[at] > top)) continue;
        let peak = at;
        for (; values[at] > top; at += 1) if (values[at] > values[peak]) peak = at;
        const x = u.valToPos(this.data[0][peak], "x", true);
        const y = u.bbox.top;
        u.ctx.save();
        u.ctx.fillStyle = colour(s.color);
        u.ctx.beginPath();
        u.ctx.moveTo(x - 5 * ratio, y + 8 * ratio);
        u.ctx.lineTo(x + 5 * ratio, y + 8 * ratio);
        u.ctx.lineTo(x, y);
        u.ctx.fill();
        u.ctx.font = `${11 * ratio}px system-ui, sans-serif`;
        const right = x > u.bbox.left + u.bbox.width / 2;
        u.ctx.textAlign = right ? "right" : "left";
        u.ctx.fillText((s.format ?? this.options.format)(values[peak]), x + (right ? -8 : 8) * ratio, y + 9 * ratio);
        u.ctx.restore();
      }
    });
  }

  /** What the legend says: under the cursor, else now. A forecast holds until its next step. */
  #legend(index) {
    const now = this.options.future ? this.data[0].findLastIndex((_, i) => known(this.data[1][i])) : this.data[0].length - 1;
    this.series.forEach((s, i) => {
      const values = this.data[i + 1];
      let at = index ?? now;
      while (s.span && at >= 0 && !known(values[at])) at -= 1;
      if (at < 0) at = values.findIndex(known);
      this.values[i].textContent = (s.format ?? this.options.format)(values[at]);
    });
  }

  /** A line between what was and what is forecast. */
  #now(u) {
    if (!known(this.now)) return;
    const x = Math.round(u.valToPos(this.now, "x", true));
    u.ctx.save();
    u.ctx.strokeStyle = colour("ink-3");
    u.ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    u.ctx.restore();
  }
}
