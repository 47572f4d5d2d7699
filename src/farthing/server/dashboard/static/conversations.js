// Conversations in this browser's localStorage, one entry each. A conversation is a tree: editing or
// regenerating a turn adds a sibling, and `leaf` says which path is shown.

import { withFiles } from "./files.js";

const PREFIX = "farthing.chat.";
const SETTINGS = "farthing.settings";
export const DEFAULTS = { model: "", system: "", thinking: "", max_tokens: "", temperature: "", top_p: "", seed: "", tools: "", mcp: "on", other: "", stop: "",
  top_k: "", min_p: "", min_tokens: "", repetition_penalty: "", presence_penalty: "", frequency_penalty: "", max_thinking_tokens: "" };

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const settings = {
  get: () => ({ ...DEFAULTS, ...read(SETTINGS, {}) }),
  set: (values) => keep(SETTINGS, JSON.stringify(values)),
};

/** Store a text; false if the browser has no room left, and it holds only until the page is left. */
export function keep(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

/** Every conversation, the last changed first. */
export function all() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  const found = names.map((name) => read(name, null)).filter((each) => each?.id && Array.isArray(each.turns));
  return found.map((each) => new Conversation(each)).sort((a, b) => b.changed - a.changed);
}

export class Conversation {
  constructor({ id = newId(), title = "", changed = Date.now(), turns = [], leaf = null } = {}) {
    Object.assign(this, { id, title, changed, turns, leaf });
  }

  /** Of a file as `download` writes it, or any with an API's messages. Throws for another one. */
  static of(text) {
    const { title = "", messages } = JSON.parse(text);
    const found = new Conversation({ title: String(title).slice(0, 100) });
    const names = new Map();
    for (const { role, content, reasoning_content: thoughts, tool_calls: calls, tool_call_id: answers } of messages) {
      if (!["user", "assistant", "tool"].includes(role)) continue; // a system prompt is one of the settings
      const parts = Array.isArray(content) ? content.map((part) => part.text ?? "").join("") : content;
      for (const call of calls ?? []) names.set(call.id, String(call.function.name));
      found.add(found.leaf, { role, text: String(parts ?? ""), thoughts, calls, answers, name: names.get(answers), done: true });
    }
    if (!found.turns.length) throw new Error("no messages");
    return found;
  }

  /** Store it, with the turns that another tab has added. Throws if the browser has no room left. */
  save() {
    const own = new Set(this.turns.map((each) => each.id));
    this.turns.push(...(read(PREFIX + this.id, null)?.turns ?? []).filter((each) => !own.has(each.id)));
    this.changed = Date.now();
    localStorage.setItem(PREFIX + this.id, JSON.stringify(this));
  }

  remove() {
    localStorage.removeItem(PREFIX + this.id);
  }

  /** Add a turn {role, text, …} below another one, and show it. */
  add(parent, turn) {
    const added = { id: newId(), parent, ...turn };
    this.turns.push(added);
    this.leaf = added.id;
    if (!this.title && turn.role === "user") this.title = (turn.text.trim() || turn.files?.[0]?.name || "").replace(/\s+/g, " ").slice(0, 60);
    return added;
  }

  turn(id) {
    return this.turns.find((each) => each.id === id) ?? null;
  }

  /** From the first turn to the shown leaf, or to another turn. */
  path(to = this.leaf) {
    const found = [];
    for (let turn = this.turn(to); turn; turn = this.turn(turn.parent)) found.unshift(turn);
    return found;
  }

  /** Whether its title, a turn or a file has a text, in whatever case. */
  mentions(text) {
    const sought = text.toLowerCase();
    const texts = this.turns.flatMap((each) => [each.text, ...(each.files ?? []).flatMap(({ name, text: content }) => [name, content])]);
    return [this.title, ...texts].some((each) => each?.toLowerCase().includes(sought));
  }

  siblings(turn) {
    return this.turns.filter((each) => each.parent === turn.parent);
  }

  /** Show a turn and the newest turns below it. */
  show(turn) {
    let last = turn;
    for (let next = turn; next; next = this.turns.findLast((each) => each.parent === last.id)) last = next;
    this.leaf = last.id;
  }

  /** The messages of a request, as the API has them. */
  messages(to, system) {
    const said = this.path(to).filter((turn) => turn.text || turn.calls?.length || turn.role !== "assistant").map(message);
    return system.trim() ? [{ role: "system", content: system }, ...said] : said;
  }
}

function message({ role, text, files, thoughts, calls, answers }) {
  const found = { role, content: withFiles(text, files) };
  if (thoughts) found.reasoning_content = thoughts;
  if (calls?.length) found.tool_calls = calls;
  if (answers) found.tool_call_id = answers;
  return found;
}
