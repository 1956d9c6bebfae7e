// Markdown to elements: marked reads, and what it found is built here node by node. Whatever an answer holds, only
// these elements come out: HTML stays the text that it is, links lead to the web or to mail, and nothing is loaded.

import { copyButton } from "./clipboard.js";
import { make, setText } from "./elements.js";
import { Lexer, Marked } from "./vendor/marked/marked.esm.js";
import { translate } from "./words.js";

const WINDOW = 16384; // characters that are read at once: reading twice as many takes marked more than twice as long
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;

// TeX is left as it is written: Markdown would take its \, _ and * for its own. A formula ends at an empty line at the
// latest, so that one that is still being written does not change what stands before it.
const DISPLAYS = [
  /^ {0,3}\$\$(?:(?!\$\$|\n *\n)[^])*(?:\$\$|(?=\n *\n)|$)/,
  /^ {0,3}\\\[(?:(?!\\\]|\n *\n)[^])*(?:\\\]|(?=\n *\n)|$)/,
];
const FORMULAS = [
  /^\$\$(?:(?!\$\$|\n *\n)[^])+\$\$/,
  // One within another is none: each of many that never end would be read to the end of the text. \\[ is a new line.
  /^\\\((?:\\[^()]|[^\\\n]|\n(?! *\n))+\\\)/,
  /^\\\[(?:\\[^[\]]|[^\\\n]|\n(?! *\n))+\\\]/,
  /^\$(?![\s$])(?:\\[^\n]|[^$\\\n])*?(?:\\[^\n]|[^\s$\\])\$(?!\w)/, // $5 and $6 are prices
];
const begin = (text, patterns) => patterns.map((pattern) => pattern.exec(text)?.[0]).find((found) => found);
const display = {
  name: "display",
  level: "block",
  start(text) { // within a paragraph, which ends there
    const place = text.search(/\n {0,3}(?:\$\$|\\\[)/);
    return place < 0 ? undefined : place + 1;
  },
  tokenizer(text) {
    const raw = begin(text, DISPLAYS);
    return raw && { type: "display", raw, text: raw.trim() };
  },
};
const formula = {
  name: "formula",
  level: "inline",
  start(text) { // a backslash or a star ends a text anyway
    const place = text.indexOf("$");
    return place < 0 ? undefined : place;
  },
  tokenizer(text) {
    const raw = begin(text, FORMULAS);
    return raw && { type: "formula", raw, text: raw };
  },
};
// CommonMark takes **“这样”**的 for no emphasis, as punctuation within and a letter without stand beside the stars.
// Chinese has no spaces that would help.
const strong = {
  name: "strong",
  level: "inline",
  tokenizer(text) {
    const [raw, said] = /^\*\*(?![\s*])([^*\n`\\]*[^*\s`\\])\*\*(?!\*)/.exec(text) ?? [];
    return raw && { type: "strong", raw, text: said, tokens: this.lexer.inlineTokens(said) };
  },
};
// No heading by a line of dashes below it: each list that follows a line of text would begin as one.
const noUnderlines = { lheading() {} };
const extensions = [display, formula, strong];
const { defaults } = new Marked({ gfm: true, breaks: true, extensions, tokenizer: noUnderlines });

const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", hellip: "…",
  mdash: "—", ndash: "–", times: "×", divide: "÷", deg: "°", plusmn: "±", middot: "·", bull: "•", larr: "←", rarr: "→",
  uarr: "↑", darr: "↓", le: "≤", ge: "≥", ne: "≠", lsquo: "‘", rsquo: "’", ldquo: "“", rdquo: "”", yen: "¥",
  euro: "€", sect: "§",
};

/** The text with its entities read; those that are not known here stay as they are written. */
function readEntities(text) {
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([a-zA-Z]{2,8}));/g, (written, decimal, hex, name) => {
    if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : written;
    const code = decimal ? Number(decimal) : parseInt(hex, 16);
    return code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
  });
}

const inner = (token) => nodes(token.tokens ?? []);
const wrap = (tag) => (token) => make(tag, {}, ...inner(token));

function link(href, children) {
  const address = readEntities(href);
  if (!SAFE_LINK.test(address)) return null;
  const rel = "noopener noreferrer nofollow";
  return make("a", { href: address, title: address, target: "_blank", rel }, ...children);
}

const languageOf = (token) => /^[\w#+.-]{0,30}/.exec(token.lang ?? "")[0];

function codeBlock(token) {
  const code = make("code", {}, token.text);
  const copy = copyButton("copyCode", () => code.textContent);
  const title = make("div", { className: "title" }, make("span", {}, languageOf(token)), copy);
  const pre = make("pre", { tabIndex: 0, role: "region", "data-label": "code" }, code); // scrolls by keyboard too
  return translate(make("div", { className: "code" }, title, pre));
}

function table(token) {
  const row = (cells) => make("tr", {}, ...cells.map((cell) => {
    const element = make(cell.header ? "th" : "td", {}, ...inner(cell));
    if (cell.align) element.className = cell.align;
    return element;
  }));
  const grid = make("table", {}, make("thead", {}, row(token.header)), make("tbody", {}, ...token.rows.map(row)));
  return make("div", { className: "wide", tabIndex: 0 }, grid);
}

function list(token) {
  const element = make(token.ordered ? "ol" : "ul", {}, ...token.items.map(wrap("li")));
  if (token.ordered && token.start !== 1) element.start = token.start;
  return element;
}

/** What to make of each kind of token: nodes and texts, several in a list; of one that is not here, its text. */
const BUILD = {
  space: () => [],
  def: () => [],
  hr: () => make("hr"),
  br: () => make("br"),
  paragraph: wrap("p"),
  blockquote: wrap("blockquote"),
  strong: wrap("strong"),
  em: wrap("em"),
  del: wrap("del"),
  heading: (token) => make(`h${Math.min(6, token.depth + 2)}`, {}, ...inner(token)), // below the page's own h1 and h2
  code: codeBlock,
  codespan: (token) => make("code", {}, token.text),
  display: (token) => make("div", { className: "math" }, token.text),
  formula: (token) => make("span", { className: "math" }, token.text),
  table,
  list,
  checkbox: (token) => (token.checked ? "☑ " : "☐ "),
  html: (token) => {
    if (/^<br *\/?>$/i.test(token.raw)) return make("br"); // the way to a line break within a table
    return token.block ? make("p", { className: "html" }, token.raw.trimEnd()) : token.raw;
  },
  escape: (token) => token.text,
  link: (token) => link(token.href, inner(token)) ?? (token.autolink ? inner(token) : token.raw),
  image: (token) => {
    const name = make("span", { "data-word": "image" });
    return translate(link(token.href, [name, ` ${token.text}`]) ?? make("span", {}, token.raw));
  },
  text: (token) => (token.tokens ? inner(token) : readEntities(token.text)),
};

function nodes(tokens) {
  return tokens.flatMap((token) => (Object.hasOwn(BUILD, token.type) ? BUILD[token.type](token) : token.raw));
}

const NO_LINKS = {};
const DEFINITION = /^[ >*+\-\d.)]*\[[^\]\n]+\]:/m; // of a link, which may be used before it

/** A text that may grow, shown in `place`. What cannot change any more is read and built once: with each `put`, only
    the last block is read again, or the last few. */
export class MarkdownView {
  #place;
  #links = NO_LINKS; // that are defined somewhere in the text, by name
  #settled = ""; // the beginning of the text whose blocks stand
  #tail = []; // {type, raw, nodes} of each block behind it

  constructor(place) {
    this.#place = place;
  }

  /** Show `text`, which is whole if `isOver`: links may then be defined behind their use. */
  put(text, isOver) {
    if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
    if (isOver && DEFINITION.test(text)) {
      this.#links = this.#read(text).links ?? NO_LINKS;
      this.#restart();
    }
    if (!text.startsWith(this.#settled)) this.#restart();
    for (let length = WINDOW; ;) {
      const rest = text.slice(this.#settled.length);
      const read = rest.slice(0, length);
      const tokens = this.#read(read);
      const settled = countSettled(tokens, read);
      this.#show(tokens, settled);
      if (length >= rest.length) return;
      length = settled > 0 ? WINDOW : 2 * length;
    }
  }

  #restart() {
    this.#settled = "";
    this.#tail = [];
    this.#place.replaceChildren();
  }

  #read(text) {
    try {
      const lexer = new Lexer({ ...defaults });
      lexer.tokens.links = Object.assign(Object.create(null), this.#links);
      return lexer.lex(text);
    } catch { // nested deeper than the stack
      return [{ type: "html", block: true, raw: text }];
    }
  }

  /** Show the blocks behind those that stand; the first `settled` of them stand from now on. */
  #show(tokens, settled) {
    const tail = this.#tail;
    const isSame = ({ type, raw }, token) => type === token?.type && raw === token.raw;
    let kept = tail.findIndex((block, index) => !isSame(block, tokens[index]));
    if (kept < 0) kept = tail.length;
    else if (kept === tail.length - 1 && grow(tail[kept], tokens[kept])) kept += 1;
    for (const { nodes } of tail.slice(kept)) for (const node of nodes) node.remove();
    const added = tokens.slice(kept).map((token) => ({ type: token.type, raw: token.raw, nodes: blockNodes(token) }));
    for (const { nodes } of added) this.#place.append(...nodes);
    const blocks = [...tail.slice(0, kept), ...added];
    this.#settled += blocks.slice(0, settled).map((block) => block.raw).join("");
    this.#tail = blocks.slice(settled);
  }
}

/** How many of the blocks of `text` cannot change when it goes on: those before the last one, and none while the line
    that tells it from them is not complete: `*` may become **strong**, which goes on with a paragraph. A table's is its
    second line. */
function countSettled(tokens, text) {
  const last = tokens.findLastIndex((token) => token.type !== "space");
  if (last <= 0) return 0;
  const begin = tokens.slice(0, last).reduce((sum, { raw }) => sum + raw.length, 0);
  const lines = text.slice(begin).split("\n").length - 1; // complete ones
  return lines >= (tokens[last].type === "table" ? 2 : 1) ? last : 0;
}

/** Let a listing grow in its place, at little cost however long it is; false for all else. */
function grow(block, token) {
  if (block.type !== "code" || token?.type !== "code") return false;
  const [{ firstChild: title, lastChild: pre }] = block.nodes;
  if (title.firstChild.textContent !== languageOf(token)) return false;
  setText(pre.firstChild.firstChild, token.text);
  block.raw = token.raw;
  return true;
}

const asNode = (built) => (typeof built === "string" ? document.createTextNode(built) : built);
const blockNodes = (token) => nodes([token]).map(asNode);
