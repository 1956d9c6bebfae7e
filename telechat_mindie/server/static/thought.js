// A thought that the service did not tell apart from the answer.

const OPEN = "<think>";
const CLOSE = "</think>";

/** [thought, answer] of a service's text that has a thought's tags in it. The opening one may have been in the prompt;
    the closing one then has a line of its own. */
export function splitThought(text) {
  const begin = text.trimStart();
  const isOpen = begin.startsWith(OPEN);
  const rest = isOpen ? begin.slice(OPEN.length) : text;
  const end = isOpen ? rest.indexOf(CLOSE) : rest.search(/^<\/think>$/m);
  if (end >= 0) return [rest.slice(0, end), rest.slice(end + CLOSE.length)];
  return isOpen ? [rest, ""] : ["", text];
}
