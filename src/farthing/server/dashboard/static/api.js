// Requests with the API's key, which stays in this tab (sessionStorage).

const STORE = "farthing.key";

export const key = {
  get: () => sessionStorage.getItem(STORE) || "",
  set: (value) => (value ? sessionStorage.setItem(STORE, value) : sessionStorage.removeItem(STORE)),
};

/** An answer that is an error, with its status (0: none came), the API's code and the seconds to wait. */
export class Problem extends Error {
  constructor(message, { status = 0, code = "", wait = null } = {}) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

export class Refused extends Problem {}

const GONE = "The server does not answer. It may have been stopped, or the network is down.";

async function request(path, options) {
  const headers = { ...options.headers, ...(key.get() ? { Authorization: `Bearer ${key.get()}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(GONE);
  }
  if (response.ok) return response;
  const { status } = response;
  if (status === 401 || status === 403) throw new Refused("An API key is needed.", { status });
  const body = await response.json().catch(() => ({}));
  const reason = body.error?.message ?? body.detail ?? `${status} ${response.statusText}`;
  throw new Problem(typeof reason === "string" ? reason : JSON.stringify(reason), {
    status, code: body.error?.code ?? "", wait: Number(response.headers.get("Retry-After")) || null,
  });
}

export async function get(path, timeout = 10000) {
  return (await request(path, { signal: AbortSignal.timeout(timeout) })).json();
}

export async function post(path, body, timeout = 10000) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(timeout) })).json();
}

/** The server-sent events of a streamed completion, as parsed JSON, one after the other. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Problem(GONE);
    });
    if (done) throw new Problem("The connection broke off before the answer was complete.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(event.error.message ?? "The server broke off.", { status: 500, code: event.error.code ?? "" });
      yield event;
    }
  }
}
