// Anthropic's package for Node.
import Anthropic from "@anthropic-ai/sdk";
import { ASKED, LOOP, PLAIN, SCHEMA, look, refused, run } from "./common.mjs";

const user = (content) => ({ role: "user", content });
const text = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");

async function ask(url, messages, { stream, ...fields } = {}) {
  const api = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 }).messages;
  const body = { model: "tiny", max_tokens: 2000, messages, ...fields };
  return stream ? await api.stream(body).finalMessage() : await api.create(body);
}

async function tools(url, more) {
  const fields = { tools: [{ name: "look", description: "Looks up.", input_schema: SCHEMA }], ...more };
  const { content } = await ask(url, [user(LOOP)], fields);
  const call = content.find((block) => block.type === "tool_use");
  const result = { type: "tool_result", tool_use_id: call.id, content: look(call.input) };
  return text(await ask(url, [user(LOOP), { role: "assistant", content }, user([result])], fields));
}

async function reasoning(url) {
  const thinking = { type: "enabled", budget_tokens: 1024 };
  const { content } = await ask(url, [user(PLAIN)], { thinking, stream: true });
  return content.filter((block) => block.type === "thinking").map((block) => block.thinking).join("");
}

const output_config = { format: { type: "json_schema", schema: SCHEMA } };
await run({
  answer: async (url) => text(await ask(url, [user(PLAIN)])),
  stream: async (url) => text(await ask(url, [user(PLAIN)], { stream: true })),
  tools: (url) => tools(url, {}),
  "tools (stream)": (url) => tools(url, { stream: true }),
  structured: async (url) => JSON.parse(text(await ask(url, [user(ASKED)], { output_config }))),
  reasoning,
  errors: (url) => refused(() => ask(url, [user(PLAIN)], { model: "absent" }), Anthropic.NotFoundError),
});
