// The page: asks for news, keeps the points, and shows them with the view that fits the server's kind.
import { get, key, Refused } from "./api.js";
import { h, seconds } from "./dom.js";
import { GatewayView } from "./gateway.js";
import { ServerView } from "./server.js";
import { setup } from "./theme.js";

const KEEP = 900;
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

function state(kind, text) {
  $("state").className = `state ${kind}`;
  $("state").lastElementChild.textContent = text;
}

function show(data) {
  points.add(data.points);
  if (view?.kind !== data.kind) {
    view = data.kind === "gateway" ? new GatewayView() : new ServerView();
    $("main").replaceChildren(view.element);
  }
  $("title").replaceChildren(h("b", {}, data.title));
  document.title = `${data.title} · Farthing`;
  view.show(data, points);
}

async function login(refused) {
  const dialog = $("login");
  if (dialog.open) return;
  $("login-problem").hidden = !refused;
  $("login-key").value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue === "use") key.set($("login-key").value.trim());
}

async function poll() {
  let pause = 1000;
  try {
    const data = await get(`/dashboard/data?since=${points.columns.t.at(-1) ?? 0}`);
    pause = data.interval * 1000;
    show(data);
    state("live", data.uptime ? `up ${seconds(data.uptime)}` : "live");
  } catch (error) {
    if (error instanceof Refused) {
      state("lost", "API key needed");
      await login(Boolean(key.get()));
    } else {
      state("lost", "no answer");
      console.warn(error);
      pause = 2000;
    }
  }
  setTimeout(poll, pause);
}

setup($("theme"));
$("key").addEventListener("click", () => login(false));
poll();
