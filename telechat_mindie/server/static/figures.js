// Live figures of the service, from its /metrics.

import { $ } from "./elements.js";

const POLL_MS = 1000;
const TIMEOUT_MS = 3000;
const POINTS = 60; // of the curve, one a poll
const speeds = [];
let before = null; // {tokens, time} of the poll before

/** The value of an unlabelled or once labelled metric in Prometheus's text format; null where it is absent. */
function metric(text, name) {
  const match = new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)`, "m").exec(text);
  return match === null || !Number.isFinite(Number(match[1])) ? null : Number(match[1]);
}

function show(text) {
  const count = (value) => (value === null ? "–" : String(value));
  $("running").textContent = count(metric(text, "num_requests_running"));
  $("waiting").textContent = count(metric(text, "num_requests_waiting"));
  const use = metric(text, "npu_cache_usage_perc"); // 1 is all of it, whatever the name says
  $("kv").textContent = use === null ? "–" : `${(use * 100).toFixed(1)}%`;
  $("kv-bar").style.width = `${Math.min(1, use ?? 0) * 100}%`;
  const tokens = metric(text, "generation_tokens_total");
  const now = performance.now();
  if (tokens !== null && before !== null) {
    drawSpeed(Math.max(0, ((tokens - before.tokens) * 1000) / (now - before.time)));
  }
  before = tokens === null ? null : { tokens, time: now };
}

function drawSpeed(speed) {
  $("throughput").textContent = speed.toFixed(speed < 100 ? 1 : 0);
  speeds.push(speed);
  if (speeds.length > POINTS) speeds.shift();
  const top = Math.max(...speeds, 1);
  const points = speeds.map((value, index) => `${POINTS - speeds.length + index},${30 - (28 * value) / top}`);
  $("spark").querySelector("polyline").setAttribute("points", points.join(" "));
}

/** Ask again and again, while somebody looks; seldom where there are no figures. */
export async function pollFigures() {
  let wait = POLL_MS;
  if (document.visibilityState === "visible") {
    const controller = new AbortController();
    const timer = setTimeout(() => controller.abort(), TIMEOUT_MS);
    try {
      const response = await fetch("metrics", { signal: controller.signal, cache: "no-store" });
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      show(await response.text());
      $("unserved").hidden = true;
    } catch {
      show("");
      $("unserved").hidden = false;
      wait = 10 * POLL_MS;
    } finally {
      clearTimeout(timer);
    }
  }
  setTimeout(pollFigures, wait);
}
