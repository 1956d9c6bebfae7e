// The list of conversations that the browser keeps.

import { isSound } from "./conversation.js";
import { $, make } from "./elements.js";
import { openStore } from "./store.js";
import { word } from "./words.js";

export class History {
  #store;
  #conversations = []; // the last changed first
  #removed = null; // {conversations, title, shown}, to be undone
  #gone = new WeakSet(); // conversations that were deleted; the answer under way in one may still want it kept
  #isKept = true;
  #open; // shows a conversation, or a new one
  #shown = () => null; // the one that is shown

  static async load(open, shown) {
    const history = new History();
    history.#store = await openStore();
    const { kept } = history.#store;
    history.#isKept = kept !== null;
    history.#conversations = (kept ?? []).filter(isSound).sort((a, b) => b.changed - a.changed);
    history.#open = open;
    history.#shown = shown;
    $("delete-all").addEventListener("click", () => history.#remove(history.#conversations, null));
    $("undo").addEventListener("click", () => history.#undo());
    $("close-notice").addEventListener("click", () => history.#forget());
    return history;
  }

  /** Keep a conversation as it is by now; not one that was deleted. */
  save(conversation) {
    if (this.#gone.has(conversation)) return;
    conversation.changed = Date.now();
    this.#put(conversation);
    if (this.#conversations[0] === conversation) return;
    this.#conversations = [conversation, ...this.#conversations.filter((other) => other !== conversation)];
    this.draw();
  }

  #put(conversation) {
    this.#store.put(conversation).catch(() => { // no space is left
      this.#isKept = false;
      this.draw();
    });
  }

  draw() {
    const focused = document.activeElement?.closest("#list li")?.dataset.id;
    $("list").replaceChildren(...this.#conversations.map((conversation) => {
      const title = conversation.title || word("untitled");
      const open = make("button", {
        type: "button", className: "open", textContent: title, title, onclick: () => this.#open(conversation),
      });
      if (conversation === this.#shown()) open.setAttribute("aria-current", "true");
      const remove = make("button", {
        type: "button", className: "delete", textContent: "×", "aria-label": `${word("delete")}: ${title}`,
        onclick: () => this.#remove([conversation], title),
      });
      return make("li", { "data-id": conversation.id }, open, remove);
    }));
    const item = focused && [...$("list").children].find(({ dataset }) => dataset.id === focused);
    if (focused) (item?.querySelector(".open") ?? $("new")).focus();
    $("delete-all").hidden = this.#conversations.length === 0;
    $("kept").textContent = word(this.#isKept ? "kept" : "unkept");
    $("notice").hidden = this.#removed === null;
    if (this.#removed) {
      const { title } = this.#removed;
      $("notice-text").textContent = title === null ? word("deletedAll") : `${word("deleted")}: ${title}`;
    }
  }

  /** `title` is that of the one conversation; null for all of them. */
  #remove(conversations, title) {
    const shown = this.#shown();
    this.#removed = { conversations, title, shown: conversations.includes(shown) ? shown : null };
    this.#conversations = this.#conversations.filter((conversation) => !conversations.includes(conversation));
    for (const conversation of conversations) {
      this.#gone.add(conversation);
      this.#store.remove(conversation.id);
    }
    if (this.#removed.shown) this.#open();
    else this.draw();
    $("undo").focus();
  }

  #undo() {
    const { conversations, shown } = this.#removed;
    this.#removed = null;
    for (const conversation of conversations) {
      this.#gone.delete(conversation);
      this.#put(conversation);
    }
    this.#conversations = [...conversations, ...this.#conversations].sort((a, b) => b.changed - a.changed);
    if (shown) this.#open(shown);
    else this.draw();
    $("question").focus();
  }

  #forget() {
    this.#removed = null;
    this.draw();
    $("question").focus();
  }
}
