// A streamed tool loop of the Vercel AI SDK, through the chat API and through Anthropic's.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createAnthropic } from "@ai-sdk/anthropic";
import { streamText, tool, stepCountIs } from "ai";
import { z } from "zod";

const [url] = process.argv.slice(2);
const chat = createOpenAICompatible({ name: "farthing", baseURL: url + "/v1", apiKey: "none", includeUsage: true });
const messages = createAnthropic({ baseURL: url + "/v1", apiKey: "none" });
for (const model of [chat("tiny"), messages("tiny")]) {
  const steps = [];
  const add = tool({
    description: "Adds.",
    inputSchema: z.object({ step: z.number(), note: z.string(), tags: z.array(z.any()) }),
    execute: async ({ step }) => {
      steps.push(step);
      return `RESULT-${step}`;
    },
  });
  const stream = streamText({ model, prompt: "Add", tools: { add }, stopWhen: stepCountIs(10), maxOutputTokens: 2000 });
  let text = "";
  for await (const part of stream.textStream) text += part;
  console.log(steps.join(","), text);
}
