// Experts: one labelled row per layer, one column per expert; the color is the load relative to the layer's mean.
import { h, short } from "./dom.js";
import { isDark, onTheme } from "./theme.js";

const LIGHT = ["#f3f1ea", "#cfe0f8", "#94bbef", "#4f8ce0", "#1f5dbd", "#0c3474"];
const DARK = ["#1b1f27", "#1d3358", "#24539b", "#3a7ce0", "#7fb0ff", "#dceaff"];
const TOP = 3; // times the mean; all above has the last colour
const WINDOW = 60; // seconds

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function shade(value) {
  const ramp = (isDark() ? DARK : LIGHT).map(rgb);
  const place = Math.min(Math.max(value / TOP, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[low].map((c, i) => Math.round(c + (ramp[low + 1][i] - c) * (place - low)));
}

export class HeatMap {
  constructor() {
    this.canvas = h("canvas", { role: "img", "aria-label": "Tokens of each expert in each layer" });
    this.names = h("div.names", { ariaHidden: "true" });
    this.summary = h("span.hint");
    this.ramp = h("i");
    this.tip = h("div.tip", { hidden: true });
    this.since = "minute";
    this.buttons = ["minute", "start"].map((name) =>
      h("button", { type: "button", onclick: () => this.#choose(name), ariaPressed: String(name === this.since) }, name === "minute" ? "Last minute" : "Since start"));
    this.element = h("section.card", {},
      h("header", {}, h("h2", {}, "Experts"), this.summary, h("span.segments.end", {}, ...this.buttons)),
      h("div.heat", {}, this.names, h("div.cells", {}, this.canvas)),
      h("div.scale", {}, h("span", {}, "0"), this.ramp, h("span", {}, `${TOP} × the layer's mean and more`),
        h("span.hint", {}, "a column is an expert")));
    document.body.append(this.tip);
    this.past = [];
    this.canvas.addEventListener("pointermove", (event) => this.#hover(event));
    this.canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    onTheme(() => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(this.canvas.parentElement);
  }

  /** hidden: layers of the model; those above draft tokens. */
  show(now, experts, hidden) {
    this.hidden = hidden ?? Infinity;
    const layers = Object.keys(experts).map(Number).sort((a, b) => a - b);
    this.element.hidden = !layers.length;
    if (!layers.length) return;
    this.layers = layers;
    this.past = this.past.filter((entry) => entry.now > now - WINDOW && entry.now < now);
    this.past.push({ now, experts });
    this.total = experts;
    this.#draw();
  }

  #choose(name) {
    this.since = name;
    this.buttons.forEach((b, i) => (b.ariaPressed = String(["minute", "start"][i] === name)));
    this.#draw();
  }

  #tokens(layer) {
    const now = this.total[layer];
    const before = this.since === "minute" && this.past.length > 1 ? this.past[0].experts[layer] : null;
    return before && now.every((n, i) => n >= before[i]) ? now.map((n, i) => n - before[i]) : now;
  }

  #draw() {
    if (!this.layers) return;
    this.rows = this.layers.map((layer) => this.#tokens(layer));
    const columns = Math.max(...this.rows.map((row) => row.length));
    const width = Math.floor(this.canvas.parentElement.clientWidth);
    const ratio = devicePixelRatio || 1;
    const cell = width / columns;
    const tall = Math.max(5, Math.min(cell, 22, 420 / this.rows.length));
    this.canvas.style.height = `${tall * this.rows.length}px`;
    this.canvas.width = width * ratio;
    this.canvas.height = Math.round(tall * this.rows.length * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    this.#label(tall);
    const gap = cell > 7 ? 2 : cell > 3.5 ? 1 : 0;
    this.rows.forEach((row, y) => {
      const mean = row.reduce((a, b) => a + b, 0) / row.length;
      row.forEach((tokens, x) => {
        context.fillStyle = `rgb(${shade(mean ? tokens / mean : 0)})`;
        context.fillRect(x * cell, y * tall, cell - gap, tall - (gap || 0.5));
      });
    });
    this.#legend();
  }

  #name(layer) {
    return layer < this.hidden ? `layer ${layer}` : `draft layer ${layer}`;
  }

  /** Name as many rows as there is room for, and always those that draft. */
  #label(tall) {
    const step = Math.ceil(13 / tall);
    this.names.replaceChildren(...this.layers.map((layer, y) => {
      const name = layer >= this.hidden ? "draft" : y % step ? "" : String(layer);
      return h("span", { title: this.#name(layer), style: { height: `${tall}px`, lineHeight: `${tall}px` } }, name);
    }));
  }

  #legend() {
    const ramp = isDark() ? DARK : LIGHT;
    this.ramp.style.background = `linear-gradient(to right, ${ramp.join(",")})`;
    const active = this.rows.filter((row) => row.some(Boolean));
    if (!active.length) {
      this.summary.textContent = "no tokens in the last minute";
      return;
    }
    const uneven = active.map((row) => Math.max(...row) / (row.reduce((a, b) => a + b, 0) / row.length));
    const idle = active.flat().filter((n) => n === 0).length;
    this.summary.textContent =
      `busiest expert ${short(uneven.reduce((a, b) => a + b, 0) / uneven.length)} × the mean · ${idle} of ${active.flat().length} idle`;
  }

  #hover(event) {
    if (!this.rows) return;
    const box = this.canvas.getBoundingClientRect();
    const y = Math.floor(((event.clientY - box.top) / box.height) * this.rows.length);
    const row = this.rows[y];
    const x = row ? Math.floor(((event.clientX - box.left) / box.width) * row.length) : -1;
    if (!row || row[x] === undefined) return;
    const mean = row.reduce((a, b) => a + b, 0) / row.length;
    this.tip.replaceChildren(h("b", {}, `${this.#name(this.layers[y])}, expert ${x}`), h("br"),
      `${short(row[x])} tokens · ${mean ? short(row[x] / mean) : 0} × the mean`);
    this.tip.hidden = false;
    const left = Math.min(event.clientX + 12, innerWidth - this.tip.offsetWidth - 8);
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${event.clientY + 14}px`;
  }
}
