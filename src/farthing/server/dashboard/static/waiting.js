// What is waited for: a model that is being loaded, and a prompt that is being read.
import { get } from "./api.js";
import { h, percent, short } from "./dom.js";

const [SOON, EVERY] = [700, 500]; // milliseconds before the first question about a prompt, and between two

/** Says what is waited for, with a bar where it is known how far it is. Only the words are read aloud. */
export class Waiting {
  constructor(label) {
    this.words = h("span", { role: "status" });
    this.far = h("span", { ariaHidden: "true" });
    this.bar = h("progress", { max: 1, ariaLabel: label });
    this.element = h("div.waiting", { hidden: true }, this.words, this.far, this.bar);
  }

  /** share: from 0 to 1, if it is known. */
  show(words, share = null) {
    this.element.hidden = !words;
    if (this.words.textContent !== words) this.words.textContent = words;
    this.bar.hidden = share === null;
    this.far.textContent = share === null ? "" : percent(Math.floor(share * 100) / 100);
    this.bar.value = share ?? 0;
  }
}

/** Until over(), call show(words, share) with how much of a chat's prompt has been read. */
export async function prompt(id, model, over, show) {
  const address = `/dashboard/data?since=1e12&reading=${id}&model=${encodeURIComponent(model)}`;
  for (let pause = SOON; ; pause = EVERY) {
    await new Promise((done) => setTimeout(done, pause));
    if (over()) return;
    const { reading } = await get(address).catch(() => ({ reading: {} })); // not loaded yet, perhaps
    if (over() || !reading) return; // a gateway knows nothing of prompts
    const { read, total } = reading;
    if (total) show(`Reading the prompt of ${short(total)} tokens`, read / total);
  }
}
