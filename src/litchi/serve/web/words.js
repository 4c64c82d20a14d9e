// What the page says, in English and in Chinese.

const WORDS = {
  en: {
    tagline: "One small model that sees, talks, draws, foresees and acts.",
    taglinePlain: "A language model: it reads and writes text, and sees and draws no pictures.",
    tabTalkPlain: "Talk", askHintPlain: "Say something", helloPlain: "Say something. This model reads text only.",
    tabTalk: "Talk about a picture", tabDraw: "Draw", tabPlay: "Play the dream",
    ready: "ready", unreachable: "server unreachable",
    anotherRoom: "Another room", ownPicture: "Your own picture", enter: "Walk into it",
    roomAlt: "A room seen from above", conversation: "Conversation", examples: "Examples",
    askHint: "Ask about the picture", ask: "Ask", stop: "Stop",
    hello: "Ask what is in the picture. The model has never seen this room before.",
    room: (seed) => `Unseen room ${seed}`, own: "Your picture", resized: "resized to 64×64 for the model",
    drawEmpty: "The picture appears here", drawTitle: "Describe a room",
    drawHelp: "The model plans in words first, then draws all 64 tiles together.",
    drawGo: "Draw", vary: "a different one each time", earlier: "Earlier pictures",
    drawn: (ms, seed) => `Drawn in ${ms} ms, seed ${seed}`,
    playLead: "Two rooms under the same keys. The left one is dreamed by the model, frame after frame, from nothing but its own last frame. The right one is the simulator.",
    dream: "Dream", real: "Real", dreamAlt: "The dreamed room", realAlt: "The real room",
    step: "Step", timeline: "Steps: choose one to go back to it", moves: "Moves",
    same: "same as the real room", off: (n, at) => `${n} ${n === 1 ? "tile differs" : "tiles differ"}, first at step ${at}`,
    healed: (at) => `same again, differed at step ${at}`, free: "dreamed from a picture",
    task: (t) => `Task: ${t}`, won: (t) => `Done: ${t}`,
    left: "turn left", forward: "forward", right: "turn right", pickup: "pick up", drop: "drop", toggle: "toggle",
    policy: "Let the model play", halt: "Stop the model", rewind: "Back one step", reset: "To the start",
    fork: "Fork here", forks: "Worlds: choose one to go on in it", nth: (n) => `World ${n}`,
    goTo: (n) => `Back to step ${n}`, lost: "The connection was lost. Choose another room to start again.",
    footer: "Everything on this page is one checkpoint behind an OpenAI-compatible door.",
  },
  zh: {
    tagline: "一个小模型：能看、能说、能画、能预见、能行动。",
    taglinePlain: "一个语言模型：只读写文字，不看图，也不画图。",
    tabTalkPlain: "对话", askHintPlain: "说点什么", helloPlain: "说点什么吧。这个模型只读文字。",
    tabTalk: "看图对话", tabDraw: "画图", tabPlay: "走进梦境",
    ready: "就绪", unreachable: "无法连接服务器",
    anotherRoom: "换一个房间", ownPicture: "上传图片", enter: "走进这个房间",
    roomAlt: "俯视的房间", conversation: "对话", examples: "示例",
    askHint: "问问这张图", ask: "提问", stop: "停止",
    hello: "问问图里有什么。模型从未见过这个房间。",
    room: (seed) => `从未见过的房间 ${seed}`, own: "你的图片", resized: "已缩放到 64×64 供模型使用",
    drawEmpty: "图片会出现在这里", drawTitle: "描述一个房间",
    drawHelp: "模型先用文字打好草稿，再同时画出全部 64 个格子。",
    drawGo: "画", vary: "每次画得不同", earlier: "之前的图片",
    drawn: (ms, seed) => `用时 ${ms} 毫秒，种子 ${seed}`,
    playLead: "同样的按键，两个房间。左边由模型逐帧梦出，只依据它自己的上一帧；右边是真实的模拟器。",
    dream: "梦境", real: "真实", dreamAlt: "梦中的房间", realAlt: "真实的房间",
    step: "步数", timeline: "每一步：点选即可回到那一步", moves: "动作",
    same: "与真实房间一致", off: (n, at) => `${n} 个格子不同，始于第 ${at} 步`,
    healed: (at) => `又一致了，第 ${at} 步曾不同`, free: "从图片开始的梦",
    task: (t) => `任务：${t}`, won: (t) => `完成：${t}`,
    left: "左转", forward: "前进", right: "右转", pickup: "拾取", drop: "放下", toggle: "开关",
    policy: "让模型来走", halt: "停下", rewind: "退一步", reset: "回到起点",
    fork: "在此分叉", forks: "各个世界：点选其一，从那里继续", nth: (n) => `世界 ${n}`,
    goTo: (n) => `回到第 ${n} 步`, lost: "连接已断开。换一个房间即可重新开始。",
    footer: "本页的一切来自同一个检查点，接口与 OpenAI 兼容。",
  },
};

// Our model speaks English only, so the examples are in English whatever the page speaks.
export const EXAMPLES = {
  plain: ["What is the capital of China?", "Why is the sky blue?", "Write three lines about a litchi."],
  talk: ["What do you see?", "What is in front of the agent?", "How many balls are there?", "Is there a red key?", "Where is the agent?"],
  draw: [
    "Draw a room with a red ball and a blue box.",
    "Draw a room with three green keys.",
    "Draw a room with a yellow key to the left of a purple ball.",
    "Draw a room with a grey box at row 2, column 5 and the agent at row 6, column 3, facing up.",
  ],
};

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const listeners = [];

export const say = (name, ...values) => {
  const word = WORDS[language][name];
  return typeof word === "function" ? word(...values) : word;
};

/** For a model without pictures: every element that has words for it, in data-plain, takes them from now on. */
export function speakPlainly() {
  document.querySelectorAll("[data-plain]").forEach((element) => {
    for (const name of ["say", "sayHint", "sayLabel"]) if (name in element.dataset) element.dataset[name] = element.dataset.plain;
  });
}

export const onLanguage = (listener) => { listeners.push(listener); };

export function toggleLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("language", language);
  writeWords();
}

export function writeWords() {
  document.documentElement.lang = language;
  const each = (name, write) => document.querySelectorAll(`[data-${name}]`).forEach((e) => write(e, say(e.getAttribute(`data-${name}`))));
  each("say", (e, word) => { e.textContent = word; });
  each("say-alt", (e, word) => { e.alt = word; });
  each("say-label", (e, word) => { e.setAttribute("aria-label", word); });
  each("say-hint", (e, word) => { e.placeholder = word; });
  const button = document.getElementById("language");
  button.textContent = language === "en" ? "中文" : "English";
  button.lang = language === "en" ? "zh" : "en";
  listeners.forEach((listener) => listener());
}
