// The Vercel AI SDK: its chat provider, then Anthropic's.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { ASKED, LOOP, PLAIN, SCHEMA, look, refused, run } from "./common.mjs";

const settings = (url) => ({ name: "farthing", baseURL: url + "/v1", apiKey: "none" });
const chat = (url, model = "tiny") =>
  createOpenAICompatible({ ...settings(url), includeUsage: true, supportsStructuredOutputs: true })(model);
const messages = (url, model = "tiny") => createAnthropic(settings(url))(model);
const fields = (model, prompt) => ({ model, prompt, maxOutputTokens: 2000, maxRetries: 0 });

async function stream(more) {
  let said = "";
  for await (const part of streamText(more).textStream) said += part;
  return said;
}

function tools(model) {
  const parameters = z.object({ city: z.string(), days: z.number() });
  const offered = { look: tool({ description: "Looks up.", inputSchema: parameters, execute: async (given) => look(given) }) };
  return stream({ ...fields(model, LOOP), tools: offered, stopWhen: stepCountIs(5) });
}

const structured = async (model) => (await generateObject({ ...fields(model, ASKED), schema: jsonSchema(SCHEMA) })).object;
const reasoning = async (model, name, options) =>
  (await generateText({ ...fields(model, PLAIN), providerOptions: { [name]: options } })).reasoningText ?? "";
const thinking = { type: "enabled", budgetTokens: 1024 };
await run({
  answer: async (url) => (await generateText(fields(chat(url), PLAIN))).text,
  stream: (url) => stream(fields(chat(url), PLAIN)),
  tools: (url) => tools(chat(url)),
  structured: (url) => structured(chat(url)),
  reasoning: (url) => reasoning(chat(url), "farthing", { reasoningEffort: "high" }),
  errors: (url) => refused(() => generateText(fields(chat(url, "absent"), PLAIN)), APICallError),
  "answer (messages)": async (url) => (await generateText(fields(messages(url), PLAIN))).text,
  "stream (messages)": (url) => stream(fields(messages(url), PLAIN)),
  "tools (messages)": (url) => tools(messages(url)),
  "reasoning (messages)": (url) => reasoning(messages(url), "anthropic", { thinking }),
  "errors (messages)": (url) => refused(() => generateText(fields(messages(url, "absent"), PLAIN)), APICallError),
});
