// Larger models that fit this machine, and a button that downloads one: where only this machine reaches the server.
import { get, post } from "./api.js";
import { bytes, h, LOCAL, seconds, short } from "./dom.js";
import { Waiting } from "./waiting.js";

const EVERY = 1000; // milliseconds between two questions about a download

export class Pulls {
  constructor() {
    this.waiting = new Waiting("The download");
    this.ask = h("button.quiet", { type: "button", onclick: () => this.#look() }, "Larger models that fit");
    this.list = h("ul.pulls", { ariaLabel: "Larger models that fit" });
    this.said = h("p", { role: "status" });
    this.element = h("div.larger", { hidden: !LOCAL }, this.ask, this.list, this.said, this.waiting.element);
  }

  async #look() {
    this.#say("Measuring this machine …");
    await this.#try(async () => {
      const { models, pull } = await get("/dashboard/models", 60000);
      this.list.replaceChildren(...models.map((each) => this.#entry(each)));
      this.#say(models.length ? "Estimates, from this machine's memory and processor." : "None: this is the largest of those that fit and are not slow.");
      if (pull?.what) await this.#follow(pull);
    });
  }

  #entry({ name, download, memory, tokens_per_second: speed, first_answer: first, here }) {
    const fetch = here ? h("span", {}, "on this machine") : h("button.quiet", { type: "button", ariaLabel: `Download ${name}`, onclick: () => this.#pull(name) }, "Download");
    return h("li", {}, h("b", {}, name), h("span", {}, `${bytes(download)} to download · ${bytes(memory)} of memory · ${short(Math.round(speed))} tokens/s · first token after ${seconds(first)}`), fetch);
  }

  #pull(name) {
    return this.#try(async () => this.#follow(await post("/dashboard/pull", { model: name })));
  }

  /** Show a download until it ends. */
  async #follow(pull) {
    for (const button of this.list.querySelectorAll("button")) button.disabled = true;
    for (let now = pull; ; now = await get("/dashboard/pull")) {
      this.waiting.show(now.what && `${now.model}: ${now.what}`, now.total ? now.done / now.total : null);
      if (!now.what) {
        this.#say(now.error ? `${now.model}: ${now.error}` : `${now.model} is on this machine now. This server keeps the model that it has: end it (farthing stop), then type farthing serve --fit ${now.model}`);
        break;
      }
      this.said.textContent = "";
      await new Promise((done) => setTimeout(done, EVERY));
    }
    for (const button of this.list.querySelectorAll("button")) button.disabled = false;
  }

  async #try(action) {
    try {
      await action();
    } catch (error) {
      this.waiting.show("");
      this.#say(error.message);
    }
  }

  #say(text) {
    this.said.textContent = text;
  }
}
