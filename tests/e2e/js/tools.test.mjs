// Tools and embeddings with the official JavaScript client and its helpers. Run by test_openai_javascript.py with node --test.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.LLMSERVE_URL, apiKey: "none", maxRetries: 0 });
const model = "gpt-4";
const cities = ["Paris", "Oslo", "Lima"];
const parameters = { type: "object", properties: { city: { enum: cities } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", function: { name: "get_weather", description: "The weather of a city.", parameters } };
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const options = { model, messages, temperature: 0, max_tokens: 100, tools: [weather], parallel_tool_calls: false };

function check(message) {
  assert.equal(message.content, null);
  assert.equal(message.tool_calls.length, 1);
  const [call] = message.tool_calls;
  assert.equal(call.type, "function");
  assert.match(call.id, /^call_/);
  assert.equal(call.function.name, "get_weather");
  assert.ok(cities.includes(JSON.parse(call.function.arguments).city));
}

for (const tool_choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
  test(`a forced call, ${typeof tool_choice}`, async () => {
    const answer = await client.chat.completions.create({ ...options, tool_choice });
    check(answer.choices[0].message);
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
  });

  test(`a forced call in a stream, ${typeof tool_choice}`, async () => {
    const whole = await client.chat.completions.create({ ...options, tool_choice });
    const final = await client.chat.completions.stream({ ...options, tool_choice }).finalChatCompletion();
    check(final.choices[0].message);
    const [expected, streamed] = [whole, final].map((answer) => answer.choices[0].message.tool_calls[0].function);
    assert.equal(streamed.arguments, expected.arguments);
  });
}

const call = String.raw`<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "(Oslo|Lima)"\}\}\n</tool_call>`;
const texts = { "": call, "Let me see.": String.raw`Let me see\.\n${call}` };
for (const [content, regex] of Object.entries(texts)) {
  test(`a call of the model's own accord, ${content || "alone"}`, async () => {
    const asked = { ...options, tool_choice: "auto", regex };
    const whole = (await client.chat.completions.create(asked)).choices[0];
    assert.equal(whole.message.content ?? "", content);
    assert.equal(whole.message.tool_calls.length, 1);
    const streamed = (await client.chat.completions.stream(asked).finalChatCompletion()).choices[0];
    assert.equal(streamed.message.tool_calls[0].type, "function");
    const said = ({ message, finish_reason }) =>
      [message.content || null, message.tool_calls.map((each) => [each.function.name, each.function.arguments]), finish_reason];
    assert.deepEqual(said(streamed), said(whole));
  });
}

test("arguments come in pieces", async () => {
  const pieces = [];
  const stream = client.chat.completions.stream({ ...options, tool_choice: "required" });
  stream.on("tool_calls.function.arguments.delta", (event) => pieces.push(event.arguments_delta));
  await stream.done();
  assert.ok(pieces.length > 1);
  assert.ok(cities.includes(JSON.parse(pieces.join("")).city));
});

test("the tool runner ends", async () => {
  let calls = 0;
  const tool = {
    type: "function",
    function: { ...weather.function, parse: JSON.parse, function: ({ city }) => (calls++, `18 degrees in ${city}`) },
  };
  const runner = client.chat.completions.runTools(
    { model, messages, temperature: 0, max_tokens: 60, tools: [tool], tool_choice: "auto" },
    { maxChatCompletions: 3 },
  );
  await runner.done();
  assert.ok(runner.allChatCompletions().length <= 3);
  assert.ok(calls <= 3);
});

test("a tool loop with results in the history", async () => {
  const history = [...messages];
  const first = await client.chat.completions.create({ ...options, tool_choice: "required" });
  history.push(first.choices[0].message);
  history.push({ role: "tool", tool_call_id: first.choices[0].message.tool_calls[0].id, content: "18 degrees" });
  const second = await client.chat.completions.create({ ...options, messages: history, tool_choice: "none" });
  assert.ok(second.choices[0].message.content.length > 0);
  assert.equal(second.choices[0].message.tool_calls, undefined);
});

test("the older functions", async () => {
  const { tools, parallel_tool_calls, ...rest } = options;
  const answer = await client.chat.completions.create({ ...rest, functions: [weather.function], function_call: { name: "get_weather" } });
  assert.equal(answer.choices[0].message.function_call.name, "get_weather");
  assert.equal(answer.choices[0].finish_reason, "function_call");
});

test("embeddings are numbers, which the client asks for as base64", async () => {
  const answer = await client.embeddings.create({ model: "tiny-vectors", input: ["hello world", "a river"] });
  assert.deepEqual(answer.data.map((each) => each.index), [0, 1]);
  for (const { embedding } of answer.data) {
    const length = Math.hypot(...embedding);
    assert.ok(Math.abs(length - 1) < 1e-4, `${length}`);
  }
  const floats = await client.embeddings.create({ model: "tiny-vectors", input: "hello world", encoding_format: "float" });
  floats.data[0].embedding.forEach((value, index) => assert.ok(Math.abs(value - answer.data[0].embedding[index]) < 1e-6));
});

test("fewer dimensions", async () => {
  const answer = await client.embeddings.create({ model: "tiny-vectors", input: "hello", dimensions: 16 });
  assert.equal(answer.data[0].embedding.length, 16);
});

test("a mistake with tools is named", async () => {
  await assert.rejects(client.chat.completions.create({ ...options, tool_choice: { type: "function", function: { name: "sub" } } }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "tool_choice");
    return true;
  });
});
