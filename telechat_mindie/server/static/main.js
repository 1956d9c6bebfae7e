// The page's parts, put together.

import { drawTheme, offerPanels, offerThemes, openPanel } from "./appearance.js";
import { Chat } from "./chat.js";
import { toJson, toMarkdown } from "./conversation.js";
import { $, button } from "./elements.js";
import { download } from "./export.js";
import { pollFigures } from "./figures.js";
import { History } from "./history.js";
import { modelName } from "./service.js";
import { isRaw, isValid, openSettings } from "./settings.js";
import { offerLanguages, word } from "./words.js";

const chat = new Chat(
  (conversation) => {
    history.save(conversation);
    drawExports();
  },
  () => isValid(() => openPanel("side")),
);
const history = await History.load(open, () => chat.conversation);

function open(conversation) {
  chat.open(conversation);
  history.draw();
  drawExports();
  openPanel(null);
  $("question").focus();
}

// ---- the question
const asked = () => (isRaw() ? $("question").value : $("question").value.trim()); // a raw text's spaces count

function fitQuestion() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // and its borders
  $("send").disabled = asked() === "";
}

$("question").addEventListener("input", fitQuestion);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends a word in an input method
  event.preventDefault();
  $("composer").requestSubmit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = asked();
  if (question === "" || !chat.ask(question)) return;
  $("question").value = "";
  fitQuestion();
});
$("stop").addEventListener("click", () => chat.stop());

// ---- all around it
function drawExports() {
  for (const id of ["export-markdown", "export-json"]) $(id).disabled = chat.conversation.nodes.length === 0;
}

function drawMode() {
  const key = isRaw() ? "rawQuestion" : "question";
  $("question").dataset.label = key;
  $("question").dataset.placeholder = key;
  $("question").placeholder = word(key);
  $("question").setAttribute("aria-label", word(key));
  $("system").disabled = isRaw();
}

function drawExamples() {
  $("examples").replaceChildren(...word("examples").map((question) => {
    const example = button("send", () => chat.ask(question));
    example.textContent = question;
    delete example.dataset.word;
    return example;
  }));
}

for (const id of ["new", "new-too"]) $(id).addEventListener("click", () => open());
$("export-markdown").addEventListener("click", () => {
  const name = (role) => word(role === "user" ? "asker" : "answerer");
  download(chat.conversation.title, "md", "text/markdown", toMarkdown(chat.conversation, name));
});
$("export-json").addEventListener("click", () => {
  download(chat.conversation.title, "json", "application/json", toJson(chat.conversation));
});
offerPanels();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) chat.stop();
});
offerThemes();
openSettings(drawMode);
offerLanguages($("language"), () => {
  drawTheme();
  drawExamples();
  history.draw();
  chat.redraw();
});
drawExports();
fitQuestion();
pollFigures();
$("question").focus();
modelName().then((name) => {
  $("model").textContent = $("model").title = name;
}, () => { /* said with the first answer */ });
