// Formulas in TeX as MathML: between $ and $, $$ and $$, \( and \), \[ and \], or of an environment.
/* global temml */
import { h } from "./dom.js";

const DISPLAY = /\$\$([^]{1,2000}?)\$\$|\\\[([^]{1,2000}?)\\\]|(\\begin\{((?:align|aligned|equation|gather|cases|[bpvV]?matrix|array)\*?)\}[^]{0,2000}?\\end\{\4\})/;
// A price is no formula: after the first dollar and before the second is no space, and after that no digit.
const INLINE = /\\\(([^]{1,2000}?)\\\)|(?<![\\$\w])\$(?![\s$])((?:[^$\\\n]|\\.){1,400}?)(?<!\s)\$(?![\d$])/;

/** A formula at any place of a text. */
export const MATHS = new RegExp(`${DISPLAY.source}|${INLINE.source}`);

const OPENS = /^ {0,3}(\$\$|\\\[|\\begin\{(\w+\*?)\})/;
const LONGEST = 200; // lines

/** Where a formula that has lines of its own ends, if it begins at line i; else 0. */
export function wholeMaths(lines, i) {
  const found = lines[i].match(OPENS);
  if (!found) return 0;
  const close = found[2] ? `\\end{${found[2]}}` : found[1] === "$$" ? "$$" : "\\]";
  const start = lines[i].indexOf(found[1]) + found[1].length;
  for (let end = i; end < Math.min(lines.length, i + LONGEST); end += 1) {
    const at = lines[end].indexOf(close, end === i ? start : 0);
    if (at >= 0) return DISPLAY.test(lines.slice(i, end + 1).join("\n")) && !lines[end].slice(at + close.length).trim() ? end + 1 : 0;
  }
  return 0;
}

/** The formula of a source with its delimiters; the source itself where it is no TeX. Commands that would link,
 * load or style anything are refused. */
export function maths(source) {
  const display = source.match(DISPLAY);
  const shown = display?.index === 0;
  const found = shown ? display : source.match(INLINE);
  const tex = shown ? found[1] ?? found[2] ?? found[3] : found[1] ?? found[2];
  const element = h(shown ? "span.maths.display" : "span.maths");
  try {
    temml.render(tex, element, { displayMode: shown, trust: false, throwOnError: true, maxExpand: 200, maxSize: [20, 20] });
    return element;
  } catch {
    return h("code", {}, source);
  }
}
