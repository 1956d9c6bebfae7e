// To the clipboard, also where the page came neither by HTTPS nor from this machine: there is the old way alone.

import { announce, button, make } from "./elements.js";
import { word } from "./words.js";

const SHOWN_MS = 1500;

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const focused = document.activeElement;
  const area = make("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!isDone) throw new Error("the browser refuses to copy");
}

/** A button that copies what `text` gives, and says so. */
export function copyButton(label, text) {
  const made = button(label, async () => {
    await copy(text());
    made.textContent = word("copied");
    announce(word("copied"));
    setTimeout(() => { made.textContent = word(label); }, SHOWN_MS);
  });
  return made;
}
