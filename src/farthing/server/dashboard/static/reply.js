// One answer: a request to /v1/chat/completions, whose stream extends a turn.
import { stream } from "./api.js";
import { dollars, known, seconds, short } from "./dom.js";

/** The fields of a request that are numbers: [name, label, what its input takes]. */
export const SAMPLING = [
  ["max_tokens", "Max tokens", { min: 1, placeholder: "the context's" }], ["min_tokens", "Min tokens", { min: 0, placeholder: "0" }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }], ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: -1 }], ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.02, max: 100, step: 0.01 }], ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }], ["seed", "Seed", { placeholder: "random" }],
  ["max_thinking_tokens", "Max thinking tokens", { min: 0, placeholder: "no limit" }],
];
const NUMBERS = SAMPLING.map(([name]) => name);

const number = (value) => (value === "" || value === null ? undefined : Number(value));

function body(messages, chosen) {
  const { thinking } = chosen;
  const tools = [...(chosen.tools.trim() ? JSON.parse(chosen.tools) : []), ...chosen.offered];
  const stop = chosen.stop.split("\n").filter(Boolean);
  return {
    ...(chosen.other.trim() ? JSON.parse(chosen.other) : {}),
    model: chosen.model, messages, stream: true, x_farthing: true,
    stream_options: { include_usage: true, continuous_usage_stats: true }, // so that a stopped answer is counted
    ...Object.fromEntries(NUMBERS.map((name) => [name, number(chosen[name])])),
    stop: stop.length ? stop : undefined,
    tools: tools.length ? tools : undefined,
    thinking: thinking === "on" ? { type: "enabled" } : undefined,
    reasoning_effort: thinking && thinking !== "on" ? thinking : undefined,
  };
}

/** Extend a turn by the answer, whose request has an id, until it ends; `changed` is called after every piece. Throws what ends it early. */
export async function reply(turn, id, messages, chosen, signal, changed) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1e3;
  for await (const event of stream("/v1/chat/completions", { ...body(messages, chosen), request_id: id }, signal)) {
    turn.usage = event.usage ?? turn.usage;
    const choice = event.choices?.[0];
    const delta = choice?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought || delta.content || delta.tool_calls) {
      turn.first ??= since();
      turn.last = since();
    }
    if (thought) turn.thoughts = (turn.thoughts ?? "") + thought;
    if (delta.content || delta.tool_calls) turn.thought ??= turn.thoughts && turn.last - turn.first;
    turn.text += delta.content ?? "";
    for (const piece of delta.tool_calls ?? []) addCall((turn.calls ??= []), piece);
    turn.end = choice?.finish_reason ?? turn.end;
    changed();
  }
}

function addCall(calls, { index = calls.length, id, function: called = {} }) {
  const call = (calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
  call.id ??= id;
  call.function.name += called.name ?? "";
  call.function.arguments += called.arguments ?? "";
}

const ENDS = { length: "cut off at the limit of tokens", stopped: "stopped" };

/** What an answer took and cost, in words. */
export function used({ usage, first, last, end }) {
  const tokens = usage?.completion_tokens;
  const prompt = usage?.prompt_tokens;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const cost = usage?.x_farthing?.usd;
  return [
    known(tokens) ? `${short(tokens)} tokens` : null,
    tokens > 1 && last > first ? `${short((tokens - 1) / (last - first))} tokens/s` : null,
    known(first) ? `first after ${seconds(first)}` : null,
    known(prompt) ? `${short(cached ?? 0)} of ${short(prompt)} prompt tokens cached` : null,
    known(cost) ? dollars(cost) : null,
    ENDS[end] ?? null,
  ].filter(Boolean).join(" · ");
}
