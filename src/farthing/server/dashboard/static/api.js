// Requests with the API's key, which stays in this tab (sessionStorage).

const STORE = "farthing.key";

export const key = {
  get: () => sessionStorage.getItem(STORE) || "",
  set: (value) => (value ? sessionStorage.setItem(STORE, value) : sessionStorage.removeItem(STORE)),
};

export class Refused extends Error {}

function headers(extra = {}) {
  return key.get() ? { ...extra, Authorization: `Bearer ${key.get()}` } : extra;
}

async function check(response) {
  if (response.status === 401 || response.status === 403) throw new Refused("an API key is needed");
  if (response.ok) return response;
  let reason = `${response.status} ${response.statusText}`;
  try {
    const body = await response.json();
    reason = body.error?.message ?? body.detail ?? reason;
  } catch { /* the status says enough */ }
  throw new Error(typeof reason === "string" ? reason : JSON.stringify(reason));
}

export async function get(path, timeout = 10000) {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(timeout) });
  return (await check(response)).json();
}

/** The server-sent events of a streamed completion, as parsed JSON, one after the other. */
export async function* stream(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  await check(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? "the server broke off");
      yield event;
    }
  }
}
