// The page: a chat, and charts of the server behind a tab. Asks the server for news, and for its key.
import { get, key, Refused } from "./api.js";
import { Chat } from "./chat.js";
import { h, seconds } from "./dom.js";
import { GatewayView } from "./gateway.js";
import { ServerView } from "./server.js";
import { setup } from "./theme.js";

const KEEP = 900; // points
const [HIDDEN, LOADING] = [5000, 1000]; // milliseconds between two questions: charts hidden, a model being loaded
const $ = (id) => document.getElementById(id);

/** The points of the last minutes, column by column. */
class Points {
  constructor() {
    this.columns = { t: [] };
  }

  add(news) {
    if (!news.t?.length) return;
    if (this.columns.t.length && news.t[0] <= this.columns.t.at(-1)) this.columns = { t: [] };
    const before = this.columns.t.length;
    for (const name of new Set([...Object.keys(this.columns), ...Object.keys(news)])) {
      const old = this.columns[name] ?? Array(before).fill(null);
      this.columns[name] = [...old, ...(news[name] ?? news.t.map(() => null))].slice(-KEEP);
    }
  }

  last(name) {
    return this.columns[name]?.at(-1);
  }
}

const points = new Points();
let view = null;
let timer = null;

const charts = () => location.hash === "#charts";

function state(kind, text) {
  $("state").className = `state ${kind}`;
  $("state").lastElementChild.textContent = text;
}

function show(data) {
  if (view?.title !== data.title) points.columns = { t: [] }; // of another model
  points.add(data.points);
  if (view?.kind !== data.kind || view.title !== data.title) {
    view = data.kind === "gateway" ? new GatewayView() : new ServerView();
    view.title = data.title;
    $("charts").replaceChildren(view.element);
  }
  $("title").replaceChildren(h("b", {}, data.title));
  document.title = `${data.title} · Farthing`;
  if (charts()) view.show(data, points);
}

async function login(refused) {
  const dialog = $("login");
  if (dialog.open) return;
  $("login-problem").hidden = !(refused && key.get());
  $("login-key").value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "use") return;
  key.set($("login-key").value.trim());
  chat.ready();
  poll();
}

async function poll() {
  clearTimeout(timer);
  let pause = HIDDEN;
  try {
    const lost = $("state").classList.contains("lost");
    const model = encodeURIComponent(chat.settings.values.model); // of several, the one that is chosen
    const data = await get(`/dashboard/data?since=${points.columns.t.at(-1) ?? 0}&model=${model}`);
    if (charts()) pause = data.interval * 1000;
    show(data);
    const { what, done, total } = data.loading ?? {};
    chat.loading(data.loading ? what ? `The model is being loaded: ${what}` : "The model is being loaded" : "", total ? done / total : null, Boolean(data.loading));
    if (data.loading) pause = LOADING;
    state("live", data.uptime ? `up ${seconds(data.uptime)}` : data.facts?.state ?? "live");
    if (lost) chat.ready();
  } catch (error) {
    if (error.code === "model_not_loaded") {
      pause = await unloaded(chat.settings.values.model);
      return;
    }
    pause = 2000;
    const refused = error instanceof Refused;
    state("lost", refused ? "API key needed" : "no answer");
    if (refused) await login(true);
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, pause);
  }
}

/** The server has several models, and the chosen one is not in memory: a message loads it. Returns when to ask again. */
async function unloaded(model) {
  const { state: now, progress, error } = await get(`/v1/models/${encodeURIComponent(model)}`).catch(() => ({}));
  chat.loading(now === "loading" ? `${model} is being loaded: ${progress}` : now === "failed" ? `${model} could not be loaded: ${error}` : "");
  [view, points.columns] = [null, { t: [] }];
  $("title").replaceChildren();
  $("charts").replaceChildren(h("p.empty", {}, "The chosen model is not loaded. The next message loads it; its charts begin then."));
  state("live", now === "loading" ? "model being loaded" : "model not loaded");
  return now === "loading" ? LOADING : HIDDEN;
}

/** Show the view that the address names. */
function route() {
  $("chat").hidden = charts();
  $("charts").hidden = !charts();
  document.body.classList.toggle("chat-shown", !charts());
  for (const [name, current] of [["chat", !charts()], ["charts", charts()]]) {
    if (current) $(`tab-${name}`).setAttribute("aria-current", "page");
    else $(`tab-${name}`).removeAttribute("aria-current");
  }
  if (charts()) poll();
  else chat.shown();
}

setup($("theme"));
$("key").addEventListener("click", () => login(false));
addEventListener("hashchange", route);
const chat = new Chat($("chat"), login);
route();
chat.ready();
if (!charts()) poll();
