// OpenAI's own package, unchanged: node openai.mjs "Good morning." out.mp3
// OPENAI_BASE_URL=http://127.0.0.1:8765/v1 and OPENAI_API_KEY=rly_c_… say where.
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const [text = "Good morning.", file = "out.mp3"] = process.argv.slice(2);
const client = new OpenAI();
const speech = await client.audio.speech.create({ model: "gpt-4o-mini-tts", voice: "alloy", input: text });
await writeFile(file, Buffer.from(await speech.arrayBuffer()));
console.log(`spoken by ${speech.headers.get("x-relay-space")} with voice ${speech.headers.get("x-relay-voice")}`);
