// What is sent with every message: model and thinking next to the message, the rest in a dialog.
import { get, post } from "./api.js";
import { settings } from "./conversations.js";
import { h } from "./dom.js";
import { SAMPLING } from "./reply.js";
import { Tools } from "./tools.js";

const THINKING = { "": "Thinking: auto", none: "Thinking off", on: "Thinking on", low: "Thinking: low", medium: "Thinking: medium", high: "Thinking: high" };

export class Settings {
  /** full(): called when the browser has no room for them. */
  constructor(full) {
    this.full = full;
    this.values = settings.get();
    const keep = (name) => (event) => this.#set(name, event.target.value);
    const number = (name, label, more) => h("label", {}, label, h("input", { type: "number", name, value: this.values[name], placeholder: "the model's", oninput: keep(name), ...more }));
    this.model = h("select", { ariaLabel: "Model", onchange: (event) => { this.#set("model", event.target.value); this.#able(); } });
    this.thinking = h("select", { ariaLabel: "Thinking", onchange: keep("thinking") },
      ...Object.entries(THINKING).map(([value, label]) => h("option", { value, selected: value === this.values.thinking }, label)));
    this.fault = h("p.problem", { role: "alert" });
    this.tools = h("textarea.mono", { rows: 5, name: "tools", value: this.values.tools, spellcheck: false, placeholder: '[{"type": "function", "function": {"name": …}}]', oninput: (event) => this.#json("tools", event) });
    this.other = h("textarea.mono", { rows: 2, name: "other", value: this.values.other, spellcheck: false, placeholder: '{"ignore_eos": true}', oninput: (event) => this.#json("other", event) });
    this.offered = new Tools();
    this.mcp = h("label.check", { hidden: true });
    this.dialog = h("dialog.settings", { "aria-labelledby": "settings-title" }, h("form", { method: "dialog" },
      h("h2", { id: "settings-title" }, "Settings"),
      h("label", {}, "System prompt", h("textarea", { rows: 4, name: "system", value: this.values.system, oninput: keep("system") })),
      h("div.pairs", {},
        ...SAMPLING.map((each) => number(...each))),
      h("label", {}, "Stop at any of these texts, one a line", h("textarea.mono", { rows: 2, name: "stop", value: this.values.stop, spellcheck: false, oninput: keep("stop") })),
      h("label", {}, "Other fields of a request (JSON), such as logit_bias", this.other),
      h("label", {}, "Tools that the model may call (JSON); you give their results", this.tools), this.mcp, this.fault,
      h("menu", {}, h("button.primary", { type: "submit" }, "Done"))));
    this.open = h("button.quiet", { type: "button", onclick: () => this.dialog.showModal() }, "Settings");
    this.row = [this.model, this.thinking, this.open];
    document.body.append(this.dialog);
  }

  /** Ask the server for its models. Throws what the request throws. */
  async load() {
    const [{ data }] = await Promise.all([get("/v1/models"), this.offered.load()]);
    const names = data.map((each) => each.id);
    this.several = data.some((each) => each.state); // each loaded when it is asked for
    if (!names.includes(this.values.model)) this.values.model = names[0] ?? "";
    this.model.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === this.values.model }, name)));
    this.#able();
    this.mcp.hidden = !this.offered.found.length;
    this.mcp.replaceChildren(h("input", { type: "checkbox", name: "mcp", checked: Boolean(this.values.mcp), onchange: (event) => this.#set("mcp", event.target.checked ? "on" : "") }),
      `Tools of MCP servers, each call after a question: ${this.offered.found.map(({ tool }) => tool.function.name).join(", ")}`);
  }

  /** What a request takes: thinking is kept for models that can. */
  get chosen() {
    const offered = this.values.mcp ? this.offered.found.map(({ tool }) => tool) : [];
    return { ...this.values, offered, thinking: this.thinking.hidden ? "" : this.values.thinking };
  }

  #set(name, value) {
    this.values[name] = value;
    if (!settings.set(this.values)) this.full();
  }

  /** Offer thinking only where the chosen model can; also where the server does not say. */
  async #able() {
    const { model } = this.values;
    let able = true;
    try {
      able = (await post("/api/show", { model })).capabilities.includes("thinking");
    } catch {
      // a gateway, or a model that is still being loaded
    }
    if (model === this.values.model) this.thinking.hidden = !able;
  }

  /** Keep a text that is JSON: a list of tools, or an object of other fields. */
  #json(name, { target }) {
    const [isRight, expected] = name === "tools" ? [Array.isArray, "a list of tools"]
      : [(value) => value && typeof value === "object" && !Array.isArray(value), "an object"];
    this.fault.textContent = "";
    try {
      if (target.value.trim() && !isRight(JSON.parse(target.value))) throw new Error(`expected ${expected}`);
      this.#set(name, target.value);
    } catch (error) {
      this.fault.textContent = `${name === "tools" ? "Tools" : "Other fields"}: ${error.message}`;
    }
  }
}
