// A conversation as a file.

import { make } from "./elements.js";

/** Let the browser save a text. The file's name has the title's letters and digits, of any script. */
export function download(title, ending, kind, text) {
  const name = title.replace(/[^\p{Letter}\p{Number}]+/gu, "-").replace(/^-+|-+$/g, "");
  const address = URL.createObjectURL(new Blob([text], { type: kind }));
  make("a", { href: address, download: `${[...name].slice(0, 60).join("") || "conversation"}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser may still be reading
}
