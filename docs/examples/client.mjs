#!/usr/bin/env node
// A client of the wire protocol `relay.v1.msgpack`, written from ../protocol.md alone; a § is a section of that.
//
//   RELAY_TOKEN=rly_c_… node client.mjs ws://HOST:8765 SPACE TEXT OUT.wav [PARAM=VALUE]…
//
// With - as the text, standard input is spoken while it is written (§5.9): a live input instead of a param.
// Exit codes: 0 completed, 1 failed or rejected, 2 wrong use, 3 cannot connect, 130 interrupted.
// From other code: import { RelayClient } from "./client.mjs"; main() below shows the use. Of inputs, there are live
// ones only; whole ones (§5.3) are left out.

import { randomBytes } from "node:crypto";
import { EventEmitter } from "node:events";
import { ftruncateSync, openSync, realpathSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { decode, encode } from "@msgpack/msgpack";
import WebSocket from "ws";

// ignoreUndefined: a field without a value is left out, as §3 wants it.
const pack = (message) => encode(wellFormed(message), { ignoreUndefined: true });

/** A text that was cut inside an emoji would be no UTF-8, and be refused (§3): such a half becomes U+FFFD. */
function wellFormed(value) {
  if (typeof value === "string") return value.toWellFormed();
  if (Array.isArray(value)) return value.map(wellFormed);
  if (value == null || Object.getPrototypeOf(value) !== Object.prototype) return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [wellFormed(key), wellFormed(inner)]));
}

/** A message of the relay, or why it is none. */
function unpack(data, isBinary) {
  const message = isBinary ? decode(data) : null;
  if (typeof message?.type !== "string") throw new TypeError("a message that is no map with a type");
  if (message.type === "audio" && !(message.pcm instanceof Uint8Array)) throw new TypeError("audio without pcm");
  if (message.type === "video" && !(message.data instanceof Uint8Array)) throw new TypeError("video without data");
  return message;
}

/** `code` is one of §11, "connection", "cancelled" or "frames_missing"; `details` of "invalid_params" are by field. */
export class RelayError extends Error {
  constructor(code, message, { details = {}, retryable = false } = {}) {
    super(message || code);
    Object.assign(this, { code, details, retryable });
  }
}

/** The most bytes of a live input that may be beyond the latest `input_ack` (§5.9), and in one `input` (§4). */
const MAX_UNACKED = 262_144;

/** A live input: what the relay has not stored is kept, and sent again on the next connection. */
class LiveInput {
  #send; // sends a message if there is a connection
  #name;
  #kept = Buffer.alloc(0); // what is not acknowledged …
  #base = 0; // … and the offset of its first byte
  #sent = 0; // offset up to which this connection has it
  #maySend = false; // right after the first submit; later, once the relay has said how much it has
  #ended = false;
  #endSent = false;
  #over = null; // why no more can be fed
  #wake = () => {};

  constructor(name, send) {
    this.#name = name;
    this.#send = send;
  }

  /** Adds bytes; the promise is kept once all of them are within the window. Throws when the request has ended. */
  async feed(bytes) {
    while (bytes.length) {
      if (this.#over) throw this.#over;
      const room = MAX_UNACKED - this.#kept.length;
      if (room > 0) {
        this.#kept = Buffer.concat([this.#kept, bytes.subarray(0, room)]);
        bytes = bytes.subarray(room);
        this.#pump();
      } else await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  end() {
    this.#ended = true;
    this.#pump();
  }

  /** A new connection; only with the first submit is it known what the relay has: nothing. */
  _open(isFirst) {
    this.#maySend = isFirst;
    this.#pump();
  }

  _stop(error) {
    this.#over = error;
    this.#wake();
  }

  _acknowledged({ offset, last, again }) {
    this.#kept = this.#kept.subarray(Math.max(0, offset - this.#base));
    this.#base = Math.max(this.#base, offset);
    if (!this.#maySend || again) {
      this.#maySend = true;
      this.#sent = this.#base;
      this.#endSent = last === true;
    }
    this.#pump();
    this.#wake();
  }

  #pump() {
    const data = this.#kept.subarray(this.#sent - this.#base);
    if (!this.#maySend || (!data.length && (!this.#ended || this.#endSent))) return;
    const sent = this.#send({ name: this.#name, offset: this.#sent, data, last: this.#ended || undefined });
    if (!sent) return;
    this.#sent += data.length;
    this.#endSent = this.#ended;
  }
}

/**
 * One request. Events: `queued` and every frame, named by their type and with the message; with `audio` also the offset
 * of its bytes; and `restart` (bytes): a new attempt begins lower down, the audio from that byte on is void. A `video`
 * is one encoded picture (§6.1), for the browser's VideoDecoder or, behind the header of IVF, for a file.
 * `done` is a promise of the result.
 */
class Request extends EventEmitter {
  id = randomBytes(16).toString("hex");
  bytes = 0; // of audio, so far
  #client;
  #submit;
  #cancel = null;
  #accepted = false;
  #attempt = 0; // of the last frame taken …
  #next = 0; // … and the seq that is to come: all that §6 needs to know
  #bytesBefore = []; // seq → bytes of audio before that frame: where to cut when an attempt begins lower down
  #gaps = 0; // in its whole life
  #later;
  #tried = false;

  constructor(client, space, params, options) {
    super();
    this.#client = client;
    // Packed once: when it is sent again it must be the same (§5.2).
    this.#submit = pack({ type: "submit", request_id: this.id, space, params, ...options });
    /** name → LiveInput, of each input that `options.inputs` announces as live. */
    this.live = Object.fromEntries(Object.entries(options.inputs ?? {}).filter(([, info]) => info.live).map(([name]) =>
      [name, new LiveInput(name, (piece) => client._send(pack({ type: "input", request_id: this.id, ...piece })))]));
    this.done = new Promise((resolve, reject) => {
      this._settle = (error, result) => (error ? reject(error) : resolve(result));
    });
    this.done.catch(() => {}); // nobody is obliged to wait for it
  }

  cancel(reason = "") {
    this.#cancel = pack({ type: "cancel", request_id: this.id, reason });
    this.#client._send(this.#cancel);
  }

  /** What §7 asks for on every new connection; on the first one, that is the submit. */
  _resume() {
    clearTimeout(this.#later);
    if (!this.#accepted && this.#next === 0) {
      if (!this.#client._send(this.#submit)) return; // not connected yet
    } else {
      const place = { attempt: this.#attempt, after_seq: this.#next - 1 };
      this.#client._send(pack({ type: "attach", request_id: this.id, ...place }));
    }
    for (const input of Object.values(this.live)) input._open(!this.#tried);
    this.#tried = true;
    // Nothing answers a cancel itself, so one that was sent may have been lost with its connection (§5.5).
    if (this.#cancel) this.#client._send(this.#cancel);
  }

  _take(message) {
    if (message.type === "accepted") {
      this.#accepted = true;
    } else if (message.type === "queued") {
      this.emit("queued", message);
    } else if (message.type === "input_ack") {
      this.live[message.name]?._acknowledged(message);
    } else if (message.type === "rejected" && message.code === "shutting_down") { // of a submit; §7
      this.#later = setTimeout(() => this._resume(), 1000 * (message.retry_after_s ?? 1));
    } else if (message.type === "rejected") {
      this._end(new RelayError(message.code, message.message, message));
    } else if (Number.isInteger(message.seq)) {
      this.#frame(message);
    }
  }

  /** The rules of §6 by their numbers. Rule 1 is the client's: it forgets a request that has ended. */
  #frame(frame) {
    const { type, attempt, seq } = frame;
    if (type !== "failed" && type !== "cancelled") { // 2: those two are taken whatever their numbers
      if (attempt < this.#attempt) return type === "completed" ? this.#anew() : undefined; // 3: of one that is over
      if (attempt === this.#attempt && seq < this.#next) return; // 4: a duplicate
      if (seq > this.#next) return this.#missing(); // 5
      if (seq < this.#next) { // 6: all from here on is void
        this.bytes = this.#bytesBefore[seq];
        this.emit("restart", this.bytes);
      }
    }
    this.#attempt = attempt;
    this.#next = seq + 1;
    this.#bytesBefore[seq] = this.bytes;
    if (type === "audio") this.bytes += frame.pcm.length;
    this.emit(type, frame, this.#bytesBefore[seq]); // a type of a later version reaches nobody: passed over (§1)
    if (type === "completed") this._end(null, frame.result ?? {});
    if (type === "failed") this._end(new RelayError(frame.code, frame.message, frame));
    if (type === "cancelled") this._end(new RelayError(type, frame.reason));
  }

  /** The relay was killed, and has completed an earlier attempt than the one whose frames are here. */
  #anew() {
    [this.#attempt, this.#next, this.bytes] = [0, 0, 0];
    this.emit("restart", 0);
    this._resume();
  }

  #missing() {
    if (this.#gaps++ === 0) return this.#client._drop(`frame ${this.#next} is missing`); // and re-attach, once
    this.cancel("frames are missing");
    this._end(new RelayError("frames_missing", `the relay left out frame ${this.#next}, twice`));
  }

  _end(error, result) {
    clearTimeout(this.#later);
    this.#client._requests.delete(this.id);
    const over = error ?? new RelayError("input_closed", "the request has completed");
    for (const input of Object.values(this.live)) input._stop(over);
    this._settle(error, result);
  }
}

/** A connection that is made anew when it is lost, and the requests on it. */
export class RelayClient {
  connected = false; // and logged in
  _requests = new Map(); // those that have not ended, by id
  #url;
  #hello;
  #log;
  #ws = null; // in use, or being made
  #ceiling = 0.5; // of the next pause, seconds
  #mistaken = false; // the last connection ended by a mistake of the relay
  #stop = new AbortController();

  constructor(url, { token, agent = "client.mjs/1", log = () => {} } = {}) {
    this.#url = new URL(url);
    this.#url.protocol = this.#url.protocol.replace(/^http/, "ws"); // the page's address means the same relay
    if (!["ws:", "wss:"].includes(this.#url.protocol)) throw new TypeError(`${url} is no ws:// or wss:// URL`);
    this.#url.pathname = this.#url.pathname.replace(/(\/v1(\/relay)?)?\/*$/, "/v1/relay"); // a prefix before it is kept
    this.#hello = pack({ type: "hello", version: 1, role: "client", token: token || undefined, agent, video: true });
    this.#log = log;
  }

  /** `options` are the other fields of `submit` (§10.3): priority, retry, detach, … */
  submit(space, params, options = {}) {
    const request = new Request(this, space, params, options);
    this._requests.set(request.id, request);
    request._resume();
    return request;
  }

  /** Leaves in order. That cancels nothing (§5.6): a request that is not wanted any more is cancelled before. */
  async close() {
    this.#stop.abort();
    const ws = this.#ws;
    if (!ws || ws.readyState === WebSocket.CLOSED) return;
    await new Promise((resolve) => ws.once("close", resolve).close(1000));
  }

  /** Whether it was sent; else _resume() says it on the next connection. */
  _send(bytes) {
    if (this.connected) this.#ws.send(bytes);
    return this.connected;
  }

  /** The relay broke a rule: leaves this connection; it is made anew. */
  _drop(why) {
    this.connected = false;
    this.#log(`the relay broke a rule: ${why}`);
    this.#ws.close(1002);
  }

  /** Connects and logs in. What goes wrong is thrown, here; a connection that is lost later is made anew. */
  connect() {
    return new Promise((resolve, reject) => {
      const options = { perMessageDeflate: false, handshakeTimeout: 10_000, closeTimeout: 2000 };
      const ws = new WebSocket(this.#url, "relay.v1.msgpack", options);
      this.#ws = ws;
      let welcomed = 0; // when
      let deadAfter = 10_000; // until then (§2.5)
      let silence;
      let fault; // the first is the cause, the others are what comes of it
      const broke = (code, message, final = false) => {
        fault ??= Object.assign(new RelayError(code, message), { final });
      };
      const heard = () => { // a connection without a byte is dead, whatever TCP believes (§2.4)
        clearTimeout(silence);
        silence = setTimeout(() => ws.terminate(), deadAfter);
      };

      ws.on("upgrade", ({ socket }) => socket.on("data", heard)); // pings too, which the library answers
      ws.on("open", () => {
        heard();
        ws.send(this.#hello);
      });
      ws.on("message", (data, isBinary) => {
        if (ws.readyState !== WebSocket.OPEN) return; // it was dropped
        let message;
        try {
          message = unpack(data, isBinary);
        } catch (error) {
          return this._drop(error.message);
        }
        if (message.type === "welcome") {
          welcomed = Date.now();
          deadAfter = Math.max(15_000, 3000 * (message.ping_interval_s ?? 5));
          heard();
          this.connected = true;
          resolve(this);
          for (const request of this._requests.values()) request._resume();
        } else if (message.type === "error" && !(message.code === "unknown_type" && welcomed)) {
          const final = !["rate_limited", "internal", "idle_timeout", "slow_consumer"].includes(message.code); // §11
          broke(message.code, message.message, final); // the close follows
        } else {
          this._requests.get(message.request_id)?._take(message);
        }
      });
      ws.on("unexpected-response", (_, answer) => { // HTTP that refuses; the reason is in the body (§2.2)
        let why = "";
        answer.setEncoding("utf8").on("data", (text) => (why += text)).on("error", () => {});
        answer.on("close", () => {
          broke("connection", `HTTP ${answer.statusCode}: ${why.trim()}`);
          ws.terminate();
        });
      });
      ws.on("error", (error) => broke("connection", error.message || error.code));
      ws.on("close", (code) => {
        clearTimeout(silence);
        this.connected = false;
        broke("connection", `closed with code ${code}`, code === 1009); // other final ones have an `error` (§2.5)
        if (welcomed) this.#reconnect(fault, Date.now() - welcomed);
        else reject(fault);
      });
    });
  }

  async #reconnect(fault, held) {
    if (held >= 5000) this.#ceiling = 0.5;
    // The relay's own mistake, twice within 5 s: what we send will break it again.
    if (fault.code === "internal" && this.#mistaken && held < 5000) fault.final = true;
    this.#mistaken = fault.code === "internal";
    while (!this.#stop.signal.aborted && !fault.final) {
      this.#log(`the connection is gone (${fault.message}); trying again`);
      // A random part of the ceiling, so that a relay that comes back is not met by all its clients at once.
      await sleep(1000 * this.#ceiling * Math.random(), null, { signal: this.#stop.signal }).catch(() => {});
      this.#ceiling = Math.min(10, 2 * this.#ceiling);
      if (this.#stop.signal.aborted) return;
      try {
        return void (await this.connect());
      } catch (error) {
        fault = error;
      }
    }
    if (fault.final) for (const request of [...this._requests.values()]) request._end(fault);
  }
}

/** A WAV file that is valid after every call: the audio first, then the header that counts it in. */
class WavFile {
  constructor(path) {
    this.fd = openSync(path, "w");
  }

  begin(format) {
    this.format = format;
    this.cut(0);
  }

  write(pcm, offset) {
    writeSync(this.fd, pcm, 0, pcm.length, 44 + offset);
    this.#header(offset + pcm.length);
  }

  cut(bytes) {
    this.#header(bytes);
    ftruncateSync(this.fd, 44 + bytes);
  }

  #header(bytes) {
    const { sample_rate: rate, channels = 1 } = this.format;
    const header = Buffer.from("RIFF----WAVEfmt \x10\0\0\0\x01\0--rrrrbbbb--\x10\0data----", "latin1");
    header.writeUInt32LE(36 + bytes, 4);
    header.writeUInt16LE(channels, 22);
    header.writeUInt32LE(rate, 24);
    header.writeUInt32LE(rate * channels * 2, 28);
    header.writeUInt16LE(channels * 2, 32);
    header.writeUInt32LE(bytes, 40);
    writeSync(this.fd, header, 0, 44, 0);
  }
}

/** speed=1.5 → ["speed", 1.5], voice=anna → ["voice", "anna"]: JSON where it parses. */
function param(text) {
  const [key, ...value] = text.split("=");
  if (!key || !value.length) throw new TypeError(`${text} is no PARAM=VALUE`);
  try {
    return [key, JSON.parse(value.join("="))];
  } catch {
    return [key, value.join("=")];
  }
}

async function feed(input, source) {
  for await (const bytes of source) await input.feed(bytes);
  input.end();
}

async function main([url, space, text, path, ...rest]) {
  const say = (line) => process.stderr.write(`${line}\n`);
  let client;
  let params;
  try {
    if (!path) throw new TypeError("four arguments are needed");
    params = Object.fromEntries(rest.map(param));
    if (text !== "-") params = { text, ...params };
    client = new RelayClient(url, { token: process.env.RELAY_TOKEN, log: say });
  } catch (error) {
    say(`client.mjs: ${error.message}\nusage: RELAY_TOKEN=… node client.mjs URL SPACE TEXT OUT.wav [PARAM=VALUE]…`);
    return 2;
  }

  let request;
  let interrupted = false;
  process.on("SIGINT", () => {
    // Without a connection nobody can be told: the relay cancels it when its resume window ends (§5.6).
    if (interrupted || !request || !client.connected) process.exit(130);
    interrupted = true;
    request.cancel("interrupted");
    setTimeout(() => process.exit(130), 7000); // the relay itself makes an end of it after 5 s (§5.5)
  });

  try {
    await client.connect();
  } catch (error) {
    say(`client.mjs: cannot connect to ${url}: ${error.message} (${error.code})`);
    return 3;
  }
  const began = performance.now();
  const since = () => `${((performance.now() - began) / 1000).toFixed(2)} s`;
  let wav;
  let heard = false;
  let badFile;
  const toFile = (work) => {
    try {
      if (!badFile) work();
    } catch (error) { // no use in speech that cannot be kept
      badFile = error;
      request.cancel("its client cannot write the file");
    }
  };
  request = client.submit(space, params, text === "-" ? { inputs: { text: { media_type: "text/plain", live: true } } } : {});
  if (text === "-") {
    feed(request.live.text, process.stdin).catch((error) => { // of the request itself, `done` tells
      if (!(error instanceof RelayError)) request.cancel(`its client cannot read the text: ${error.message}`);
    });
  }
  request.on("queued", ({ position, of, eta_s: eta }) =>
    say(`place ${position} of ${of}${eta == null ? "" : `, starts in about ${eta.toFixed(1)} s`}`));
  request.on("started", ({ format }) => format && toFile(() => (wav ??= new WavFile(path)).begin(format)));
  request.on("restart", (bytes) => toFile(() => wav?.cut(bytes)));
  request.on("audio", ({ pcm }, offset) => {
    if (!heard) say(`first audio after ${since()}`);
    heard = true;
    toFile(() => wav.write(pcm, offset));
  });
  try {
    const result = await request.done;
    if (badFile) throw badFile;
    say(`completed after ${since()}: ${result.duration_s ?? "?"} s of audio -> ${path}`);
    return interrupted ? 130 : 0;
  } catch (error) {
    if (interrupted) return 130;
    say(`client.mjs: ${(badFile ?? error).message} (${(badFile ?? error).code})`);
    for (const [field, wrong] of Object.entries(error.details ?? {})) say(`  ${field || "params"}: ${wrong}`);
    return error.final ? 3 : 1;
  } finally {
    await client.close();
  }
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  process.exit(await main(process.argv.slice(2)));
}
