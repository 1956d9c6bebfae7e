// One question or answer on the page.

import { copyButton } from "./clipboard.js";
import { button, make, setText } from "./elements.js";
import { MarkdownView } from "./markdown.js";
import { translate, word } from "./words.js";

export class Turn {
  element;
  #node;
  #part = {};
  #thought = document.createTextNode("");
  #plain = document.createTextNode("");
  #markdown = null; // of an answer in a chat
  #isOver = false;

  /** `does` has what the buttons do: edit(turn), regenerate(turn), choose(node, label). `others` are its versions. */
  constructor(node, does, others) {
    this.#node = node;
    const { role } = node;
    for (const name of ["who", "text", "foot", "fault", "actions"]) this.#part[name] = make("div", { className: name });
    const { who, text, foot, fault, actions } = this.#part;
    who.dataset.word = role === "user" ? (node.isRaw ? "prompt" : "asker") : "answerer";
    fault.setAttribute("role", "alert");
    if (role === "assistant" && !node.isRaw) this.#markdown = new MarkdownView(text);
    else text.append(this.#plain);
    text.classList.add(this.#markdown ? "markdown" : "plain");
    actions.append(copyButton("copy", () => node.content));
    if (role === "user") actions.append(button("edit", () => does.edit(this), { className: "quiet changes" }));
    else actions.append(button("regenerate", () => does.regenerate(this), { className: "quiet changes" }));
    if (others.length > 1) actions.append(versionButtons(node, others, does.choose));
    const thought = make("details", { className: "thought" }, make("summary"), make("div", {}, this.#thought));
    this.#part.thought = thought;
    const shown = role === "user" ? [who, text, actions] : [who, thought, text, foot, fault, actions];
    this.element = make("article", { className: `turn ${role}`, "data-label": who.dataset.word }, ...shown);
    translate(this.element);
  }

  get node() { return this.#node; }

  /** Show the node as it is by now. A screen reader and the cursor's blinking wait for its end. */
  draw(isOver) {
    const { content, thought = "", fault = "" } = this.#node;
    this.#isOver = isOver;
    if (isOver) this.element.removeAttribute("aria-busy");
    else this.element.setAttribute("aria-busy", "true");
    if (this.#markdown) this.#markdown.put(content, isOver);
    else setText(this.#plain, content);
    setText(this.#thought, thought);
    this.#part.thought.hidden = thought === "";
    this.#part.fault.hidden = fault === "";
    if (this.#part.fault.textContent !== fault) this.#part.fault.textContent = fault;
    this.#part.actions.hidden = !isOver;
    this.redraw();
  }

  /** Write again what depends on the language beyond plain words. */
  redraw() {
    const { thoughtMs = 0, content, tokens, ttft, speed, reason, isStopped } = this.#node;
    const isThinking = !this.#isOver && content === "";
    const seconds = (thoughtMs / 1000).toFixed(thoughtMs < 10_000 ? 1 : 0);
    this.#part.thought.firstChild.textContent = `${word(isThinking ? "thinking" : "thought")} ${seconds} s`;
    const words = [];
    if (this.#isOver && tokens) words.push(`${tokens} ${word("tokens")}`);
    if (ttft !== undefined) words.push(`${word("ttft")} ${ttft.toFixed(0)} ms`);
    if (this.#isOver && speed) words.push(`${speed.toFixed(1)} tok/s`);
    if (reason === "length") words.push(word("cut"));
    if (this.#isOver && isStopped) words.push(word("stopped"));
    this.#part.foot.textContent = words.join(" · ");
    this.#part.foot.hidden = words.length === 0;
  }

  /** Let the user change the question in its place. `onSend` gets a text that is another one. */
  edit(onSend) {
    const { text, actions } = this.#part;
    const box = make("textarea", { value: this.#node.content, "data-label": "editing", rows: 3, maxLength: 100000 });
    const close = () => {
      form.replaceWith(text);
      actions.hidden = false;
      actions.querySelector(".changes").focus();
    };
    const form = make("form", { className: "editor" }, box, make("div", { className: "actions" },
      button("cancel", close), button("send", null, { type: "submit", className: "quiet chosen" })));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const said = this.#node.isRaw ? box.value : box.value.trim();
      if (said === "" || said === this.#node.content) close();
      else onSend(said);
    });
    form.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") close();
      else if (event.key !== "Enter" || event.shiftKey || event.target !== box) return;
      else form.requestSubmit();
      event.preventDefault();
      event.stopPropagation();
    });
    text.replaceWith(translate(form));
    actions.hidden = true;
    box.focus();
  }
}

function versionButtons(node, others, choose) {
  const place = others.indexOf(node);
  const step = (sign, label, other) => make("button", {
    type: "button", className: "quiet changes", textContent: sign, "data-label": label, disabled: !other,
    onclick: () => choose(other, label),
  });
  return make("span", { className: "versions", role: "group", "data-label": "version" },
    step("‹", "previous", others[place - 1]), `${place + 1}/${others.length}`, step("›", "next", others[place + 1]));
}
