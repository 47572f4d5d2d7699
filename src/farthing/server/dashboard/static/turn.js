// How one turn of a conversation looks: what was said, thought and called, and what can be done with it.
import { copyButton, h, seconds } from "./dom.js";
import { folded } from "./files.js";
import { Markdown } from "./markdown.js";
import { used } from "./reply.js";
import { Waiting } from "./waiting.js";

const MOST = 50; // turns after a message until tools that are always allowed need a question again

/** actions: edit(turn, text), again(turn), show(turn), results(turn, [{answers, name, text}]), key(), tools. */
export class TurnView {
  constructor(conversation, turn, actions) {
    Object.assign(this, { conversation, turn, actions });
    this.element = h(`article.turn.${turn.role}`, { "aria-label": { user: "You", assistant: "The model", tool: "Result" }[turn.role] });
    if (turn.role === "assistant") this.#answer();
    else this.#said();
  }

  #said() {
    const { turn } = this;
    const text = turn.role === "tool" ? h("details", {}, h("summary", {}, `Result of ${turn.name}`), h("pre", {}, turn.text)) : h("div.bubble", { hidden: !turn.text }, turn.text);
    const edit = turn.role === "user" ? h("button", { type: "button", onclick: () => this.edit() }, "Edit") : null;
    this.element.replaceChildren(...folded(turn.files), text, h("footer", {}, this.#forks(), copyButton(() => turn.text), edit));
  }

  edit() {
    const { turn } = this;
    const input = h("textarea", { value: turn.text, rows: Math.min(12, turn.text.split("\n").length + 1), ariaLabel: "Edit the message" });
    const send = () => input.value.trim() && this.actions.edit(turn, input.value);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#said();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.element.replaceChildren(h("div.editing", {}, input, h("footer", {},
      h("button", { type: "button", onclick: () => this.#said() }, "Cancel"),
      h("button.primary", { type: "button", onclick: send }, "Send"))));
    input.focus();
  }

  #answer() {
    this.thoughts = new Markdown();
    this.summary = h("summary");
    this.folded = h("details.thoughts", { hidden: true }, this.summary, this.thoughts.element);
    this.text = new Markdown();
    this.waiting = new Waiting("The prompt");
    this.calls = h("div.calls");
    this.problem = h("div.problem", { role: "alert", hidden: true });
    this.used = h("span.used");
    this.tools = h("footer", {});
    this.element.append(this.folded, this.text.element, this.calls, this.problem, this.used, this.tools);
    this.update(false);
  }

  /** Show what the turn has become. */
  update(running) {
    const { turn } = this;
    this.streamed ||= running; // now, and not in a conversation that is read again
    this.element.classList.toggle("running", running);
    if (running && !turn.first) this.text.element.before(this.waiting.element);
    else this.waiting.element.remove();
    this.folded.hidden = !turn.thoughts;
    if (turn.thoughts) {
      this.thoughts.show(turn.thoughts);
      this.summary.textContent = turn.thought ? `Thought for ${seconds(turn.thought)}` : running ? "Thinking" : "Thoughts";
    }
    this.text.show(turn.text);
    if (turn.calls?.length) this.#calls(running);
    if (!running) this.#ended();
  }

  #calls(running) {
    const answered = new Set(this.conversation.turns.filter((each) => each.role === "tool" && this.conversation.path().includes(each)).map((each) => each.answers));
    const open = running ? [] : this.turn.calls.filter((call) => !answered.has(call.id));
    const path = this.conversation.path();
    const { tools } = this.actions;
    const asks = (call) => path.at(-1) === this.turn && tools.has(call.function.name);
    const always = this.streamed && path.length - path.findLastIndex((each) => each.role === "user") < MOST;
    const inputs = open.map((call) => asks(call) ? tools.question(call, always, () => open.every(asks) && send()) : h("textarea", { rows: 2, name: call.id, placeholder: `Result of ${call.function.name}`, ariaLabel: `Result of ${call.function.name}` }));
    const shown = this.turn.calls.map((call) => h("details.call", { open: running || open.includes(call) },
      h("summary", {}, "Calls ", h("b", {}, call.function.name)), h("pre", { tabIndex: 0 }, pretty(call.function.arguments))));
    const send = () => inputs.every((each) => each.value !== null) && this.actions.results(this.turn, open.map((call, i) => ({ answers: call.id, name: call.function.name, text: inputs[i].value })));
    this.calls.replaceChildren(...shown, ...inputs, ...(open.every(asks) ? [] : [h("button.primary", { type: "button", onclick: send }, "Send results")]));
  }

  #ended() {
    const { turn } = this;
    const again = h("button", { type: "button", onclick: () => this.actions.again(turn) }, turn.problem ? "Try again" : "Regenerate");
    const key = turn.problem?.status === 401 ? h("button", { type: "button", onclick: () => this.actions.key() }, "Enter a key") : null;
    this.used.textContent = used(turn);
    this.problem.hidden = !turn.problem;
    if (turn.problem) this.problem.replaceChildren(...said(turn.problem));
    this.tools.replaceChildren(...[this.#forks(), turn.text ? copyButton(() => turn.text) : null, again, key].filter(Boolean));
  }

  /** Which of several versions this turn is, with a way to the others. */
  #forks() {
    const all = this.conversation.siblings(this.turn);
    const at = all.indexOf(this.turn);
    if (all.length < 2) return null;
    const to = (step, label, sign) => h("button", { type: "button", ariaLabel: label, disabled: !all[at + step], onclick: () => this.actions.show(all[at + step]) }, sign);
    return h("span.forks", {}, to(-1, "Earlier version", "‹"), `${at + 1}/${all.length}`, to(1, "Later version", "›"));
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** A problem and the next step. */
function said({ message, status, code, wait }) {
  const next = code === "context_length_exceeded" ? "Edit an earlier message, lower the limit of tokens, or start a new chat."
    : status === 429 ? `Too much at once: try again ${wait ? `in ${seconds(wait)}` : "a little later"}.` : "";
  return [h("p", {}, message), ...(next ? [h("p", {}, next)] : [])];
}
