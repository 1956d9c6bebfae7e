// What the page asks of the service that it came from. All paths are relative, so that it may stand behind a prefix.

import { splitThought } from "./thought.js";
import { word } from "./words.js";

const LEAST_SHARE = 0.1;

let model = null;

/** The name of the service's model, which is asked for until the service gives it. `signal` stops that. */
export async function modelName(signal) {
  model ??= await findModel(signal);
  return model;
}

async function findModel(signal) {
  const response = await fetch("v1/models", { signal });
  if (!response.ok) throw new Error(await errorText(response));
  const name = (await response.json())?.data?.[0]?.id;
  if (typeof name !== "string") throw new Error(word("noModel"));
  return name;
}

/** The error of MindIE ({error}), of OpenAI ({error: {message}}) or of FastAPI ({detail}); of others all they say. */
function errorIn(data) {
  const error = data.error ?? data.detail ?? data.message ?? data;
  const said = error.message ?? error;
  return typeof said === "string" ? said : JSON.stringify(said);
}

async function errorText(response) {
  const text = (await response.text()).slice(0, 2000);
  try {
    return `HTTP ${response.status}: ${errorIn(JSON.parse(text))}`;
  } catch {
    return `HTTP ${response.status}: ${text}`;
  }
}

/** Yield the data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length > 0) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

/** Ask, and let `node` grow: an answer's {model, content, thought, thoughtMs, reason, isStopped, fault} and its figures
    {tokens, promptTokens, ttft, speed}: milliseconds to its first text, and tokens per second after it. Tokens are as
    the service counted them, which it does at the end: an answer that was stopped has no count and no speed. Nor has one
    that came nearly at once, within LEAST_SHARE of its time: it was held up on its way, and its speed is not to be seen.

    `body` is the request: with `prompt` a text is completed, with `messages` a chat goes on. `signal` stops it, and
    `onGrowth` is called after each change of the text. */
export async function answer(node, body, signal, onGrowth) {
  const begin = performance.now();
  let first = null; // when its first text came
  let thought = ""; // as the service tells it apart
  let text = "";
  let isThoughtOver = false;
  node.isStopped = true; // until its end: what the browser kept of it may be all that there will be
  const grow = (now) => {
    const [found, said] = thought || "prompt" in body ? [thought, text] : splitThought(text);
    node.content = found ? said.trimStart() : said;
    node.thought = found.trim();
    if (node.thought && !isThoughtOver) node.thoughtMs = now - begin;
    isThoughtOver = node.thought !== "" && node.content !== "";
    onGrowth();
  };
  try {
    node.model = await modelName(signal);
    const response = await fetch("prompt" in body ? "v1/completions" : "v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: node.model, ...body, stream: true }),
      signal,
    });
    if (!response.ok) throw new Error(await errorText(response));
    let isEnded = false;
    for await (const event of events(response)) {
      if (event === "[DONE]") { isEnded = true; continue; }
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Error(errorIn(chunk));
      const choice = chunk.choices?.[0];
      const said = choice?.text ?? choice?.delta?.content ?? "";
      const thinks = choice?.delta?.reasoning_content ?? "";
      const now = performance.now();
      if (said || thinks) {
        if (first === null) {
          first = now;
          node.ttft = first - begin;
        }
        thought += thinks;
        text += said;
        grow(now);
      }
      if (choice?.finish_reason) { node.reason = choice.finish_reason; isEnded = true; }
      if (chunk.usage) {
        node.tokens = chunk.usage.completion_tokens;
        node.promptTokens = chunk.usage.prompt_tokens;
        const isSpread = first !== null && now - first > LEAST_SHARE * (now - begin);
        if (isSpread && node.tokens > 1) node.speed = (node.tokens - 1) / ((now - first) / 1000);
      }
    }
    if (!isEnded) throw new Error(word("incomplete"));
    node.isStopped = false;
  } catch (error) {
    if (signal.aborted) return;
    node.isStopped = false;
    node.fault = error instanceof TypeError ? word(first === null ? "unreachable" : "incomplete") : error.message;
  }
}
