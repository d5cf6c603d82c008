// Conversations over HTTP (docs/talk.md): questions, and replies as server-sent events.

import { kept } from "./storage.js";

/** What the relay refused, or why it could not be asked: {code, message}; `status` is 0 if it did not answer. */
export class Refusal extends Error {
  constructor(status, { code, message }) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function request(path, { method = "GET", type = "application/json", body, accept = "*/*", signal } = {}) {
  const headers = { accept };
  const token = kept("sessionStorage", "token"); // else the cookie of a user goes along
  if (token) headers.authorization = `Bearer ${token}`;
  if (body) headers["content-type"] = type;
  if (body && typeof body !== "string") body = JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, cache: "no-store", body });
  } catch (error) {
    throw new Refusal(0, { code: "connection", message: error.message });
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, error ?? { code: "internal", message: answer.statusText });
}

export async function ask(path, options) {
  const answer = await request(path, options);
  return answer.headers.get("content-type")?.startsWith("application/json") ? answer.json() : null;
}

/** Send what is not JSON; returns the `Response`. */
export function post(path, type, body) {
  return request(path, { method: "POST", type, body });
}

/** Yields [event, data] until the stream ends; throws if it cannot begin or is cut. */
export async function* events(path, body) {
  const { body: stream } = await request(path, { method: "POST", body, accept: "text/event-stream" });
  let unread = "";
  for await (const piece of pieces(stream.pipeThrough(new TextDecoderStream()))) {
    const blocks = (unread + piece).split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

/** Read the kept speech of a reply into a track, from the byte on that the track lacks. */
export async function readSpeech(requestId, track) {
  const answer = await request(`v1/requests/${requestId}/audio?format=pcm`);
  const [, rate, channels] = answer.headers.get("content-type").match(/rate=(\d+); channels=(\d+)/) ?? [];
  track.begin({ sample_rate: Number(rate), channels: Number(channels) });
  let skip = 2 * track.samples;
  let odd = new Uint8Array(0); // pieces of the network may end within a sample
  for await (const piece of pieces(answer.body)) {
    const whole = new Uint8Array(odd.length + piece.length);
    whole.set(odd);
    whole.set(piece, odd.length);
    const even = whole.length - (whole.length % (2 * track.channels));
    odd = whole.slice(even);
    const from = Math.min(skip, even);
    skip -= from;
    track.add(whole.subarray(from, even));
  }
}

/** `for await` over a stream, which not all browsers of the last two years have. */
async function* pieces(stream) {
  const reader = stream.getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) yield piece.value;
}

export const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
