// What decides on an answer's tokens and tells of them, with the official JavaScript client. Run by test_openai_javascript.py.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.LLMSERVE_URL, apiKey: "none", maxRetries: 0 });
const model = "gpt-4";
const messages = [{ role: "user", content: "Tell me about a small town by the sea." }];
const base = { model, messages, max_tokens: 20, temperature: 0.8, seed: 11 };

const Town = z.object({
  kind: z.enum(["village", "town"]),
  people: z.number().int().min(0).max(5000),
  mayor: z.union([z.object({ name: z.string().max(8) }), z.null()]),
  tags: z.array(z.string().max(5)).max(2),
});

const checks = {
  "logprobs": [{ logprobs: true, top_logprobs: 2 }, ({ message, logprobs }) =>
    Buffer.from(logprobs.content.flatMap((entry) => entry.bytes)).toString() === message.content],
  "logit_bias": [{ logit_bias: { 253: -100 } }, ({ message }) => message.content.length > 0],
  "stop strings": [{ stop: ["e", "o"] }, ({ message }) => !/[eo]/.test(message.content)],
  "json_object": [{ response_format: { type: "json_object" }, max_tokens: 300 }, ({ message, finish_reason }) =>
    finish_reason === "length" || typeof JSON.parse(message.content) === "object"],
  "regex": [{ regex: "[0-9]{4}" }, ({ message, finish_reason }) => /^[0-9]{4}$/.test(message.content) && finish_reason === "stop"],
  "choice": [{ choice: ["red", "green"] }, ({ message }) => ["red", "green"].includes(message.content)],
  "nulls": [{ stop: null, n: null, logprobs: null, response_format: null }, ({ message }) => message.content.length > 0],
};
for (const [name, [options, holds]] of Object.entries(checks)) {
  test(name, async () => {
    const whole = await client.chat.completions.create({ ...base, ...options });
    assert.ok(holds(whole.choices[0]), JSON.stringify(whole.choices[0]));
    const stream = client.chat.completions.stream({ ...base, ...options });
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
    assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
    assert.deepEqual(final.choices[0].logprobs?.content, whole.choices[0].logprobs?.content);
  });
}

test("a Zod schema is parsed", async () => {
  const response_format = zodResponseFormat(Town, "town");
  const answer = await client.chat.completions.parse({ ...base, response_format, max_tokens: 300 });
  assert.ok(Town.safeParse(answer.choices[0].message.parsed).success);
  const stream = client.chat.completions.stream({ ...base, response_format, max_tokens: 300 });
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, answer.choices[0].message.parsed);
});

test("completions, streamed and scored", async () => {
  const options = { model, prompt: "The quick brown fox", max_tokens: 6, temperature: 0 };
  const whole = await client.completions.create(options);
  let text = "";
  for await (const chunk of await client.completions.create({ ...options, stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
  const scored = await client.completions.create({ ...options, max_tokens: 0, echo: true, logprobs: 1 });
  assert.equal(scored.choices[0].text, options.prompt);
  assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);
});

test("a schema that cannot be kept to is refused with its part", async () => {
  const schema = { type: "object", properties: { a: { not: {} } } };
  const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
  await assert.rejects(client.chat.completions.create({ ...base, response_format }), (error) => {
    assert.equal(error.status, 400);
    assert.equal(error.param, "response_format.json_schema.schema.properties.a");
    return true;
  });
});
