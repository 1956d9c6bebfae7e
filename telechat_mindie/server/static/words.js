// The page's words in its two languages, and where they stand.

import { memory } from "./memory.js";

const LANGUAGES = ["en", "zh"];
const WORDS = {
  answerer: ["TeleChat", "TeleChat"],
  answering: ["Answering…", "回答中…"],
  appearance: ["Appearance", "外观"],
  asker: ["You", "我"],
  builtin: ["The chat template's own", "对话模板自带的系统提示"],
  cancel: ["Cancel", "取消"],
  chat: ["Chat", "对话"],
  close: ["Close", "关闭"],
  code: ["Code", "代码"],
  conversation: ["Messages", "对话内容"],
  conversations: ["Conversations", "历史对话"],
  copied: ["Copied", "已复制"],
  copy: ["Copy", "复制"],
  copyCode: ["Copy code", "复制代码"],
  cut: ["cut for its length", "达到长度上限"],
  default: ["default", "默认"],
  delete: ["Delete", "删除"],
  deleteAll: ["Delete all", "全部删除"],
  deleted: ["Deleted", "已删除"],
  deletedAll: ["All conversations deleted", "已删除全部对话"],
  edit: ["Edit", "编辑"],
  editing: ["Edit the question", "编辑问题"],
  examples: [["What is MindIE?", "生抽与老抽的区别？", "红烧肉怎么做？"], ["生抽与老抽的区别？", "红烧肉怎么做？", "What is MindIE?"]],
  exportJson: ["Export as JSON", "导出 JSON"],
  exportMarkdown: ["Export as Markdown", "导出 Markdown"],
  frequency: ["Frequency penalty", "频率惩罚"],
  hint: ["Enter sends, Shift+Enter starts a new line, Esc stops an answer.", "回车发送，Shift+回车换行，Esc 停止回答。"],
  image: ["Image", "图片"],
  incomplete: ["The answer broke off.", "回答中断了。"],
  kept: ["Kept in this browser alone.", "仅保存在本浏览器中。"],
  kv: ["KV cache", "KV 缓存"],
  language: ["Language", "语言"],
  live: ["Live figures", "实时数据"],
  most: ["Max tokens", "最大长度"],
  newChat: ["New chat", "新对话"],
  next: ["Next version", "下一版本"],
  noModel: ["The service names no model.", "服务没有给出模型。"],
  presence: ["Presence penalty", "存在惩罚"],
  previous: ["Previous version", "上一版本"],
  prompt: ["Prompt", "提示文本"],
  question: ["Ask something", "输入问题"],
  random: ["random", "随机"],
  raw: ["Raw completion", "原文续写"],
  rawHint: [
    "Goes on with the text as it is: no chat template, nothing of what was said before.",
    "按原文直接续写：不套用对话模板，也不带之前的内容。",
  ],
  rawQuestion: ["Text to go on with", "输入要续写的文本"],
  regenerate: ["Regenerate", "重新生成"],
  repetition: ["Repetition penalty", "重复惩罚"],
  reset: ["Reset to defaults", "恢复默认"],
  running: ["Running", "运行中"],
  seed: ["Seed", "随机种子"],
  send: ["Send", "发送"],
  settings: ["Settings", "设置"],
  side: ["Figures and settings", "数据与设置"],
  skip: ["Skip to the question", "跳到输入框"],
  speed: ["Speed", "生成速度"],
  stop: ["Stop", "停止"],
  stopStrings: ["Stop strings", "停止字符串"],
  stopStringsHint: ["one a line; \\n is a line break", "每行一个；\\n 表示换行"],
  stopped: ["stopped", "已停止"],
  system: ["System prompt", "系统提示"],
  temperature: ["Temperature", "温度"],
  theme: ["Colours", "配色"],
  themes: [{ auto: "Auto", light: "Light", dark: "Dark" }, { auto: "自动", light: "浅色", dark: "深色" }],
  thinking: ["Thinking…", "思考中…"],
  thought: ["Thought for", "已思考"],
  throughput: ["Throughput", "总吞吐"],
  tokens: ["tokens", "个 token"],
  ttft: ["First token", "首 token"],
  undo: ["Undo", "撤销"],
  unkept: ["This browser cannot keep them: gone with the page.", "浏览器无法保存：关闭页面后即消失。"],
  unreachable: ["The service cannot be reached.", "无法连接服务。"],
  unserved: ["This port does not serve /metrics.", "此端口不提供 /metrics。"],
  untitled: ["New chat", "新对话"],
  version: ["Version", "版本"],
  waiting: ["Waiting", "排队中"],
  welcome: ["What would you like to know?", "想了解点什么？"],
};
const PLACES = {
  "data-word": (element, word) => { element.textContent = word; },
  "data-label": (element, word) => element.setAttribute("aria-label", word),
  "data-placeholder": (element, word) => element.setAttribute("placeholder", word),
};

let language = memory.get("language");
if (!LANGUAGES.includes(language)) language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";

export const word = (key) => WORDS[key][LANGUAGES.indexOf(language)];

/** Write the words that `root` and what is in it name in their `data-` attributes. */
export function translate(root) {
  for (const [attribute, write] of Object.entries(PLACES)) {
    const within = root.querySelectorAll(`[${attribute}]`);
    for (const element of root.matches?.(`[${attribute}]`) ? [root, ...within] : within) {
      write(element, word(element.getAttribute(attribute)));
    }
  }
  return root;
}

/** Let `button` change the language; after each change, and now, `redraw` writes what is no plain word. */
export function offerLanguages(button, redraw) {
  const show = () => {
    const other = language === "zh" ? "en" : "zh";
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    button.textContent = other === "zh" ? "中文" : "English";
    button.lang = other;
    translate(document);
    redraw();
  };
  button.addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    memory.set("language", language);
    show();
  });
  show();
}
