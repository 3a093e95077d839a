"use strict";
// The chat page: what is said stays in this tab. Text is only ever set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const [talk, notice, model] = [$("talk"), $("notice"), $("model")];
const box = $("ask").querySelector("textarea");
let turns = [];
let running = null;

function say(text, bad = false) {
  notice.textContent = text;
  notice.className = bad ? "bad" : "";
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const reply = await fetch(path, { ...options, headers });
  $("key").hidden = reply.status !== 401;
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `the server says ${reply.status}`);
}

async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    const loaded = (await (await fetch("ready")).json()).loaded;
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === loaded[0])));
    say(data.length ? "" : "No model is installed. Get one by: rl-mlx pull org/repo:Q4_K_M", !data.length);
  } catch (error) {
    say(error.message, true);
  }
}

function show(role, text = "") {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  talk.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return turn;
}

/** The JSON of each server-sent event. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

/** Thoughts go into a fold above the answer. */
function think(turn, text) {
  let fold = turn.previousElementSibling;
  if (fold?.tagName !== "DETAILS") {
    fold = document.createElement("details");
    const title = document.createElement("summary");
    title.textContent = "Thoughts";
    fold.append(title, "");
    turn.before(fold);
  }
  fold.lastChild.textContent += text;
}

async function answer() {
  const turn = show("assistant");
  running = new AbortController();
  [$("send").hidden, $("stop").hidden] = [true, false];
  say("");
  const begun = performance.now();
  let text = "";
  try {
    const body = { model: model.value, messages: turns, stream: true, stream_options: { include_usage: true } };
    const reply = await call("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: running.signal,
    });
    for await (const { choices = [], usage, error } of events(reply)) {
      if (error) throw new Error(error.message);
      const delta = choices[0]?.delta ?? {};
      if (delta.reasoning_content) think(turn, delta.reasoning_content);
      if (delta.content) turn.textContent = text += delta.content;
      talk.scrollTop = talk.scrollHeight;
      if (usage) say(`${usage.completion_tokens} tokens in ${((performance.now() - begun) / 1000).toFixed(1)} s`);
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  }
  running = null;
  [$("send").hidden, $("stop").hidden] = [false, true];
  if (text) turns.push({ role: "assistant", content: text });
  else turn.remove();
  box.focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (!text || running) return;
  box.value = "";
  if (turns.at(-1)?.role === "user") turns.pop(); // it was never answered
  turns.push({ role: "user", content: text });
  show("user", text);
  answer();
});
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  talk.replaceChildren();
  say("");
  box.focus();
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").querySelector("input").value);
  listModels();
});
listModels();
