// The server's endpoints as the page calls them.

// A key is given once in the address, after #key=, which browsers do not send; it is kept for this tab.
const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) { sessionStorage.setItem("key", given); history.replaceState(null, "", location.pathname); }
const key = sessionStorage.getItem("key");
const auth = key ? { Authorization: `Bearer ${key}` } : {};

export const model = { name: "", abilities: null };

/** Ask what the model does besides talking; where the server does not say, it is taken to do everything. */
export async function learn() {
  const answer = await fetch("v1/models", { headers: auth }).then(checked).then((body) => body.json()).catch(() => null);
  model.abilities = answer?.data[0]?.abilities ?? null;
}

export const can = (ability) => model.abilities?.includes(ability) ?? true;

export async function health() {
  const body = await (await fetch("health")).json();
  model.name = body.model;
  return body;
}

/** A real room: {url: data URL of its first frame, task, seed}. */
export async function room(seed) {
  const answer = await checked(await fetch(`v1/rooms?seed=${seed}`, { headers: auth }));
  return { url: await dataUrl(await answer.blob()), task: decodeURIComponent(answer.headers.get("X-Litchi-Task") ?? ""), seed };
}

/** Stream a chat answer: yields {text} and {image} as they come. */
export async function* chat(messages, signal) {
  const answer = await post("v1/chat/completions", { model: model.name, messages, stream: true, max_tokens: 256 }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const body = JSON.parse(data);
      if (body.error) throw new Error(body.error.message);
      const delta = body.choices[0]?.delta ?? {};
      if (delta.content) yield { text: delta.content };
      for (const each of delta.images ?? []) yield { image: each.image_url.url };
    }
  }
}

/** Draw one picture: {url, plan, seed}. Without a seed the server draws one. */
export async function draw(prompt, seed) {
  const asked = { model: model.name, prompt, ...(seed === undefined ? {} : { seed }) };
  const body = await (await post("v1/images/generations", asked)).json();
  const [made] = body.data;
  return { url: `data:image/png;base64,${made.b64_json}`, plan: made.revised_prompt ?? "", seed: body.seed };
}

/** A world session's socket; with the name of a fork, that fork's. */
export function world(fork) {
  const address = new URL("v1/worlds", location.href);
  if (fork) address.searchParams.set("fork", fork);
  address.protocol = address.protocol.replace("http", "ws");
  // Browsers set no headers on a socket; base64url is what a subprotocol may hold.
  const packed = key ? btoa(String.fromCharCode(...new TextEncoder().encode(key))) : "";
  const bearer = key ? [`litchi-key.${packed.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`] : [];
  return new WebSocket(address, ["litchi", ...bearer]);
}

// Training uses only rooms below 1e9 (HELD_OUT), so that every room shown here is an unseen one.
export const randomSeed = () => 1_000_000_000 + Math.floor(Math.random() * 1_000_000);

export const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

const post = async (path, body, signal) => checked(await fetch(path, {
  method: "POST", signal, headers: { "Content-Type": "application/json", ...auth }, body: JSON.stringify(body),
}));

async function checked(answer) {
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message ?? `HTTP ${answer.status}`);
}
