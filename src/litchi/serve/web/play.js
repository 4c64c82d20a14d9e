// Play the dream: a world session, its frames, its timeline, its keys, and other worlds that were forked from it.

import { randomSeed, world } from "./door.js";
import { onLanguage, say } from "./words.js";

const at = (id) => document.getElementById(`play-${id}`);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "forward", p: "pickup", d: "drop", t: "toggle" };
const TILES = 8;
const MOST_WAITING = 3; // keys pressed faster than the model dreams are dropped beyond this
const PAUSE = 220; // milliseconds between the model's own moves, so that they can be seen

let worlds = []; // {socket, frames, waiting}: the frame message of every step, and messages not yet answered
let here = null; // the world that is shown
let auto = false; // the model is playing

export function begin() {
  at("room").onclick = () => start({ seed: randomSeed() });
  at("reset").onclick = () => { auto = false; send({ type: "reset" }); };
  at("rewind").onclick = () => { auto = false; send({ type: "rewind", step: Math.max(0, here.frames.length - 2) }); };
  at("fork").onclick = () => { auto = false; writeState(); send({ type: "fork" }); };
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
export const shown = () => { if (!here) start({ seed: randomSeed() }); };

/** Begin in the room of a seed, or dream on from a picture: {seed} or {image}. */
export function start(what) {
  auto = false;
  const message = { type: "start", ...what };
  if (here?.socket.readyState === WebSocket.OPEN) return send(message);
  worlds = worlds.filter((each) => each !== here);
  const made = open({ socket: world(), frames: [], waiting: [message] });
  made.socket.onopen = () => transmit(made);
  here = made;
}

/** Go on in a fork, which has the frames up to a step and begins by sending that step's again. */
function follow({ fork, step }, frames) {
  here = open({ socket: world(fork), frames: frames.slice(0, step), waiting: [{ type: "fork" }] });
}

function open(made) {
  worlds.push(made);
  made.socket.onmessage = (event) => receive(made, JSON.parse(event.data));
  made.socket.onclose = () => {
    made.waiting = [];
    if (made !== here) worlds = worlds.filter((each) => each !== made);
    else { auto = false; at("note").textContent = say("lost"); }
    writeState();
  };
  return made;
}

function move(action) {
  auto = false;
  const button = document.querySelector(`[data-action=${action}]`);
  button.classList.add("down");
  setTimeout(() => button.classList.remove("down"), 130);
  send({ type: "action", action });
}

function send(message) {
  if (here?.socket.readyState !== WebSocket.OPEN || here.waiting.length >= MOST_WAITING) return;
  here.waiting.push(message);
  if (here.waiting.length === 1) transmit(here);
}

/** Send the first message that waits. */
const transmit = ({ socket, waiting }) => { if (waiting.length) socket.send(JSON.stringify(waiting[0])); };

function receive(from, message) {
  from.waiting.shift();
  if (message.type === "error") {
    auto = false;
    at("note").textContent = message.message;
  } else if (message.type === "fork") {
    follow(message, from.frames);
  } else {
    at("note").textContent = "";
    from.frames = [...from.frames.slice(0, message.step), message];
    if (message.terminated || message.truncated) auto = false;
  }
  writeState();
  transmit(from);
  const idle = () => auto && !here.waiting.length;
  if (idle()) setTimeout(() => idle() && send({ type: "policy" }), PAUSE);
}

function writeState() {
  at("policy").textContent = say(auto ? "halt" : "policy");
  at("policy").classList.toggle("primary", !auto);
  at("forks").hidden = worlds.length < 2;
  at("forks").replaceChildren(...(worlds.length < 2 ? [] : worlds.map(tab)));
  const now = here?.frames.at(-1);
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
  at("line").replaceChildren(...here.frames.map(dot));
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

function tab(each, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = say("nth", index + 1);
  button.classList.toggle("primary", each === here);
  button.setAttribute("aria-pressed", each === here);
  button.onclick = () => { auto = false; here = each; writeState(); };
  return button;
}

function dot(frame) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = frame.real === null ? "free" : frame.same ? "same" : "off";
  button.title = say("goTo", frame.step);
  button.setAttribute("aria-label", button.title);
  if (frame.step === here.frames.length - 1) button.setAttribute("aria-current", "step");
  button.onclick = () => { auto = false; send({ type: "rewind", step: frame.step }); };
  return button;
}
