// Markdown as DOM nodes. Text only ever becomes text nodes: no markup in a model's answer is interpreted, no
// image is loaded, and links are followed only to http, https and mail addresses.
import { coloured } from "./code.js";
import { copyButton, h } from "./dom.js";
import { MATHS, maths, wholeMaths } from "./maths.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const CELLS = /^ *\|?( *:?-+:? *\|)+ *(:?-+:? *)?$/;
const SAFE = /^(?:https?:\/\/|mailto:)/i;

/** Shows a text that grows: only blocks whose source has changed are made again. */
export class Markdown {
  constructor() {
    this.element = h("div.prose");
    this.sources = [];
  }

  show(text) {
    const blocks = split(text.split("\n"));
    blocks.forEach((lines, i) => {
      const source = lines.join("\n");
      if (this.sources[i] === source) return;
      this.sources[i] = source;
      const node = block(lines);
      const old = this.element.children[i];
      if (old) old.replaceWith(node);
      else this.element.append(node);
    });
    while (this.element.children.length > blocks.length) this.element.lastElementChild.remove();
    this.sources.length = blocks.length;
  }
}

/** The lines of every block. */
function split(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const end = endOf(lines, i);
    blocks.push(lines.slice(i, end));
    i = end;
  }
  return blocks;
}

/** Where the block that begins at a line ends. */
function endOf(lines, i) {
  const fence = lines[i].match(FENCE);
  let end = i + 1;
  if (fence) {
    while (end < lines.length && !closes(lines[end], fence[1])) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(lines[i]) || RULE.test(lines[i])) return end;
  const close = wholeMaths(lines, i);
  if (close) return close;
  const [quote, item] = [lines[i].startsWith(">"), ITEM.test(lines[i])];
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (item) {
      const next = lines.slice(end).find((each) => each.trim());
      if (!line.trim() && !(next && (ITEM.test(next) || next.startsWith("  ")))) break;
      if (line.trim() && !ITEM.test(line) && !line.startsWith("  ") && (begins(line) || !lines[end - 1].trim())) break;
    } else if (quote ? !line.startsWith(">") : !line.trim() || begins(line)) break;
  }
  return end;
}

const begins = (line) => FENCE.test(line) || /^ {0,3}(?:\$\$|\\\[)/.test(line) || HEADING.test(line) || RULE.test(line) || line.startsWith(">") || ITEM.test(line);
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");

function block(lines) {
  const [first] = lines;
  const fence = first.match(FENCE);
  if (fence) {
    const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
    return code(lines.slice(1, closed ? -1 : undefined).join("\n"), fence[2].trim());
  }
  const heading = first.match(HEADING);
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2]));
  if (RULE.test(first)) return h("hr");
  if (wholeMaths(lines, 0)) return h("div.scroll", { tabIndex: 0 }, maths(lines.join("\n").trim()));
  if (first.startsWith(">")) return h("blockquote", {}, ...nested(lines.map((line) => line.replace(/^> ?/, ""))));
  if (ITEM.test(first)) return list(lines);
  if (lines.length > 1 && CELLS.test(lines[1]) && first.includes("|")) return table(lines);
  return h("p", {}, ...inline(lines.map((line) => line.trimStart()).join("\n")));
}

let depth = 0;

function nested(lines) {
  if (depth > 12) return [h("p", {}, lines.join("\n"))];
  depth += 1;
  const nodes = split(lines).map(block);
  depth -= 1;
  return nodes;
}

function code(text, language) {
  const name = language.split(/\s/)[0].slice(0, 30);
  return h("div.code", {}, h("div.bar", {}, h("span", {}, name || "text"), copyButton(() => text)),
    h("pre", { tabIndex: 0 }, h("code", {}, ...coloured(text, name))));
}

/** Items begin at the first one's indentation; what is indented further belongs to the item above. */
function list(lines) {
  const [, indent, marker] = lines[0].match(ITEM);
  const items = [];
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length <= indent.length + 1) items.push([found[3]]);
    else items.at(-1).push(line);
  }
  const ordered = /\d/.test(marker);
  return h(ordered ? "ol" : "ul", ordered ? { start: parseInt(marker, 10) } : {}, ...items.map(item));
}

function item([first, ...rest]) {
  const margin = Math.min(...rest.filter((line) => line.trim()).map((line) => line.search(/\S/)));
  const task = first.match(/^\[([ xX])\] +(.*)$/);
  const body = nested([task ? task[2] : first, ...rest.map((line) => line.slice(Math.min(margin, line.search(/\S|$/))))]);
  const [head] = body;
  if (head?.tagName === "P") body.splice(0, 1, ...head.childNodes);
  return h("li", {}, task ? h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", ariaLabel: task[1] === " " ? "To do" : "Done" }) : null, ...body);
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const [head, marks, ...rows] = lines.map(cells);
  const align = marks.map((mark) => (/^:-+:$/.test(mark) ? "center" : mark.endsWith(":") ? "right" : "left"));
  const row = (tag) => (each) => h("tr", {}, ...head.map((_, i) => h(tag, { style: { textAlign: align[i] } }, ...inline(each[i] ?? ""))));
  return h("div.scroll", { tabIndex: 0 }, h("table", {}, h("thead", {}, row("th")(head)), h("tbody", {}, ...rows.map(row("td")))));
}

// In the order in which they are tried at the same place. A group's text is Markdown itself, except of code.
const SPANS = [
  [MATHS, (m) => maths(m[0])],
  [/(`+)(?!`)([^]{0,4000}?[^`])\1(?!`)/, (m) => h("code", {}, m[2].replace(/^ (.*) $/s, "$1"))],
  [/!?\[((?:[^[\]]|\[[^[\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/, (m) => link(m[2], inline(m[1] || m[2]))],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/i, (m) => link(m[1], [m[1]])],
  [/\bhttps?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/i, (m) => link(m[0], [m[0]])],
  [/\*\*(?=\S)([^]{0,800}?\S)\*\*(?!\*)|__(?=\S)([^]{0,800}?\S)__(?!\w)/, (m) => h("strong", {}, ...inline(m[1] ?? m[2]))],
  [/\*(?=[^\s*])([^]{0,800}?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([^]{0,800}?[^\s_])_(?!\w)/, (m) => h("em", {}, ...inline(m[1] ?? m[2]))],
  [/~~(?=\S)([^]{0,800}?\S)~~/, (m) => h("del", {}, ...inline(m[1]))],
  [/ {2,}\n|\\\n/, () => h("br")],
  [/\\([!-+./<-@[-`{-~-])/, (m) => m[1]], // not spaces of maths, as in x\,dx
];

/** Text as nodes: the earliest span that matches, then the rest. */
function inline(text) {
  const nodes = [];
  const next = SPANS.map(() => ({ index: -1 }));
  for (let at = 0; at < text.length;) {
    let best = null;
    SPANS.forEach(([pattern], i) => {
      if (next[i] && next[i].index < at) next[i] = find(pattern, text, at);
      if (next[i] && (!best || next[i].index < next[best[0]].index)) best = [i];
    });
    if (!best) return [...nodes, text.slice(at)];
    const match = next[best[0]];
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(SPANS[best[0]][1](match));
    at = match.index + match[0].length;
  }
  return nodes;
}

function find(pattern, text, at) {
  const sticky = new RegExp(pattern, pattern.flags.replace("g", "") + "g");
  sticky.lastIndex = at;
  return sticky.exec(text);
}

function link(target, content) {
  if (!SAFE.test(target)) return h("span", { title: target }, ...content);
  return h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...content);
}
