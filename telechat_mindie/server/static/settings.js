// How an answer is to be sampled: the form, what the browser keeps of it, and the fields of a request.

import { $ } from "./elements.js";
import { memory } from "./memory.js";

const KEY = "settings";
const form = $("parameters");
const fields = [...form.querySelectorAll("[name]")];
const ESCAPES = { n: "\n", r: "\r", t: "\t" };

/** One string a line; `\n`, `\r`, `\t` and `\\` mean what they usually mean. */
const stopStrings = (text) => text.split(/\r?\n/).filter((line) => line !== "")
  .map((line) => line.replace(/\\(.)/g, (_, escaped) => ESCAPES[escaped] ?? escaped));

function keep() {
  const entry = ({ name, value, type, checked }) => [name, type === "checkbox" ? checked : value];
  memory.set(KEY, JSON.stringify(Object.fromEntries(fields.map(entry))));
}

/** Put back what was kept, and call `onMode` at each change of the mode, and now. */
export function openSettings(onMode) {
  let kept = {};
  try { kept = JSON.parse(memory.get(KEY)) ?? {}; } catch { /* not ours */ }
  for (const field of fields) {
    if (field.type === "checkbox") field.checked = kept[field.name] === true;
    else if (typeof kept[field.name] === "string") field.value = kept[field.name];
  }
  form.addEventListener("input", keep);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { // the fields change after the event
    keep();
    onMode();
  }));
  form.elements.raw.addEventListener("input", onMode);
  onMode();
}

export const isRaw = () => form.elements.raw.checked;

export const systemPrompt = () => form.elements.system.value.trim();

/** Whether all fields are as they must be; `onFault` makes them visible before the browser shows which is not. */
export function isValid(onFault) {
  if (form.checkValidity()) return true;
  onFault();
  form.reportValidity();
  return false;
}

/** The fields of a request that the user has set. */
export function parameters() {
  const numbers = fields.filter(({ type, value }) => type === "number" && value !== "");
  const stop = stopStrings(form.elements.stop.value);
  const values = Object.fromEntries(numbers.map(({ name, value }) => [name, Number(value)]));
  return stop.length > 0 ? { ...values, stop } : values;
}
