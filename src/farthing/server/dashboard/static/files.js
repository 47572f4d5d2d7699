// Text files that go with a message. The browser reads them; the server gets their text.
import { h } from "./dom.js";

const MOST = 400_000; // bytes of a file: conversations are stored in the browser, which has room for about 5 MB

/** {name, text} of a file. Throws for one that is no text, with what to do. */
async function read(file) {
  if (/\.pdf$/i.test(file.name)) throw new Error(`${file.name}: PDF files are not read; copy their text, or save them as text.`);
  if (file.size > MOST) throw new Error(`${file.name}: ${Math.ceil(file.size / 1000)} kB; a text of at most ${MOST / 1000} kB is accepted.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError("binary");
    return { name: file.name.slice(0, 100), text };
  } catch {
    throw new Error(`${file.name}: no text in UTF-8; text, code, CSV, JSON and Markdown are accepted.`);
  }
}

/** The files as part of a message, each fenced by more backticks than it has. */
export function withFiles(text, files = []) {
  const fenced = files.map(({ name, text: content }) => {
    const fence = "`".repeat(Math.max(3, ...(content.match(/`+/g) ?? []).map((each) => each.length + 1)));
    return `${name}\n${fence}\n${content}\n${fence}`;
  });
  return [text, ...fenced].filter(Boolean).join("\n\n");
}

/** Files as they are shown in a conversation. */
export const folded = (files = []) => files.map(({ name, text }) => h("details.file", {}, h("summary", {}, name), h("pre", { tabIndex: 0 }, text)));

/** The files of the message that is written. notice(text): says why one is left out. */
export class Files {
  constructor(form, notice) {
    this.notice = notice;
    this.chosen = [];
    this.list = h("ul.files", { ariaLabel: "Files of the message" });
    const input = h("input", { type: "file", multiple: true, hidden: true, ariaLabel: "Text files", onchange: async () => {
      await this.add(input.files);
      input.value = "";
    } });
    this.button = h("button.quiet", { type: "button", title: "Text files; or drop them here", onclick: () => input.click() }, "Attach", input);
    form.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
    form.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
  }

  async add(files) {
    this.notice("");
    for (const file of [...files]) {
      try {
        this.chosen.push(await read(file));
      } catch (error) {
        this.notice(error.message);
      }
    }
    this.#draw();
  }

  /** The files, which are then no longer chosen. */
  take() {
    const taken = this.chosen;
    this.chosen = [];
    this.#draw();
    return taken;
  }

  #draw() {
    this.list.replaceChildren(...this.chosen.map((each) => h("li", {}, each.name, h("button", { type: "button", ariaLabel: `Leave out ${each.name}`, onclick: () => {
      this.chosen = this.chosen.filter((other) => other !== each);
      this.#draw();
    } }, "×"))));
  }
}
