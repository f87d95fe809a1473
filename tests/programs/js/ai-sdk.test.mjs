// The Vercel AI SDK. Run by test_ai_sdk.py with node --test; MODEL is the README's expression, with the server's URL.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const model = new Function("createOpenAICompatible", `return ${process.env.MODEL}`)(createOpenAICompatible);
const prompt = "What is the weather in Paris?";
const options = { model, prompt, temperature: 0, maxRetries: 0, maxOutputTokens: 40 };
const schema = z.object({ city: z.enum(["Paris", "Oslo", "Lima"]), unit: z.enum(["celsius", "fahrenheit"]) });

test("a text and its stream", async () => {
  const whole = await generateText(options);
  assert.ok(whole.text.length > 0);
  assert.ok(whole.usage.inputTokens > 0);
  const pieces = [];
  const streamed = streamText(options);
  for await (const piece of streamed.textStream) pieces.push(piece);
  assert.ok(pieces.length > 1);
  assert.equal(pieces.join(""), whole.text);
  assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
});

test("an object", async () => {
  const { object } = await generateObject({ ...options, schema, maxOutputTokens: 100 });
  assert.deepEqual(schema.parse(object), object);
});

test("an object in parts", async () => {
  const { partialObjectStream, object } = streamObject({ ...options, schema, maxOutputTokens: 100 });
  for await (const part of partialObjectStream) assert.equal(typeof part, "object");
  assert.deepEqual(schema.parse(await object), await object);
});

for (const streams of [false, true]) {
  test(`a tool is called, and its result goes back${streams ? ", streamed" : ""}`, async () => {
    const asked = [];
    const weather = tool({
      description: "The weather of a city.",
      inputSchema: schema,
      execute: (input) => (asked.push(input), "18 degrees"),
    });
    const steps = [];
    const calling = {
      ...options,
      providerOptions: { llmserve: { parallel_tool_calls: false } }, // so small a model may go on calling until it is cut
      tools: { weather },
      maxOutputTokens: 100,
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      stopWhen: stepCountIs(2),
      onStepFinish: (step) => void steps.push(step.finishReason),
    };
    if (streams) await streamText(calling).consumeStream();
    else await generateText(calling);
    assert.ok(asked.length > 0);
    for (const input of asked) assert.deepEqual(schema.parse(input), input);
    assert.equal(steps.length, 2);
    assert.equal(steps[0], "tool-calls");
  });
}
