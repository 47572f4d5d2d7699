// What every client does: see common.py.
export const HELLO = "Hello there, 日!", DONE = "Done.", RESULT = "RESULT-42";
export const CITY = { city: 'Zürich "2>&1" \\ 日', days: 3 };
export const PLAIN = "Say hello.", LOOP = `Call the tool look with ${JSON.stringify(CITY)}.`;
export const ASKED = `Answer as JSON: ${JSON.stringify(CITY)}.`;
export const SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};

const text = (value) => JSON.stringify(value, (_, each) =>
  each && typeof each === "object" && !Array.isArray(each) ? Object.fromEntries(Object.entries(each).sort()) : each);

export function look(given) {
  if (text(given) !== text(CITY)) throw new Error(`called with ${text(given)}`);
  return RESULT;
}

export async function refused(ask, kind) {
  try {
    await ask();
  } catch (error) {
    if (error instanceof kind) return error.status ?? error.statusCode;
    throw error;
  }
}

export async function run(checks) {
  for (const [url, thought] of JSON.parse(process.argv[2])) {
    const expected = { answer: HELLO, stream: HELLO, tools: DONE, structured: CITY, errors: 404, reasoning: thought };
    const found = {};
    for (const [name, check] of Object.entries(checks)) {
      try {
        const got = await check(url);
        found[name] = text(got) === text(expected[name.split(" ")[0]]) ? "ok" : `got ${text(got)}`;
      } catch (error) {
        found[name] = error.stack;
      }
    }
    console.log(JSON.stringify(found));
  }
}
