// The chat: the list of conversations, the one that is shown, and the message that is written.
import { Refused } from "./api.js";
import { all, Conversation } from "./conversations.js";
import { h } from "./dom.js";
import { Files } from "./files.js";
import { Pulls } from "./pulls.js";
import { reply } from "./reply.js";
import { Settings } from "./settings.js";
import { TurnView } from "./turn.js";
import { prompt, Waiting } from "./waiting.js";

const SAVED_EVERY = 2000; // milliseconds, while an answer arrives

export class Chat {
  /** login(refused): asks for the API's key. */
  constructor(element, login) {
    this.login = login;
    this.settings = new Settings(() => this.#notice("This browser has no room for more: settings hold until the page is left."));
    this.views = new Map();
    this.pulls = new Pulls();
    this.held = []; // what continues when the server takes messages
    this.list = h("ul");
    this.search = h("input.search", { type: "search", ariaLabel: "Search the conversations", placeholder: "Search", oninput: () => this.#list() });
    this.side = h("aside", { id: "conversations", ariaLabel: "Conversations" }, h("button.primary", { type: "button", onclick: () => this.fresh() }, "New chat"), this.search, this.list, this.#importer());
    this.menu = h("button.quiet.menu", { type: "button", ariaExpanded: "false", "aria-controls": "conversations", onclick: () => this.#drawer(!element.classList.contains("drawer")) }, "Chats");
    this.log = h("div.log-of-chat", { role: "log", ariaLabel: "Conversation", tabIndex: 0 });
    this.input = h("textarea", { rows: 1, ariaLabel: "Message", placeholder: "Write a message", title: "Enter sends, Shift+Enter starts a new line", oninput: () => this.#grow(), onkeydown: (event) => this.#keys(event) });
    this.send = h("button.primary", { type: "submit" }, "Send");
    this.notice = h("p.problem", { role: "alert", hidden: true });
    this.form = h("form.compose", { onsubmit: (event) => this.#submit(event) });
    this.files = new Files(this.form, (text) => this.#notice(text));
    this.waiting = new Waiting("The model");
    this.form.append(this.waiting.element, this.notice, this.files.list, this.input, h("div.row", {}, this.menu, ...this.settings.row, this.files.button, this.send));
    this.element = element;
    element.append(this.side, h("div.shade", { onclick: () => this.#drawer(false) }), h("section.talk", {}, this.log, this.form));
    element.addEventListener("keydown", (event) => event.key === "Escape" && (this.abort ? this.abort.abort() : this.#drawer(false)));
    addEventListener("storage", () => this.#list());
    const [last] = all();
    this.#open(last ?? new Conversation());
  }

  /** Called when the chat comes into view: what was hidden could not be scrolled. */
  shown() {
    if (!this.seen) this.#toEnd();
    this.seen = true;
  }

  /** Called at the start, and when the server answers again. */
  async ready() {
    try {
      await this.settings.load();
      this.#notice("");
      const asks = this.conversation.path().at(-1)?.calls?.some((call) => this.settings.offered.has(call.function.name));
      if (!this.conversation.turns.length || (asks && !this.log.querySelector(".question"))) this.#draw();
    } catch (error) {
      if (!(error instanceof Refused)) this.#notice(error.message);
    }
  }

  /** Say how far a model's loading is, or nothing. hold: until then the server takes no messages. */
  loading(words, share = null, hold = false) {
    this.waiting.show(words, share);
    if (this.hold && !hold) {
      this.ready();
      for (const go of this.held.splice(0)) go();
    }
    this.hold = hold;
  }

  /** Resolves once the server takes messages. */
  #taken(signal) {
    return new Promise((done, fail) => {
      if (!this.hold) return done();
      this.held.push(done);
      signal.addEventListener("abort", () => fail(signal.reason));
      return undefined;
    });
  }

  fresh() {
    this.#open(new Conversation());
    this.input.focus();
  }

  #open(conversation) {
    this.abort?.abort();
    this.conversation = conversation;
    this.#drawer(false);
    this.#list();
    this.#draw();
    this.#toEnd();
  }

  #drawer(open) {
    this.element.classList.toggle("drawer", open);
    this.menu.ariaExpanded = String(open);
  }

  #list() {
    const sought = this.search.value.trim();
    const stored = all().filter((each) => each.mentions(sought));
    const listed = JSON.stringify([sought, this.conversation.id, ...stored.map(({ id, title }) => [id, title])]);
    if (listed === this.listed) return; // the keyboard's focus stays where it is
    this.listed = listed;
    this.list.replaceChildren(...stored.map((each) => this.#entry(each)));
    if (!stored.length) this.list.replaceChildren(h("li.empty", {}, sought ? "No conversation has this text." : "No conversations yet. They are stored in this browser only."));
  }

  #entry(conversation) {
    const current = conversation.id === this.conversation.id;
    const act = (label, action) => h("button", { type: "button", ariaLabel: `${label} “${conversation.title}”`, onclick: action }, label);
    const open = h("button.open", { type: "button", title: conversation.title, ariaCurrent: String(current), onclick: () => current ? this.#drawer(false) : this.#open(conversation) }, conversation.title || "Untitled");
    const entry = h("li", { className: current ? "current" : "" }, open, h("div.acts", {},
      act("Rename", () => this.#rename(conversation, entry)), act("Export", () => download(conversation, this.settings.values)), act("Delete", () => this.#remove(conversation))));
    return entry;
  }

  /** A button that reads an exported conversation. */
  #importer() {
    const file = h("input", { type: "file", accept: ".json", hidden: true, onchange: async () => {
      try {
        const found = Conversation.of(await file.files[0].text());
        this.#open(found);
        this.#save();
      } catch (error) {
        this.#notice(`The file is no exported conversation: ${error.message}`);
      }
      file.value = "";
    } });
    return h("button.quiet", { type: "button", onclick: () => file.click() }, "Import", file);
  }

  #rename(conversation, entry) {
    const target = conversation.id === this.conversation.id ? this.conversation : conversation;
    const input = h("input", { value: target.title, ariaLabel: "Title", maxLength: 100 });
    const done = (keep) => {
      if (keep && input.value.trim()) target.title = input.value.trim();
      this.#save(target);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") input.blur();
      if (event.key === "Escape") input.value = target.title;
    });
    input.addEventListener("change", () => done(true));
    input.addEventListener("blur", () => {
      this.listed = null;
      this.#list();
    });
    entry.replaceChildren(input);
    input.select();
  }

  #remove(conversation) {
    if (!confirm(`Delete “${conversation.title}”? It is stored nowhere else.`)) return;
    if (conversation.id === this.conversation.id) {
      this.abort?.abort();
      this.conversation = new Conversation();
      this.#draw();
    }
    conversation.remove();
    this.#list();
  }

  #save(conversation = this.conversation) {
    try {
      conversation.save();
    } catch {
      this.#notice("This browser has no room for more: export and delete old conversations.");
    }
    if (!this.list.contains(document.activeElement?.closest("input"))) this.#list();
  }

  #draw() {
    const { conversation } = this;
    const actions = {
      edit: (turn, text) => this.#say(turn.parent, { role: "user", text, files: turn.files }),
      again: (turn) => this.#answer(turn.parent),
      show: (turn) => { conversation.show(turn); this.#save(); this.#draw(); },
      results: (turn, found) => this.#answer(found.reduce((parent, each) => conversation.add(parent, { role: "tool", ...each }).id, turn.id)),
      key: () => this.login(true),
      tools: this.settings.offered,
    };
    this.views = new Map(conversation.path().map((turn) => [turn.id, new TurnView(conversation, turn, actions)]));
    const greeting = h("div.greeting", {}, h("h1", {}, this.settings.values.model ? `Talk to ${this.settings.values.model.split("/").at(-1)}` : "Talk to the model"),
      h("p", {}, "Conversations stay in this browser. Under each answer you see its speed, the prompt tokens that were cached, and its price."),
      this.settings.several ? null : this.pulls.element);
    this.log.replaceChildren(...(this.views.size ? [...this.views.values()].map((view) => view.element) : [greeting]));
  }

  #keys(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this.abort) this.form.requestSubmit();
    } else if (event.key === "ArrowUp" && !this.input.value) {
      const last = this.conversation.path().findLast((turn) => turn.role === "user");
      if (last && !this.abort) this.views.get(last.id)?.edit();
    }
  }

  #submit(event) {
    event.preventDefault();
    if (this.abort) return this.abort.abort();
    const text = this.input.value.trim();
    if (!text && !this.files.chosen.length) return undefined;
    this.input.value = "";
    this.#grow();
    return this.#say(this.conversation.leaf, { role: "user", text, files: this.files.take() });
  }

  #say(parent, turn) {
    return this.#answer(this.conversation.add(parent, turn).id);
  }

  /** Add an answer below a turn, and stream it. */
  async #answer(parent) {
    this.abort?.abort();
    const { conversation } = this;
    const abort = (this.abort = new AbortController());
    const turn = conversation.add(parent, { role: "assistant", text: "" });
    this.#save();
    this.#draw();
    this.#toEnd();
    this.#running(true);
    const view = this.views.get(turn.id);
    view.update(true);
    try {
      if (!this.settings.values.model) await this.settings.load();
      await this.#taken(abort.signal);
      const id = crypto.getRandomValues(new Uint32Array(4)).join("-");
      prompt(id, this.settings.values.model, () => abort.signal.aborted || turn.first || turn.done,
        (...far) => this.#stick(() => (this.views.get(turn.id) ?? view).waiting.show(...far)));
      await reply(turn, id, conversation.messages(parent, this.settings.values.system), this.settings.chosen, abort.signal, this.#pacer(conversation, view));
    } catch (error) {
      if (error.name === "AbortError") turn.end = "stopped";
      else turn.problem = { message: error.message, status: error.status, code: error.code, wait: error.wait };
      if (error instanceof Refused) this.login(true);
    }
    turn.done = true;
    if (this.abort === abort) {
      this.abort = null;
      this.#running(false);
    }
    this.#save(conversation);
    this.#stick(() => (this.views.get(turn.id) ?? view).update(false));
  }

  /** Show and store what has arrived, at most once per frame and once per `SAVED_EVERY`. */
  #pacer(conversation, view) {
    let [asked, saved] = [false, Date.now()];
    const show = () => {
      asked = false;
      if (!view.turn.done) this.#stick(() => view.update(true));
    };
    return () => {
      if (!asked) requestAnimationFrame(show);
      asked = true;
      if (Date.now() - saved > SAVED_EVERY) {
        saved = Date.now();
        this.#save(conversation);
      }
    };
  }

  #running(running) {
    this.send.textContent = running ? "Stop" : "Send";
    this.log.ariaBusy = String(running);
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, innerHeight * 0.4)}px`;
  }

  #notice(text) {
    this.notice.hidden = !text;
    this.notice.textContent = text;
  }

  /** Change the log; stay at its end if it is shown. */
  #stick(change) {
    const { log } = this;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    change();
    if (atEnd) this.#toEnd();
  }

  #toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

/** A file with a conversation as shown, in the API's format. */
function download(conversation, { system }) {
  const document = { title: conversation.title, messages: conversation.messages(conversation.leaf, system) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(document, null, 2)], { type: "application/json" }));
  h("a", { href: url, download: `${conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
