// Talk about a picture, a real room or the visitor's own, in a streamed conversation; without one if the model sees none.

import { can, chat, dataUrl, randomSeed, room } from "./door.js";
import { EXAMPLES, onLanguage, say } from "./words.js";

const at = (id) => document.getElementById(`talk-${id}`);
const KEPT_TURNS = 4;

let picture = null; // {url, seed | null}
let turns = []; // [{asked, answered}] about this picture
let running = null; // the AbortController of the answer being streamed

export async function begin(enter) {
  at("room").onclick = anotherRoom;
  at("enter").onclick = () => picture && enter(picture);
  at("file").onchange = () => at("file").files[0] && ownPicture(at("file").files[0]);
  at("form").onsubmit = (event) => { event.preventDefault(); running ? running.abort() : ask(at("input").value); };
  at("chips").replaceChildren(...EXAMPLES[can("see") ? "talk" : "plain"].map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text;
    chip.onclick = () => ask(text);
    return chip;
  }));
  onLanguage(writeState);
  if (can("see")) await anotherRoom();
  else writeState();
}

async function anotherRoom() {
  try {
    show(await room(randomSeed()));
  } catch (error) {
    bubble("model fault", error.message);
  }
}

async function ownPicture(file) {
  show({ url: await dataUrl(file), seed: null });
  at("file").value = "";
}

function show(next) {
  running?.abort();
  picture = next;
  turns = [];
  at("picture").src = picture.url;
  at("log").replaceChildren();
  writeState();
}

function writeState() {
  if (picture) at("caption").textContent = picture.seed === null ? (can("draw") ? `${say("own")}, ${say("resized")}` : say("own")) : say("room", picture.seed);
  at("send").textContent = say(running ? "stop" : "ask");
  at("send").classList.toggle("primary", !running);
  if (at("log").querySelector(".bubble")) return;
  const hello = document.createElement("p");
  hello.className = "hello";
  hello.textContent = say(can("see") ? "hello" : "helloPlain");
  at("log").replaceChildren(hello);
}

async function ask(text) {
  text = text.trim();
  if (!text || (can("see") && !picture) || running) return;
  at("input").value = "";
  at("log").querySelector(".hello")?.remove();
  bubble("user", text);
  const answer = bubble("model writing", "");
  const turn = { asked: text, answered: "" };
  const mine = running = new AbortController();
  writeState();
  try {
    for await (const piece of chat(messages(text), mine.signal)) {
      if (piece.text) { turn.answered += piece.text; answer.append(piece.text); }
      if (piece.image) answer.append(Object.assign(new Image(), { src: piece.image, alt: "" }));
      at("log").scrollTop = at("log").scrollHeight;
    }
    turns.push(turn);
  } catch (error) {
    if (error.name !== "AbortError") { answer.classList.add("fault"); answer.textContent = error.message; }
  } finally {
    answer.classList.remove("writing");
    if (running === mine) running = null;
    writeState();
  }
}

// The picture goes with the first message; a small model reads only the last few turns.
function messages(text) {
  const said = [...turns.slice(-KEPT_TURNS).flatMap((t) => [t.asked, t.answered]), text];
  return said.map((words, i) => i % 2 ? { role: "assistant", content: words } : {
    role: "user",
    content: i || !picture ? words : [{ type: "image_url", image_url: { url: picture.url } }, { type: "text", text: words }],
  });
}

function bubble(kind, text) {
  const made = document.createElement("div");
  made.className = `bubble ${kind}`;
  made.textContent = text;
  at("log").append(made);
  at("log").scrollTop = at("log").scrollHeight;
  return made;
}
