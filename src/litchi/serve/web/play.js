// Play the dream: one world session, its frames, its timeline, its keys.

import { randomSeed, world } from "./door.js";
import { onLanguage, say } from "./words.js";

const at = (id) => document.getElementById(`play-${id}`);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "forward", p: "pickup", d: "drop", t: "toggle" };
const TILES = 8;
const MOST_WAITING = 3; // keys pressed faster than the model dreams are dropped beyond this
const PAUSE = 220; // milliseconds between the model's own moves, so that they can be seen

let socket = null;
let frames = []; // the frame message of every step up to now
let waiting = []; // messages not yet answered, the first one sent
let auto = false; // the model is playing

export function begin() {
  at("room").onclick = () => start({ seed: randomSeed() });
  at("reset").onclick = () => { auto = false; send({ type: "reset" }); };
  at("rewind").onclick = () => { auto = false; send({ type: "rewind", step: Math.max(0, frames.length - 2) }); };
  at("policy").onclick = () => { auto = !auto; writeState(); if (auto) send({ type: "policy" }); };
  document.querySelectorAll("[data-action]").forEach((button) => {
    button.onclick = () => move(button.dataset.action);
  });
  window.addEventListener("keydown", (event) => {
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const elsewhere = at("dream").closest("section").hidden || event.target.matches("input, textarea, [role=tab]");
    if (!action || elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(action);
  });
  onLanguage(writeState);
}

/** Called whenever the panel is shown: the first time, a room is opened. */
export const shown = () => { if (!socket) start({ seed: randomSeed() }); };

/** Begin in the room of a seed, or dream on from a picture: {seed} or {image}. */
export function start(what) {
  auto = false;
  const message = { type: "start", ...what };
  if (socket?.readyState === WebSocket.OPEN) return send(message);
  socket = world();
  waiting = [message];
  socket.onopen = () => transmit();
  socket.onmessage = (event) => receive(JSON.parse(event.data));
  socket.onclose = () => { auto = false; waiting = []; at("note").textContent = say("lost"); writeState(); };
}

function move(action) {
  auto = false;
  const button = document.querySelector(`[data-action=${action}]`);
  button.classList.add("down");
  setTimeout(() => button.classList.remove("down"), 130);
  send({ type: "action", action });
}

function send(message) {
  if (socket?.readyState !== WebSocket.OPEN || waiting.length >= MOST_WAITING) return;
  waiting.push(message);
  if (waiting.length === 1) transmit();
}

const transmit = () => { if (waiting.length) socket.send(JSON.stringify(waiting[0])); };

function receive(message) {
  waiting.shift();
  if (message.type === "error") {
    auto = false;
    at("note").textContent = message.message;
  } else {
    at("note").textContent = "";
    frames = [...frames.slice(0, message.step), message];
    if (message.terminated || message.truncated) auto = false;
  }
  writeState();
  transmit();
  if (auto && !waiting.length) setTimeout(() => auto && !waiting.length && send({ type: "policy" }), PAUSE);
}

function writeState() {
  at("policy").textContent = say(auto ? "halt" : "policy");
  at("policy").classList.toggle("primary", !auto);
  const now = frames.at(-1);
  if (!now) return;
  const alone = now.real === null;
  at("dream").src = now.dream;
  if (!alone) at("real").src = now.real;
  at("real-box").hidden = alone;
  at("dream").closest(".pair").classList.toggle("alone", alone);
  at("ms").textContent = now.action === null ? "" : `${Math.round(now.ms)} ms`;
  at("step").textContent = now.step;
  at("marks").replaceChildren(...now.wrong_tiles.map(mark));
  writeBadge(now, alone);
  const won = now.terminated && now.reward > 0;
  at("task").textContent = now.task ? say(won ? "won" : "task", now.task) : "";
  at("task").classList.toggle("done", won);
  at("policy").disabled = !now.task;
  at("rewind").disabled = at("reset").disabled = now.step === 0;
  at("line").replaceChildren(...frames.map(dot));
}

function writeBadge(now, alone) {
  const badge = at("badge");
  badge.className = `badge ${alone ? "free" : now.same ? "same" : "off"}`;
  if (alone) badge.textContent = say("free");
  else if (!now.same) badge.textContent = say("off", now.wrong_tiles.length, now.diverged_at);
  else badge.textContent = now.diverged_at === null ? say("same") : say("healed", now.diverged_at);
}

function mark([row, column]) {
  const box = document.createElement("i");
  box.style.top = `${(100 * row) / TILES}%`;
  box.style.left = `${(100 * column) / TILES}%`;
  return box;
}

function dot(frame) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = frame.real === null ? "free" : frame.same ? "same" : "off";
  button.title = say("goTo", frame.step);
  button.setAttribute("aria-label", button.title);
  if (frame.step === frames.length - 1) button.setAttribute("aria-current", "step");
  button.onclick = () => { auto = false; send({ type: "rewind", step: frame.step }); };
  return button;
}
