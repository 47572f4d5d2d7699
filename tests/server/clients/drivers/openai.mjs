// The openai package for Node: chat completions, then responses.
import OpenAI from "openai";
import { ASKED, LOOP, PLAIN, SCHEMA, look, refused, run } from "./common.mjs";

const open = (url) => new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const tool = { name: "look", description: "Looks up.", parameters: SCHEMA };
const user = (content) => [{ role: "user", content }];

async function chat(url, messages, { stream, ...fields } = {}) {
  const body = { model: "tiny", max_tokens: 900, messages, ...fields }, api = open(url).chat.completions;
  const done = stream ? await api.stream(body).finalChatCompletion() : await api.create(body);
  return done.choices[0].message;
}

async function tools(url, more) {
  const fields = { tools: [{ type: "function", function: tool }], ...more };
  const message = await chat(url, user(LOOP), fields);
  const [call] = message.tool_calls;
  const content = look(JSON.parse(call.function.arguments));
  return (await chat(url, [...user(LOOP), message, { role: "tool", tool_call_id: call.id, content }], fields)).content;
}

async function respond(url, input, { stream, ...fields } = {}) {
  const body = { model: "tiny", max_output_tokens: 900, input, ...fields }, api = open(url).responses;
  return stream ? await api.stream(body).finalResponse() : await api.create(body);
}

async function responseTools(url, more) {
  const fields = { tools: [{ type: "function", strict: false, ...tool }], ...more };
  const { output } = await respond(url, user(LOOP), fields);
  const call = output.at(-1);
  const result = { type: "function_call_output", call_id: call.call_id, output: look(JSON.parse(call.arguments)) };
  return (await respond(url, [...user(LOOP), ...output, result], fields)).output_text;
}

async function responseReasoning(url) {
  const { output } = await respond(url, PLAIN, { reasoning: { effort: "high" }, stream: true });
  const items = output.filter((item) => item.type === "reasoning");
  return items.flatMap((item) => item.content ?? item.summary).map((part) => part.text).join("");
}

const form = { name: "place", schema: SCHEMA, strict: true };
const response_format = { type: "json_schema", json_schema: form }, text = { format: { type: "json_schema", ...form } };
await run({
  answer: async (url) => (await chat(url, user(PLAIN))).content,
  stream: async (url) => (await chat(url, user(PLAIN), { stream: true })).content,
  tools: (url) => tools(url, {}),
  "tools (stream)": (url) => tools(url, { stream: true }),
  structured: async (url) => JSON.parse((await chat(url, user(ASKED), { response_format })).content),
  reasoning: async (url) => (await chat(url, user(PLAIN), { reasoning_effort: "high" })).reasoning_content ?? "",
  errors: (url) => refused(() => chat(url, user(PLAIN), { model: "absent" }), OpenAI.NotFoundError),
  "answer (responses)": async (url) => (await respond(url, PLAIN)).output_text,
  "stream (responses)": async (url) => (await respond(url, PLAIN, { stream: true })).output_text,
  "tools (responses)": (url) => responseTools(url, {}),
  "tools (responses, stream)": (url) => responseTools(url, { stream: true }),
  "structured (responses)": async (url) => JSON.parse((await respond(url, ASKED, { text })).output_text),
  "reasoning (responses)": responseReasoning,
  "errors (responses)": (url) => refused(() => respond(url, PLAIN, { model: "absent" }), OpenAI.NotFoundError),
});
