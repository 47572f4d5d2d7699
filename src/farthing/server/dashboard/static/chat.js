// The playground: a chat or a completion, streamed, with what it took and cost.
import { get, stream } from "./api.js";
import { dollars, h, known, seconds, short } from "./dom.js";

export class Playground {
  constructor() {
    this.history = [];
    this.mode = "chat";
    this.talk = h("div.talk", { role: "log", ariaLive: "polite" });
    this.input = h("textarea", { rows: 2, ariaLabel: "Prompt", onkeydown: (e) => this.#keys(e) });
    this.tokens = h("input", { type: "number", min: 1, value: 128 });
    this.temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
    this.send = h("button.primary", { type: "submit" }, "Send");
    this.modes = ["chat", "completion"].map((mode) =>
      h("button", { type: "button", onclick: () => this.#choose(mode) }, mode === "chat" ? "Chat" : "Completion"));
    this.clear = h("button.quiet", { type: "button", onclick: () => this.#reset() }, "Clear");
    this.element = h("section.card.play", {},
      h("header", {}, h("h2", {}, "Try it"), h("span.segments", {}, ...this.modes), h("span.end", {}, this.clear)),
      this.talk,
      h("form.ask", { onsubmit: (e) => this.#submit(e) }, this.input,
        h("div.row", {}, h("label", {}, "Max tokens", this.tokens), h("label", {}, "Temperature", this.temperature), this.send)));
    this.#choose("chat");
  }

  #choose(mode) {
    this.mode = mode;
    this.modes.forEach((b) => (b.ariaPressed = String(b.textContent.toLowerCase() === mode)));
    this.input.placeholder = mode === "chat" ? "Ask something. Enter sends, Shift+Enter starts a new line." : "Start a text or a program; the model continues it.";
    this.input.classList.toggle("code", mode === "completion");
    this.#reset();
  }

  #reset() {
    this.abort?.abort();
    this.history = [];
    this.talk.replaceChildren(h("p.empty", {}, this.mode === "chat" ? "Nothing said yet." : "Nothing completed yet."));
  }

  #keys(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.mode === "completion" && !event.ctrlKey) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  }

  async #submit(event) {
    event.preventDefault();
    if (this.abort) return this.abort.abort();
    const text = this.mode === "chat" ? this.input.value.trim() : this.input.value;
    if (!text) return;
    this.talk.querySelector(".empty")?.remove();
    this.abort = new AbortController();
    this.send.textContent = "Stop";
    const answer = this.#begin(text);
    try {
      await this.#run(text, answer);
    } catch (error) {
      if (error.name !== "AbortError") this.talk.append(h("p.problem", {}, error.message));
    } finally {
      answer.classList.remove("running");
      this.abort = null;
      this.send.textContent = "Send";
    }
  }

  #begin(text) {
    const answer = h("div.answer.running");
    if (this.mode === "chat") {
      this.talk.append(h("div.said", {}, text));
      this.input.value = "";
    } else {
      answer.classList.add("code");
      answer.append(h("span.given", {}, text));
    }
    this.talk.append(answer);
    this.#scroll();
    return answer;
  }

  async #run(text, answer) {
    this.model ??= (await get("/v1/models")).data[0].id;
    const chat = this.mode === "chat";
    const body = {
      model: this.model, stream: true, stream_options: { include_usage: true }, x_farthing: true,
      max_tokens: Number(this.tokens.value) || 128, temperature: Number(this.temperature.value) || 0,
    };
    if (chat) body.messages = [...this.history, { role: "user", content: text }];
    else body.prompt = text;
    const began = performance.now();
    const seen = { text: "", first: null, usage: null };
    const parts = this.#parts(answer);
    for await (const event of stream(chat ? "/v1/chat/completions" : "/v1/completions", body, this.abort.signal)) {
      seen.usage = event.usage ?? seen.usage;
      const choice = event.choices?.[0];
      const delta = choice?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning;
      const piece = chat ? delta.content : choice?.text;
      if (thought || piece) seen.first ??= performance.now();
      if (thought) parts.think(thought);
      if (piece) parts.say(piece);
      seen.text += piece ?? "";
      if (thought || piece) this.#scroll();
    }
    if (chat) this.history.push({ role: "user", content: text }, { role: "assistant", content: seen.text });
    answer.after(h("div.used", {}, used(seen, began)));
    this.#scroll();
  }

  /** Where thoughts and text go; text nodes are extended, never parsed. */
  #parts(answer) {
    let thoughts = null;
    const text = document.createTextNode("");
    answer.append(text);
    return {
      think: (piece) => {
        if (!thoughts) answer.prepend((thoughts = h("details", { open: true }, h("summary", {}, "Thinking"))));
        thoughts.append(piece);
      },
      say: (piece) => text.appendData(piece),
    };
  }

  #scroll() {
    this.talk.scrollTop = this.talk.scrollHeight;
  }
}

function used(seen, began) {
  const tokens = seen.usage?.completion_tokens;
  const spent = (performance.now() - (seen.first ?? began)) / 1e3;
  const cost = seen.usage?.x_farthing?.usd;
  return [
    known(tokens) ? `${tokens} tokens` : null,
    known(tokens) && tokens > 1 && spent > 0 ? `${short((tokens - 1) / spent)} tokens/s` : null,
    seen.first ? `first after ${seconds((seen.first - began) / 1e3)}` : null,
    known(cost) ? dollars(cost) : null,
  ].filter(Boolean).join(" · ");
}
