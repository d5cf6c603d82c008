import { sha256 } from "./digest.js";
import { $, set } from "./elements.js";
import { Recorder } from "./recorder.js";
import { say, seconds, size } from "./words.js";

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** A new request id (§3). */
export const newId = () => hex(crypto.getRandomValues(new Uint8Array(16)));

/** The media type in the space's spelling: browsers have several names for WAV. `image/*` accepts all images. */
function kindOf(file, kinds) {
  const names = [file.type || "application/octet-stream"];
  if (/^audio\/(x-|vnd\.)?wave?$/.test(names[0])) names.push("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave");
  const accepted = (name) => !kinds.length || kinds.some((kind) => [name, "*/*", `${name.split("/")[0]}/*`].includes(kind.toLowerCase()));
  return names.find(accepted);
}

/** The field of an input: a file, or a recording if the space accepts audio. */
export class InputField {
  element = $("input").content.firstElementChild.cloneNode(true);
  #file = null;
  #recorder = null;
  #recorded_s = 0;
  #url = null;

  constructor(name, { media_types: kinds = [], max_bytes: most, required }) {
    Object.assign(this, { name, kinds, most, required });
    const [label, chooser, record] = [".label", "input", ".record"].map((part) => this.#part(part));
    label.id = `input-${name}`;
    record.id = `record-${name}`;
    chooser.setAttribute("aria-labelledby", label.id);
    record.setAttribute("aria-labelledby", `${record.id} ${label.id}`);
    chooser.accept = kinds.join(",");
    record.hidden = kinds.length > 0 && !kindOf({ type: "audio/wav" }, kinds);
    chooser.onchange = () => {
      this.#keep(chooser.files[0] ?? null);
      set(this.#part(".told"), "");
    };
    record.onclick = () => (this.#recorder ? this.stop() : this.#record());
    this.word();
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }

  /** Set its texts in the current language. */
  word() {
    set(this.#part(".label"), `${this.name} (${say(this.required ? "required" : "optional")})`);
    set(this.#part(".record"), say(this.#recorder ? "stop" : "record"));
    this.#part(".record").classList.toggle("recording", Boolean(this.#recorder));
    if (navigator.mediaDevices || this.#part(".record").hidden) return;
    this.#part(".record").disabled = true; // browsers give the microphone to secure contexts only
    set(this.#part(".hint"), say("no_recording"));
  }

  /** Keep a chosen file or a recording; audio can be played before it is sent. */
  #keep(file) {
    this.#file = file;
    if (this.#url) URL.revokeObjectURL(this.#url);
    const sounds = Boolean(file && file.type.startsWith("audio/"));
    this.#url = sounds ? URL.createObjectURL(file) : null;
    const player = this.#part("audio");
    player.hidden = !sounds;
    if (sounds) player.src = this.#url;
    else player.removeAttribute("src");
  }

  async #record() {
    const [record, line] = [this.#part(".record"), this.#part(".told")];
    const recorder = new Recorder();
    this.#recorded_s = 0;
    record.disabled = true; // while the browser asks for permission
    try {
      await recorder.start(this.most, (s) => {
        if (s === null) return this.stop();
        this.#recorded_s = s;
        return set(line, say("recording", { s: seconds(Math.floor(s)) }));
      });
      this.#recorder = recorder;
    } catch (error) {
      set(line, say("no_microphone", { why: error.message }));
    }
    record.disabled = false;
    this.word();
  }

  /** End a recording, if there is one, and use it. */
  async stop() {
    const recorder = this.#recorder;
    if (!recorder) return;
    this.#recorder = null;
    this.#keep(await recorder.stop());
    this.#part("input").value = "";
    set(this.#part(".told"), say("recorded", { s: seconds(this.#recorded_s) }));
    this.word();
  }

  /** {media_type, data, sha256}, or null for none; throws errors to show to the user. */
  async read() {
    await this.stop();
    const { name, kinds, most, required } = this;
    const file = this.#file;
    if (!file && required) throw new TypeError(say("need_input", { name }));
    if (!file) return null;
    if (file.size > most) throw new TypeError(say("too_large", { name: file.name, size: size(file.size), most: size(most) }));
    const media_type = kindOf(file, kinds);
    if (!media_type) throw new TypeError(say("wrong_type", { name: file.name, kind: file.type || "?", kinds: kinds.join(", ") }));
    const data = new Uint8Array(await file.arrayBuffer());
    const digest = crypto.subtle ? new Uint8Array(await crypto.subtle.digest("SHA-256", data)) : sha256(data);
    return { media_type, data, sha256: hex(digest) };
  }
}
