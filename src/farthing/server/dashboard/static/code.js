// Colours of code: comments, strings, numbers and keywords of the languages that models write most.
import { h } from "./dom.js";

const LONGEST = 20_000; // characters; longer code stays plain
const words = (text) => new Set(text.split(" "));
const C = words("abstract async auto await bool boolean break byte case catch char class const constexpr continue def default defer delete do double dyn else enum export extends extern false final finally float fn for from func function go goto if impl implements import in inline instanceof int interface let long loop match mod mut namespace new nil null nullptr of operator override package private protected pub public return self short signed sizeof static struct super switch template this throw throws trait true try type typedef typeof union unsafe unsigned use using val var virtual void volatile where while with yield");
const PYTHON = words("and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield");
const SHELL = words("case cd do done echo elif else esac exit export fi for function if in local return set source sudo then until unset while");
const SQL = words("ADD ALL ALTER AND AS ASC BETWEEN BY CASE CREATE DELETE DESC DISTINCT DROP ELSE END EXISTS FROM FULL GROUP HAVING IN INDEX INNER INSERT INTO IS JOIN KEY LEFT LIKE LIMIT NOT NULL ON OR ORDER OUTER PRIMARY RIGHT SELECT SET TABLE THEN UNION UPDATE VALUES VIEW WHEN WHERE WITH");
const DATA = words("true false null yes no");

// Bounded, so that a text full of quotes that nothing closes costs no more than its length times the bound.
const STRING = /"(?:[^"\\\n]|\\.){0,400}"|'(?:[^'\\\n]|\\.){0,400}'/;
const SLASHES = /\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)/;
const HASH = /(?<![\w$&])#[^\n]*/;
const LANGUAGES = {
  c: [SLASHES, new RegExp(`${STRING.source}|\`(?:[^\`\\\\]|\\\\.){0,2000}\``), C],
  python: [HASH, new RegExp(`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${STRING.source}`), PYTHON],
  shell: [HASH, STRING, SHELL],
  sql: [/--[^\n]*|\/\*[^]*?(?:\*\/|$)/, STRING, SQL],
  data: [HASH, STRING, DATA],
  markup: [/<!--[^]*?(?:-->|$)/, STRING, words("")],
};
const NAMES = {
  c: "c cc cpp c++ cs csharp css cuda dart go golang h hpp java javascript js json5 jsx kotlin kt objc php rs rust scala scss swift ts tsx typescript zig",
  python: "py python python3 rb ruby jl julia r", shell: "bash sh shell zsh console dockerfile makefile", sql: "sql sqlite postgresql mysql",
  data: "json jsonc yaml yml toml ini", markup: "html xml svg vue",
};
const KIND = new Map(Object.entries(NAMES).flatMap(([kind, names]) => names.split(" ").map((name) => [name, kind])));

/** The nodes of a text: spans of what has a colour, and the text between them. */
export function coloured(text, language) {
  const kind = KIND.get(language.toLowerCase());
  if (!kind || text.length > LONGEST) return [text];
  const [comment, string, keywords] = LANGUAGES[kind];
  const token = new RegExp(`(?<comment>${comment.source})|(?<string>${string.source})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let end = 0;
  for (const { 0: found, index, groups } of text.matchAll(token)) {
    const name = groups.comment ? "comment" : groups.string ? "string" : groups.number ? "number"
      : keywords.has(kind === "sql" ? found.toUpperCase() : found) ? "keyword" : null;
    if (!name) continue;
    nodes.push(text.slice(end, index), h(`span.${name}`, {}, found));
    end = index + found.length;
  }
  return [...nodes, text.slice(end)];
}
