// Tools of the server's MCP servers: which there are, and the question before each call.
import { get, post } from "./api.js";
import { h, LOCAL } from "./dom.js";

const PATH = "/dashboard/tools";
const LONGEST = 600000; // milliseconds of a call
const REFUSED = "error: the user does not allow this call"; // what the model reads, as in the terminal

export class Tools {
  constructor() {
    this.found = []; // {server, tool}
    this.always = new Set(); // servers and tools that need no question any more, until the page is left
  }

  async load() {
    const { tools } = LOCAL ? await get(PATH).catch(() => ({ tools: [] })) : { tools: [] };
    this.found = tools;
  }

  has(name) {
    return this.found.some(({ tool }) => tool.function.name === name);
  }

  /** An element that asks about a call, and whose `value` is its result in the end, when settled() is called. always: whether a tool that is always allowed may be called at once. */
  question({ function: { name, arguments: given } }, always, settled) {
    const element = h("div.question", { role: "group", ariaLabel: `May ${name} be called?` });
    const end = (text) => {
      if (!element.isConnected) return; // another conversation is shown
      element.value = text;
      settled();
    };
    const attempt = (action) => action().catch((error) => element.replaceChildren(h("p", { role: "alert" }, error.message),
      h("button", { type: "button", onclick: () => attempt(ask) }, "Ask again")));
    const ask = async () => {
      const { question, server, tool, lines } = await post(`${PATH}/question`, { name, arguments: given });
      const what = [h("b", {}, tool), " of ", h("b", {}, server)];
      const call = async () => {
        element.replaceChildren(h("p", { role: "status" }, "Calling ", ...what, " …"));
        end((await post(`${PATH}/call`, { question }, LONGEST)).text);
      };
      const both = JSON.stringify([server, tool]);
      if (always && this.always.has(both)) return call();
      const button = (label, action) => h("button", { type: "button", onclick: action }, label);
      element.replaceChildren(h("p", {}, "Call ", ...what, "?"), h("pre", { tabIndex: 0 }, lines.join("\n")), h("div.choices", {},
        button("Allow once", () => attempt(call)), button("Always allow", () => { this.always.add(both); attempt(call); }),
        button("Refuse", () => end(REFUSED))));
      return undefined;
    };
    element.value = null;
    attempt(ask);
    return element;
  }
}
