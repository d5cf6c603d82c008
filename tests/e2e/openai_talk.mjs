// npm's `openai`, unchanged: node openai_talk.mjs chat|ws|websocket, with OPENAI_BASE_URL and OPENAI_API_KEY.
// Prints what it gets as one JSON object. The relay is test_openai_npm.py's.
import { createHash } from "node:crypto";
import OpenAI from "openai";
import { OpenAIRealtimeWebSocket } from "openai/realtime/websocket";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

const client = new OpenAI({ maxRetries: 0 });
const SOCKETS = { ws: OpenAIRealtimeWS, websocket: OpenAIRealtimeWebSocket };
const LONG = "a long text ".repeat(40);

/** Streams a whole reply, and the beginning of another one. */
async function chat() {
  const create = (content, options) => {
    const messages = [{ role: "user", content }];
    return client.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true, ...options });
  };
  let text = "", usage, reason;
  for await (const chunk of await create("数到3", { stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    reason = chunk.choices[0]?.finish_reason ?? reason;
    usage = chunk.usage ?? usage;
  }
  const begun = await create("Tell me a story.");
  for await (const chunk of begun) if (chunk.choices[0]?.delta.content) break; // leaving the loop hangs up
  return { text, reason, usage };
}

/** A session: a spoken reply, half of it heard, a reply in text, and one that is cancelled. */
async function talk(kind) {
  const connection = new SOCKETS[kind]({ model: "gpt-realtime" }, client);
  const events = [], waiting = [];
  const put = (event) => (waiting.length ? waiting.shift()(event) : events.push(event));
  connection.on("event", put);
  connection.on("error", (error) => error.error || put({ type: "lost", message: error.message }));
  const next = async (type) => {
    for (;;) {
      const event = events.shift() ?? (await new Promise((resolve) => waiting.push(resolve)));
      if (event.type === "lost") throw new Error(event.message);
      if (event.type === type) return event;
      if (event.type === "response.output_audio.delta") pcm.push(Buffer.from(event.delta, "base64"));
      if (event.type === "response.output_audio_transcript.delta") transcript += event.delta;
    }
  };
  const say = (text) => {
    const content = [{ type: "input_text", text }];
    connection.send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
  };
  let pcm = [], transcript = "";

  const { session } = await next("session.created");
  connection.send({ type: "session.update", session: { type: "realtime", instructions: "Be brief." } });
  const { instructions } = (await next("session.updated")).session;

  say("hello there");
  connection.send({ type: "response.create" });
  const spoken = (await next("response.done")).response;
  const heard = Buffer.concat(pcm);
  const said = transcript;
  const asked = { model: "tts", voice: "default", input: said.trim(), response_format: "pcm" };
  const same = Buffer.from(await (await client.audio.speech.create(asked)).arrayBuffer());
  const item_id = spoken.output[0].id;
  const audio_end_ms = Math.floor(heard.length / 48 / 2);
  connection.send({ type: "conversation.item.truncate", item_id, content_index: 0, audio_end_ms });
  await next("conversation.item.truncated");
  connection.send({ type: "conversation.item.retrieve", item_id });
  const kept = (await next("conversation.item.retrieved")).item.content[0].transcript;

  say("and now");
  connection.send({ type: "response.create", response: { output_modalities: ["text"] } });
  const written = (await next("response.done")).response;

  say(LONG);
  connection.send({ type: "response.create" });
  await next("response.output_audio.delta");
  connection.send({ type: "response.cancel" });
  const cancelled = (await next("response.done")).response;
  connection.send({ type: "response.cancel" });
  const late = (await next("error")).error.code;
  connection.close();
  const digest = (data) => createHash("sha256").update(data).digest("hex");
  return {
    session: session.type, instructions, said, status: spoken.status, samples: heard.length / 2, kept, late,
    same: digest(heard) === digest(same), text: written.output[0].content[0].text, cancelled: cancelled.status,
  };
}

const [kind] = process.argv.slice(2);
console.log(JSON.stringify(await (kind === "chat" ? chat() : talk(kind))));
