import { decode, encode } from "./msgpack.js";

const PING_MS = 4000;
const SPACES_MS = 1500;
const CONNECT_MS = 10000;
/** Connection errors after which a new connection may succeed (§11). */
const PASSING = ["rate_limited", "internal", "idle_timeout", "slow_consumer"];

/** A connection that reconnects when it is lost. `notify` is called with "welcome", "down", "refused" and "message". */
export class Link {
  open = false; // connected and logged in
  #ws = null;
  #token = "";
  #role = "client";
  #notify;
  #ceiling_s = 0.5;
  #timers = [];
  #retry = 0;

  constructor(notify) {
    this.#notify = notify;
  }

  /** `token`: "" for the cookie of a user; `patient`: retry also if the first attempt fails. */
  start(token, patient, role = "client") {
    this.stop();
    [this.#token, this.#role] = [token, role];
    this.#connect(patient);
  }

  stop() {
    clearTimeout(this.#retry);
    this.#timers.forEach(clearInterval);
    const ws = this.#ws;
    [this.#ws, this.open] = [null, false];
    ws?.close(1000);
  }

  get waiting() {
    return this.open ? this.#ws.bufferedAmount : 0;
  }

  send(message) {
    if (this.open) this.#ws.send(encode(message)); // else Request.resume() sends it on the next connection
  }

  /** The relay broke a rule: close this connection. Browsers cannot send code 1002. */
  drop() {
    this.#ws?.close(4002);
    this.#lost(this.#ws, null);
  }

  #connect(patient) {
    const url = new URL("v1/relay", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const ws = new WebSocket(url, "relay.v1.msgpack");
    ws.binaryType = "arraybuffer";
    this.#ws = ws;
    let welcomed = 0;
    let lastReceived = Date.now();
    let deadAfter = CONNECT_MS;
    let refusal = null;
    const hasPatience = () => patient || welcomed > 0;
    this.#timers.forEach(clearInterval);
    this.#timers = [
      setInterval(() => Date.now() - lastReceived > deadAfter && this.#lost(ws, null, hasPatience(), welcomed), 1000),
    ];
    ws.onopen = () => {
      lastReceived = Date.now();
      ws.send(encode({ type: "hello", version: 1, role: this.#role, token: this.#token, agent: "page/1" }));
    };
    ws.onmessage = ({ data }) => {
      if (ws !== this.#ws) return;
      lastReceived = Date.now();
      let message;
      try {
        message = decode(new Uint8Array(data));
        if (typeof message?.type !== "string") throw new TypeError("a message without a type");
      } catch {
        this.drop();
        return;
      }
      if (message.type === "welcome") {
        welcomed = Date.now();
        deadAfter = Math.max(15000, 3000 * (message.ping_interval_s ?? 5));
        this.open = true;
        const ask = () => document.hidden || this.send({ type: "spaces" });
        const ping = () => this.send({ type: "ping", timestamp: Date.now() / 1000 });
        this.#timers.push(setInterval(ask, SPACES_MS), setInterval(ping, PING_MS));
        this.send({ type: "spaces" });
        this.#notify("welcome", message);
      } else if (message.type === "error" && !(message.code === "unknown_type" && welcomed)) {
        refusal = message; // the close follows
      } else {
        this.#notify("message", message);
      }
    };
    ws.onclose = ({ code }) => {
      const final = code === 1009 ? { code: "protocol_error", message: "the request is too large" } : refusal;
      this.#lost(ws, final, hasPatience(), welcomed);
    };
  }

  #lost(ws, refusal, patient = true, welcomed = 0) {
    if (!ws || ws !== this.#ws) return;
    this.#timers.forEach(clearInterval);
    [this.#ws, this.open] = [null, false];
    ws.close();
    if (refusal && !PASSING.includes(refusal.code)) return this.#notify("refused", refusal);
    if (!patient) return this.#notify("refused", refusal ?? { code: "connection" });
    this.#notify("down", refusal);
    if (welcomed && Date.now() - welcomed > 5000) this.#ceiling_s = 0.5;
    // A random part of the ceiling, so that not all clients reconnect to a restarted relay at once.
    this.#retry = setTimeout(() => this.#connect(true), 1000 * this.#ceiling_s * Math.random());
    this.#ceiling_s = Math.min(10, 2 * this.#ceiling_s);
  }
}
