// The official JavaScript client against the server at LLMSERVE_URL. Run by test_openai_javascript.py with node --test.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.LLMSERVE_URL, apiKey: "none", maxRetries: 0 });
const model = "gpt-4";
const messages = [{ role: "user", content: "Say hello." }];
const options = { model, messages, temperature: 0, max_tokens: 16 };

test("an answer", async () => {
  const answer = await client.chat.completions.create(options);
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.model, "smollm2-135m-instruct");
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("a stream equals the whole answer, with usage last", async () => {
  const whole = await client.chat.completions.create(options);
  const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const last = chunks.pop();
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper assembles several choices", async () => {
  const stream = client.chat.completions.stream({ model, messages, n: 2, seed: 3, max_tokens: 12 });
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(final.choices[0].message.role, "assistant");
});

test("models are listed and retrieved", async () => {
  const ids = [];
  for await (const entry of client.models.list()) ids.push(entry.id);
  assert.ok(ids.includes("gpt-3.5-turbo"));
  assert.equal((await client.models.retrieve("org/tiny")).id, "org/tiny");
});

test("a mistake raises the client's own error", async () => {
  await assert.rejects(client.chat.completions.create({ ...options, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, "decimal_above_max_value");
    assert.equal(error.param, "temperature");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...options, model: "none" }), OpenAI.NotFoundError);
});

test("an aborted stream ends", async () => {
  const stream = await client.chat.completions.create({ ...options, max_tokens: 1500, temperature: 1, stream: true });
  let count = 0;
  for await (const _ of stream) if (++count === 3) stream.controller.abort();
  assert.ok(count >= 3);
});
