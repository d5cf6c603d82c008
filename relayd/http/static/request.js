import { Track } from "./track.js";
import { size } from "./words.js";

/** The final states of a request. */
const ENDS = ["completed", "failed", "cancelled", "rejected", "lost"];
const PIECE_BYTES = 262144;
/** Limit of unsent data, so that a cancel does not wait behind the upload (§5.3). */
const AHEAD_BYTES = 2 * PIECE_BYTES;
/** Limit of the text shown for results other than speech. */
const MAX_OUTPUT_CHARS = 100000;

/** Whether the page shows files of this kind. */
export const isSeen = (kind) => /^(image|audio|video)\//.test(kind);
const isFile = ({ data, media_type }) => data instanceof Uint8Array || (typeof data === "string" && isSeen(media_type ?? ""));

const failureOf = ({ code, message, details }) => ({ code, message, details: { ...details } });

/** One request; `changed(request, what)` is called with "state" (and the one before), "away", "track", "audio", "output" or "figures". */
export class Request {
  state = "sending"; // sending, accepted, queued, running, again (refused for now; sent again later), or one of ENDS
  accepted = false;
  cancelling = false;
  fetching = false; // an ended request whose frames are read again …
  listening = false; // … to be played at once
  loaded = true; // false after a reload, until its frames have been read again
  gone = false; // its result is no longer kept
  silent = false; // it has completed without the audio that was announced
  unheard = Date.now(); // since when there is no connection; null while there is one
  away = null; // {since, until}: its worker was lost, and the relay waits for it
  lost = null; // {code, message}: why it waits again
  retry = null; // {at, failure}: when it is sent again, and why it was refused
  sent = 0; // uploaded fraction of its inputs, 0..1
  place = null; // {position, of, eta_s, at}
  progress = null;
  failure = null;
  result = null;
  began = 0; // when it started, in ms since 1970; kept across reloads
  first_s = null;
  outputs = []; // {data, media_type, more} of each frame
  track = new Track();
  files = null; // name → {media_type, data, sha256}; not kept across reloads
  #attempt = 0;
  #next = 0;
  #bytes = 0;
  #bytesBefore = [];
  #outputsBefore = [];
  #gaps = 0;
  #later = 0;
  #upload = 0;

  constructor(link, row, changed) {
    Object.assign(this, row); // id, space, params, made, and its stored fields
    this.loaded = !this.ended;
    this.link = link;
    this.changed = changed;
  }

  /** The fields to keep in sessionStorage. */
  row() {
    const { id, space, params, made, state, accepted, cancelling, failure, result, began, first_s, hasInputs, gone, silent } = this;
    const heard = this.track.at || this.heard || 0;
    return { id, space, params, made, state, accepted, cancelling, failure, result, began, first_s, hasInputs, gone, silent, heard };
  }

  get ended() {
    return ENDS.includes(this.state) && !this.fetching;
  }

  get title() {
    const text = this.params.text ?? Object.values(this.params).find((value) => typeof value === "string");
    return typeof text === "string" ? text.trim() || "—" : JSON.stringify(this.params);
  }

  /** Seconds that its attempt has been running; null unless it runs. Stands still while that is not known. */
  get running_s() {
    if (this.state !== "running" || !this.began) return null;
    return ((this.away?.since ?? this.unheard ?? Date.now()) - this.began) / 1000;
  }

  /** Whether its result is to be read again after a reload. */
  get missing() {
    return this.ended && !this.loaded && !this.gone && ["completed", "failed", "cancelled"].includes(this.state);
  }

  get held_bytes() {
    return 2 * this.track.samples + this.outputs.reduce((sum, { data }) => sum + (data?.length ?? 0), 0);
  }

  /** Submit or attach, as §7 requires on every new connection. */
  resume() {
    clearTimeout(this.#later);
    this.unheard = this.link.open ? null : this.unheard ?? Date.now();
    [this.away, this.lost, this.retry] = [null, null, null]; // the answer says what holds now
    const request_id = this.id;
    if (!this.accepted && this.#next === 0 && (this.files || !this.hasInputs)) {
      const inputs = {};
      for (const [name, { media_type, data, sha256 }] of Object.entries(this.files ?? {})) {
        inputs[name] = { media_type, size: data.length, sha256 };
      }
      this.link.send({ type: "submit", request_id, space: this.space, params: this.params, inputs });
      this.#send();
    } else {
      this.link.send({ type: "attach", request_id, attempt: this.#attempt, after_seq: this.#next - 1 });
    }
    if (this.cancelling) this.link.send({ type: "cancel", request_id }); // the first one may have been lost with its connection (§5.5)
  }

  async #send() {
    const mine = ++this.#upload;
    const all = Object.values(this.files ?? {}).reduce((sum, { data }) => sum + data.length, 0);
    let sent = 0;
    for (const [name, { data }] of Object.entries(this.files ?? {})) {
      for (let offset = 0; offset < data.length; offset += PIECE_BYTES) {
        while (this.link.waiting > AHEAD_BYTES) await new Promise((resolve) => setTimeout(resolve, 20));
        if (mine !== this.#upload || this.accepted || this.ended) return;
        const piece = data.subarray(offset, offset + PIECE_BYTES);
        this.link.send({ type: "input", request_id: this.id, name, offset, data: piece });
        sent += piece.length;
        this.sent = sent / all;
        this.changed(this, "figures");
      }
    }
  }

  /** The connection was lost: stop the upload. */
  unplugged() {
    this.#upload++;
    this.unheard ??= Date.now();
    clearTimeout(this.#later);
  }

  cancel() {
    this.cancelling = true;
    if (this.state === "again" && !this.accepted) return this.#end("cancelled"); // the relay does not have it
    this.link.send({ type: "cancel", request_id: this.id });
    this.changed(this, "state");
  }

  /** Read all frames again from the relay, which keeps them for a while after the end; `listening`: and play them. */
  fetch(listening) {
    this.fetching = true;
    this.listening = listening;
    if (listening) this.heard = 0;
    [this.#attempt, this.#next, this.#bytes] = [0, 0, 0];
    this.outputs = [];
    this.resume();
    this.changed(this, "state");
  }

  take(message) {
    const { type } = message;
    if (this.ended) return;
    if (type === "accepted") {
      if (this.accepted) return;
      this.accepted = true;
      this.files = null; // the relay has them
      this.#to("accepted");
    } else if (type === "queued") {
      const { position, of, eta_s } = message;
      this.place = { position, of, eta_s, at: Date.now() };
      if (message.code) this.lost = { code: message.code, message: message.message };
      [this.away, this.progress, this.began] = [null, null, 0];
      this.#to("queued");
    } else if (type === "worker_away") {
      this.away = { since: Date.now(), until: Date.now() + 1000 * message.wait_s };
      this.#run();
      this.changed(this, "away");
    } else if (type === "worker_back") {
      if (this.#attempt && message.attempt > this.#attempt) this.began = 0;
      [this.away, this.lost] = [null, null];
      this.#run();
    } else if (type === "rejected" && message.retryable && (message.retry_after_s || message.code === "shutting_down")) {
      if (this.cancelling && !this.accepted) return this.#end("cancelled");
      const wait_ms = 1000 * (message.retry_after_s ?? 1);
      this.retry = { at: Date.now() + wait_ms, failure: failureOf(message) };
      this.#later = setTimeout(() => this.resume(), wait_ms);
      this.place = null;
      this.#to("again");
    } else if (type === "rejected") {
      this.#end(this.accepted && message.code === "request_not_found" ? "lost" : "rejected", message);
    } else if (Number.isInteger(message.seq)) {
      this.#frame(message);
    }
  }

  /** Apply the rules of §6, by their numbers. */
  #frame(frame) {
    const { type, attempt, seq } = frame;
    if (type !== "failed" && type !== "cancelled") { // 2
      if (attempt < this.#attempt) return type === "completed" ? this.#anew() : undefined; // 3
      if (attempt === this.#attempt && seq < this.#next) return; // 4
      if (seq > this.#next) return this.#missing(); // 5
      if (seq < this.#next) this.#void(seq); // 6
    }
    this.#attempt = attempt;
    this.#next = seq + 1;
    this.#bytesBefore[seq] = this.#bytes;
    this.#outputsBefore[seq] = this.outputs.length;
    this.accepted = true;
    this[`_${type}`]?.(frame); // unknown types are ignored (§1)
  }

  /** Everything from this frame on is void. */
  #void(seq) {
    this.#bytes = this.#bytesBefore[seq] ?? 0;
    this.track.cut(this.#bytes);
    this.outputs.length = this.#outputsBefore[seq] ?? 0;
    this.changed(this, "output");
  }

  /** The relay was killed, and has completed an earlier attempt than the one whose frames are here. */
  #anew() {
    this.#void(0);
    [this.#attempt, this.#next] = [0, 0];
    this.resume();
  }

  #missing() {
    if (this.#gaps++ === 0) return this.link.drop(); // reconnect and attach again, once
    this.link.send({ type: "cancel", request_id: this.id });
    this.#end("failed", { code: "frames_missing", message: "the relay skipped a part of the result" });
  }

  #to(state) {
    if (this.fetching) return;
    const before = this.state;
    this.state = state;
    this.changed(this, "state", before);
  }

  #run() {
    this.began ||= Date.now();
    this.place = null;
    this.#to("running");
  }

  _started({ format }) {
    if (format) {
      this.track.begin(format);
      if (this.heard) [this.track.at, this.heard] = [this.heard, 0]; // the page was reloaded: continue from there
    }
    if (!this.lost) this.#run(); // else it is of the attempt that was lost
    if (format) this.changed(this, "track");
  }

  _progress({ state, fraction, message }) {
    this.progress = { state, fraction, message };
    this.changed(this, "figures");
  }

  _audio({ pcm }) {
    this.#bytes += pcm.length;
    if (this.first_s === null && !this.fetching) this.first_s = (Date.now() - this.made) / 1000;
    if (this.progress?.state === "loading") this.progress = null;
    this.track.add(pcm);
    this.changed(this, "audio");
  }

  _output({ data = null, media_type, more, mark }) {
    if (mark) return; // says how far the audio is in the text
    this.outputs.push({ data, media_type, more });
    this.changed(this, "output");
  }

  _completed({ result = {} }) {
    this.result = { ...result };
    this.silent = this.track.rate > 0 && !this.track.samples && !this.outputs.length;
    this.#end("completed");
  }

  _failed({ code, message, details }) {
    this.#end("failed", { code, message, details });
  }

  _cancelled({ reason }) {
    this.#end("cancelled", reason ? { code: "cancelled", message: reason } : null);
  }

  #end(state, failure = null) {
    const before = this.state;
    clearTimeout(this.#later);
    if (this.fetching && ["lost", "rejected"].includes(state)) this.gone = true;
    else this.state = state;
    if (failure && !this.gone) this.failure = failureOf(failure);
    [this.fetching, this.loaded, this.files, this.place, this.progress] = [false, true, null, null, null];
    [this.away, this.lost, this.retry] = [null, null, null];
    this.track.end();
    this.changed(this, "state", before);
  }

  /** The outputs that are files, as [{kind, parts}]; without one that is still arriving. */
  madeFiles() {
    const files = [];
    let file = null;
    for (const output of this.outputs.filter(isFile)) {
      file ??= { kind: (output.media_type ?? "application/octet-stream").split(";")[0].toLowerCase(), parts: [] };
      file.parts.push(output.data);
      if (output.more) continue;
      files.push(file);
      file = null;
    }
    return files;
  }

  /** The text shown for results other than speech. */
  shown() {
    let text = "";
    for (const { kind, parts } of this.madeFiles()) {
      if (!isSeen(kind)) text += `[${kind} · ${size(parts.reduce((sum, part) => sum + part.length, 0))}]\n`;
    }
    for (const output of this.outputs) {
      const { data } = output;
      if (isFile(output)) continue;
      if (typeof data === "string") text += data; // texts are pieces of one
      else text += `${text && !text.endsWith("\n") ? "\n" : ""}${JSON.stringify(data, (_, v) => (v instanceof Uint8Array ? [...v] : v))}\n`;
      if (text.length > MAX_OUTPUT_CHARS) return `${text.slice(0, MAX_OUTPUT_CHARS)}…`;
    }
    return text.trim();
  }
}
