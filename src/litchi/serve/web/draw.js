// Draw: a picture from words, enlarged, with the earlier ones kept beside it.

import { draw } from "./door.js";
import { EXAMPLES, say } from "./words.js";

const at = (id) => document.getElementById(`draw-${id}`);
const KEPT = 12;

export function begin() {
  at("prompt").value = EXAMPLES.draw[0];
  at("form").onsubmit = (event) => { event.preventDefault(); go(); };
  at("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); go(); }
  };
  at("chips").replaceChildren(...EXAMPLES.draw.map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text;
    chip.onclick = () => { at("prompt").value = text; go(); };
    return chip;
  }));
}

async function go() {
  const prompt = at("prompt").value.trim();
  if (!prompt || at("go").disabled) return;
  const frame = at("picture").parentElement;
  at("go").disabled = true;
  frame.classList.add("busy");
  const began = performance.now();
  try {
    const { url, plan, seed } = await draw(prompt, at("vary").checked ? undefined : 0);
    const drawn = { url, prompt, plan, ms: Math.round(performance.now() - began), seed };
    show(drawn);
    keep(drawn);
  } catch (error) {
    at("caption").textContent = error.message;
  } finally {
    at("go").disabled = false;
    frame.classList.remove("busy");
  }
}

function show({ url, prompt, plan, ms, seed }) {
  at("picture").src = url;
  at("picture").alt = prompt;
  at("picture").hidden = false;
  at("empty").hidden = true;
  at("caption").textContent = say("drawn", ms, seed);
  at("plan").textContent = plan;
}

function keep(drawn) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = drawn.prompt;
  button.append(Object.assign(new Image(), { src: drawn.url, alt: drawn.prompt }));
  button.onclick = () => { at("prompt").value = drawn.prompt; show(drawn); };
  at("gallery").prepend(button);
  while (at("gallery").children.length > KEPT) at("gallery").lastChild.remove();
}
