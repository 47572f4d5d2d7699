// What is sent with every message: model and thinking next to the message, the rest in a dialog.
import { get } from "./api.js";
import { settings } from "./conversations.js";
import { h } from "./dom.js";

const THINKING = { "": "Thinking: auto", none: "Thinking off", on: "Thinking on", low: "Thinking: low", medium: "Thinking: medium", high: "Thinking: high" };

export class Settings {
  /** full(): called when the browser has no room for them. */
  constructor(full) {
    this.full = full;
    this.values = settings.get();
    const keep = (name) => (event) => this.#set(name, event.target.value);
    const number = (name, label, more) => h("label", {}, label, h("input", { type: "number", value: this.values[name], placeholder: "the model's", oninput: keep(name), ...more }));
    this.model = h("select", { ariaLabel: "Model", onchange: keep("model") });
    this.thinking = h("select", { ariaLabel: "Thinking", onchange: keep("thinking") },
      ...Object.entries(THINKING).map(([value, label]) => h("option", { value, selected: value === this.values.thinking }, label)));
    this.fault = h("p.problem", { role: "alert" });
    this.tools = h("textarea.mono", { rows: 5, value: this.values.tools, spellcheck: false, placeholder: '[{"type": "function", "function": {"name": …}}]', oninput: (event) => this.#tools(event) });
    this.dialog = h("dialog.settings", { "aria-labelledby": "settings-title" }, h("form", { method: "dialog" },
      h("h2", { id: "settings-title" }, "Settings"),
      h("label", {}, "System prompt", h("textarea", { rows: 4, value: this.values.system, oninput: keep("system") })),
      h("div.pairs", {},
        number("max_tokens", "Max tokens", { min: 1, placeholder: "the context's" }), number("temperature", "Temperature", { min: 0, max: 2, step: 0.1 }),
        number("top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }), number("seed", "Seed", { placeholder: "random" })),
      h("label", {}, "Tools that the model may call (JSON); you give their results", this.tools), this.fault,
      h("menu", {}, h("button.primary", { type: "submit" }, "Done"))));
    this.open = h("button.quiet", { type: "button", onclick: () => this.dialog.showModal() }, "Settings");
    this.row = [this.model, this.thinking, this.open];
    document.body.append(this.dialog);
  }

  /** Ask the server for its models. Throws what the request throws. */
  async load() {
    const { data } = await get("/v1/models");
    const names = data.map((each) => each.id);
    if (!names.includes(this.values.model)) this.values.model = names[0] ?? "";
    this.model.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === this.values.model }, name)));
  }

  #set(name, value) {
    this.values[name] = value;
    if (!settings.set(this.values)) this.full();
  }

  #tools({ target }) {
    this.fault.textContent = "";
    try {
      if (target.value.trim() && !Array.isArray(JSON.parse(target.value))) throw new Error("expected a list of tools");
      this.#set("tools", target.value);
    } catch (error) {
      this.fault.textContent = `Tools: ${error.message}`;
    }
  }
}
