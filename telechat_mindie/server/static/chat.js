// The conversation on the page: asking, stopping, other versions.

import { add, branch, create, messages, show, versions } from "./conversation.js";
import { $, announce, everyFrame } from "./elements.js";
import { answer } from "./service.js";
import { isRaw, parameters, systemPrompt } from "./settings.js";
import { Turn } from "./turn.js";
import { word } from "./words.js";

const NEAR_END = 60; // pixels from the end within which a reader is taken along
const SAVE_MS = 1000; // between two times that a growing answer is kept

export class Chat {
  conversation = create();
  #turns = [];
  #running = null; // AbortController of the answer under way
  #save;
  #isReady;

  /** `save(conversation)` keeps it; `isReady()` says whether the settings let a question be asked. */
  constructor(save, isReady) {
    this.#save = save;
    this.#isReady = isReady;
  }

  #mayAsk() { return this.#running === null && this.#isReady(); }

  /** Show a conversation, a new one by default. An answer under way is stopped. */
  open(conversation = create()) {
    this.stop();
    this.#setRunning(null);
    this.conversation = conversation;
    this.#drawAll();
    $("log").scrollTop = $("log").scrollHeight;
  }

  /** Go on with a question; false if that may not be. */
  ask(question) {
    if (!this.#mayAsk()) return false;
    const node = add(this.conversation, this.conversation.shown, { role: "user", content: question, isRaw: isRaw() });
    this.#append(node);
    this.#answer(node);
    return true;
  }

  stop() { this.#running?.abort(); }

  /** Write again what depends on the language. */
  redraw() {
    for (const turn of this.#turns) turn.redraw();
  }

  #does = {
    edit: (turn) => turn.edit((question) => {
      if (!this.#mayAsk()) return;
      const { parent, isRaw } = turn.node;
      const node = add(this.conversation, parent, { role: "user", content: question, isRaw });
      this.#drawAll();
      this.#answer(node);
    }),
    regenerate: (turn) => {
      if (!this.#mayAsk()) return;
      this.conversation.shown = turn.node.parent;
      this.#drawAll();
      this.#answer(this.conversation.nodes[turn.node.parent]);
    },
    choose: (node, label) => {
      if (this.#running !== null) return;
      show(this.conversation, node);
      this.#save(this.conversation);
      this.#drawAll();
      const { element } = this.#turns.find((turn) => turn.node === node);
      const pressed = element.querySelector(`.versions [data-label=${label}]:enabled`);
      (pressed ?? element.querySelector(".versions :enabled")).focus();
      element.scrollIntoView({ block: "nearest" });
    },
  };

  async #answer(question) {
    const { conversation } = this;
    const { isRaw } = question;
    const sampling = parameters();
    const system = systemPrompt();
    const said = messages(conversation, question.id);
    const prompt = isRaw
      ? { prompt: question.content }
      : { messages: system ? [{ role: "system", content: system }, ...said] : said };
    const request = isRaw ? sampling : { system, ...sampling };
    const node = add(conversation, question.id, { role: "assistant", content: "", isRaw, request });
    const turn = this.#append(node);
    const draw = everyFrame((isOver = false) => keepingEnd(() => turn.draw(isOver)));
    const controller = new AbortController();
    this.#setRunning(controller);
    turn.draw(false);
    $("log").scrollTop = $("log").scrollHeight;
    announce(word("answering"));
    this.#save(conversation);
    let saved = performance.now();
    await answer(node, { ...prompt, ...sampling }, controller.signal, () => {
      draw.ask();
      if (performance.now() < saved + SAVE_MS) return;
      saved = performance.now();
      this.#save(conversation);
    });
    draw.end(true);
    this.#save(conversation);
    if (this.#running !== controller) return; // another conversation was opened meanwhile
    announce(node.fault ? "" : node.content); // a fault is an alert already
    this.#setRunning(null);
    if (node.ttft !== undefined) $("ttft").textContent = node.ttft.toFixed(0);
    if (node.speed) $("speed").textContent = node.speed.toFixed(1);
  }

  #drawAll() {
    keepFocus("#log .turn *");
    this.#turns = [];
    for (const element of $("log").querySelectorAll(".turn")) element.remove();
    const nodes = branch(this.conversation);
    $("welcome").hidden = nodes.length > 0;
    for (const node of nodes) this.#append(node).draw(true);
  }

  #append(node) {
    const turn = new Turn(node, this.#does, versions(this.conversation, node));
    keepFocus("#welcome *");
    $("welcome").hidden = true;
    this.#turns.push(turn);
    $("log").append(turn.element);
    if (node.role === "user") turn.draw(true);
    return turn;
  }

  #setRunning(controller) {
    keepFocus("#send, #stop");
    this.#running = controller;
    $("send").hidden = controller !== null;
    $("stop").hidden = controller === null;
    $("log").classList.toggle("running", controller !== null);
  }
}

/** Run `change`, and stay at the end of the conversation if that is where the reader was. */
function keepingEnd(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** Before what may have the focus goes: the focus would fall to the body. */
function keepFocus(going) {
  if (document.activeElement?.matches(going)) $("question").focus();
}
