// Streamed tool loops of the openai package for Node: chat completions, then responses.
import OpenAI from "openai";
const [url] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const parameters = { type: "object", properties: { step: { type: "integer" } }, required: ["step"] };
let turns = [{ role: "user", content: "Add" }];
for (let step = 0; step <= 5; step++) {
  const stream = client.chat.completions.stream({ model: "tiny", messages: turns, tools: [{ type: "function", function: { name: "add", parameters } }] });
  const done = await stream.finalChatCompletion();
  const message = done.choices[0].message;
  if (step == 5) { if (message.content !== "Done.") throw new Error(JSON.stringify(message)); break; }
  const call = message.tool_calls[0];
  if (JSON.parse(call.function.arguments).step !== step) throw new Error(call.function.arguments);
  turns.push(message, { role: "tool", tool_call_id: call.id, content: `RESULT-${step}` });
}
let items = [{ role: "user", content: "Add" }];
for (let step = 0; step <= 5; step++) {
  const stream = client.responses.stream({ model: "tiny", input: items, tools: [{ type: "function", name: "add", parameters, strict: false }] });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  const done = await stream.finalResponse();
  if (step == 5) { if (done.output_text !== "Done.") throw new Error(JSON.stringify(done)); break; }
  const call = done.output.at(-1);
  if (JSON.parse(call.arguments).step !== step) throw new Error(call.arguments);
  items.push(...done.output, { type: "function_call_output", call_id: call.call_id, output: `RESULT-${step}` });
}
console.log("ok");
