// The page: a panel for each thing that the model can do, one language at a time, and whether the server is there.

import * as draw from "./draw.js";
import { can, health, learn, model } from "./door.js";
import * as play from "./play.js";
import * as talk from "./talk.js";
import { onLanguage, say, speakPlainly, toggleLanguage, writeWords } from "./words.js";

const at = (id) => document.getElementById(id);
await learn();
document.querySelectorAll("[data-needs]").forEach((part) => { part.hidden = !can(part.dataset.needs); });
at("panel-talk").classList.toggle("plain", !can("see"));
if (!can("see")) speakPlainly();
const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")];
document.querySelector(".tabs").hidden = tabs.length === 1;
let reachable = null;

function choose(tab) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
    at(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (tab.id === "tab-play") play.shown();
}

tabs.forEach((tab, i) => {
  tab.onclick = () => {
    choose(tab);
    // The arrow keys belong to the rooms now, not to the tabs.
    if (tab.id === "tab-play") at("panel-play").focus({ preventScroll: true });
  };
  tab.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  };
});

async function look() {
  reachable = await health().then((body) => body.status === "ok", () => false);
  writeStatus();
}

function writeStatus() {
  at("status").className = `status ${reachable ? "ok" : "bad"}`;
  at("status").textContent = reachable ? `${model.name} · ${say("ready")}` : say("unreachable");
}

at("language").onclick = toggleLanguage;
at("door").textContent = `base_url = "${location.origin}/v1"`;
onLanguage(() => reachable === null || writeStatus());
writeWords();
await look();
setInterval(look, 15_000);
if (can("draw")) draw.begin();
if (can("dream")) play.begin();
await talk.begin((picture) => {
  play.start(picture.seed === null ? { image: picture.url } : { seed: picture.seed });
  at("tab-play").click();
});
document.body.dataset.ready = "yes";
