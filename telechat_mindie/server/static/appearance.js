// Light or dark, as the system prefers or as the user says; and the panels that a narrow screen shows on demand.

import { $ } from "./elements.js";
import { memory } from "./memory.js";
import { word } from "./words.js";

const THEMES = { auto: "(prefers-color-scheme: dark)", light: "not all", dark: "all" }; // when dark.css holds
const wide = matchMedia("(min-width: 1000px)"); // as in page.css
let theme = memory.get("theme");
if (!Object.hasOwn(THEMES, theme)) theme = "auto";

export function drawTheme() {
  $("dark").media = THEMES[theme];
  const name = word("themes")[theme];
  $("theme").textContent = name;
  $("theme").setAttribute("aria-label", `${word("theme")}: ${name}`);
}

export function offerThemes() {
  $("theme").addEventListener("click", () => {
    const order = Object.keys(THEMES);
    theme = order[(order.indexOf(theme) + 1) % order.length];
    memory.set("theme", theme);
    drawTheme();
  });
  drawTheme();
}

const toggles = [...document.querySelectorAll("[aria-controls]")];

/** Show one panel over the chat, by its id, or none. On a wide screen all are shown, beside the chat. */
export function openPanel(id) {
  const isOver = id !== null && !wide.matches;
  for (const toggle of toggles) {
    const isOpen = isOver && toggle.getAttribute("aria-controls") === id;
    toggle.setAttribute("aria-expanded", isOpen);
    $(toggle.getAttribute("aria-controls")).classList.toggle("open", isOpen);
  }
  $("chat").inert = isOver;
}

export function offerPanels() {
  for (const toggle of toggles) {
    toggle.addEventListener("click", () => {
      const id = toggle.getAttribute("aria-controls");
      const isOpening = toggle.getAttribute("aria-expanded") !== "true";
      openPanel(isOpening ? id : null);
      if (isOpening) $(id).querySelector("button, input, textarea, summary").focus();
    });
  }
  document.addEventListener("keydown", (event) => {
    const open = toggles.find((toggle) => toggle.getAttribute("aria-expanded") === "true");
    if (event.key !== "Escape" || event.isComposing || !open) return;
    openPanel(null);
    open.focus();
    event.stopImmediatePropagation(); // an answer goes on
  });
  wide.addEventListener("change", () => openPanel(null));
}
