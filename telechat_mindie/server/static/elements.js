// Elements are made here, node by node: text is never read as markup.

import { translate } from "./words.js";

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (`data-…`, `aria-…`, `role`) and children, which are nodes or texts. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** A button that says a word and does something. */
export function button(word, onclick, properties = {}) {
  const all = { type: "button", className: "quiet", "data-word": word, onclick, ...properties };
  return translate(make("button", all));
}

/** Let a screen reader say `text`. */
export const announce = (text) => { $("status").textContent = text; };

/** Let a text node have `value`; at little cost where that only appends to it. */
export function setText(node, value) {
  if (value.startsWith(node.data)) node.appendData(value.slice(node.length));
  else node.data = value;
}

/** Calls `draw` at most once a frame, and so seldom that it takes a quarter of the time at most.

    `ask` wants it drawn soon; `end` draws at once and for the last time, with its values. A tab in the background has
    no frames. */
export function everyFrame(draw) {
  let frame = 0;
  let rested = 0; // when it may draw again
  const step = () => {
    const begin = performance.now();
    if (begin < rested) {
      frame = requestAnimationFrame(step);
      return;
    }
    frame = 0;
    draw();
    rested = begin + 4 * (performance.now() - begin);
  };
  return {
    ask() { frame ||= requestAnimationFrame(step); },
    end(...values) {
      cancelAnimationFrame(frame);
      draw(...values);
    },
  };
}
