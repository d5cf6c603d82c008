// The form of a space: fields after the JSON Schema of its params, and its inputs.

import { $, make, set } from "./elements.js";
import { Recorder } from "./recorder.js";
import { say, seconds, size } from "./words.js";

let form = null; // {name of the space, shape, fields, inputs, most characters of text}

/** The form is off while nobody could serve it. Who was writing goes on where they were, once it is back. */
let writing = null;
export function enable(on) {
  if ($("form").disabled === !on) return;
  const here = document.activeElement;
  if (!on) writing = $("form").contains(here) ? { here, from: here.selectionStart, until: here.selectionEnd } : null;
  $("form").disabled = !on;
  if (on && writing && (document.activeElement === document.body || document.activeElement === null)) {
    writing.here.focus();
    if (writing.here === $("text")) $("text").setSelectionRange(writing.from, writing.until);
  }
}

/** Fields for the space's params and inputs, made anew only when these have changed. */
export function build(space) {
  const shape = JSON.stringify([space.name, space.params, space.inputs]);
  if (form?.shape === shape) return;
  const properties = space.params?.properties ?? {};
  const needed = space.params?.required ?? [];
  form = { name: space.name, shape, fields: new Map(), inputs: new Map() };
  const rule = properties.text;
  const spoken = Boolean(rule) || !Object.keys(properties).length;
  $("text-field").hidden = !spoken;
  $("text").required = spoken && (!rule || needed.includes("text"));
  form.most = rule?.maxLength ?? null;
  $("settings").replaceChildren();
  for (const [name, schema] of Object.entries(properties)) if (name !== "text" && !("const" in schema)) setting(name, schema, needed.includes(name));
  $("more").hidden = !form.fields.size;
  $("more").open = [...form.fields.values()].some(({ element }) => element.required) || (!spoken && form.fields.size > 0);
  $("inputs").replaceChildren();
  for (const [name, about] of Object.entries(space.inputs ?? {})) input(name, about);
  $("inputs").hidden = !form.inputs.size;
  wordForm();
}

/** A field for a param, after its schema. `read` gives its value; undefined leaves it out. */
function setting(name, schema, required) {
  const id = `param-${name}`;
  const kind = schema.enum ? "enum" : schema.type;
  let element;
  let read;
  if (kind === "enum" || kind === "boolean") {
    const values = schema.enum ?? [true, false];
    element = make("select");
    element.append(new Option("", ""), ...values.map((value, i) => new Option(String(value), i)));
    read = () => (element.value === "" ? undefined : values[Number(element.value)]);
  } else if (kind === "string" && schema.maxLength > 500) {
    element = make("textarea");
    element.rows = 2;
    read = () => element.value || undefined;
  } else {
    element = make("input");
    const number = kind === "integer" || kind === "number";
    element.type = number ? "number" : "text";
    if (number) Object.assign(element, { min: schema.minimum ?? "", max: schema.maximum ?? "", step: kind === "integer" ? 1 : "any" });
    if (number) read = () => (element.value === "" ? undefined : Number(element.value));
    else if (kind === "string") read = () => element.value || undefined;
    else read = () => (element.value.trim() ? JSON.parse(element.value) : undefined); // a map, an array, or anything
    if (schema.maxLength) element.maxLength = schema.maxLength;
  }
  Object.assign(element, { id, required });
  if (schema.default !== undefined && "placeholder" in element) element.placeholder = JSON.stringify(schema.default);
  const label = make("label", name);
  label.htmlFor = id;
  const field = make("div", label, element);
  field.className = "field";
  if (schema.description) {
    const about = make("p", schema.description);
    Object.assign(about, { id: `${id}-about`, className: "soft small" });
    element.setAttribute("aria-describedby", about.id);
    field.append(about);
  }
  $("settings").append(field);
  form.fields.set(name, { element, read, schema });
}

/** A field for an input: a file, or the microphone where audio is taken. */
function input(name, { media_types: kinds = [], max_bytes: most, required }) {
  const field = $("input").content.firstElementChild.cloneNode(true);
  const part = (selector) => field.querySelector(selector);
  const entry = { field, file: null, recorder: null, kinds, most, required };
  const label = part(".label");
  const chooser = part("input");
  const record = part(".record");
  label.id = `input-${name}`;
  chooser.setAttribute("aria-labelledby", label.id);
  record.id = `record-${name}`;
  record.setAttribute("aria-labelledby", `${record.id} ${label.id}`);
  chooser.accept = kinds.join(",");
  record.hidden = kinds.length > 0 && !kinds.some((kind) => /^audio\/(.*wave?|\*)$/.test(kind));
  const keep = (file) => {
    entry.file = file;
    if (entry.url) URL.revokeObjectURL(entry.url);
    const plays = Boolean(file && /^audio\//.test(file.type));
    entry.url = plays ? URL.createObjectURL(file) : null;
    part("audio").hidden = !plays;
    if (plays) part("audio").src = entry.url;
    else part("audio").removeAttribute("src");
  };
  const stop = async () => {
    const { recorder } = entry;
    if (!recorder) return;
    entry.recorder = null;
    const file = await recorder.stop();
    keep(file);
    chooser.value = "";
    record.classList.remove("recording");
    set(record, say("record"));
    set(part(".told"), say("recorded", { s: seconds(entry.taken_s ?? 0) }));
  };
  chooser.onchange = () => {
    keep(chooser.files[0] ?? null);
    set(part(".told"), "");
  };
  record.onclick = async () => {
    if (entry.recorder) return stop();
    const recorder = new Recorder();
    entry.taken_s = 0;
    try {
      await recorder.start(most, (s) => {
        if (s === null) return stop();
        entry.taken_s = s;
        return set(part(".told"), say("recording", { s: seconds(Math.floor(s)) }));
      });
    } catch (error) {
      return set(part(".told"), say("no_microphone", { why: error.message }));
    }
    entry.recorder = recorder;
    record.classList.add("recording");
    return set(record, say("stop"));
  };
  entry.stop = stop;
  $("inputs").append(field);
  form.inputs.set(name, entry);
}

/** The words of a form that was built, in the language of now. */
export function wordForm() {
  if (!form) return;
  $("text").placeholder = say("text_hint");
  for (const { element, schema } of form.fields.values()) {
    if (element.tagName !== "SELECT") continue;
    element.options[0].text = schema.default === undefined ? say("standard_none") : say("standard", { value: told(schema.default) });
    if (schema.type === "boolean") [...element.options].slice(1).forEach((option, i) => (option.text = say(i ? "no" : "yes")));
  }
  for (const [name, { field, required, recorder }] of form.inputs) {
    set(field.querySelector(".label"), `${name} (${say(required ? "required" : "optional")})`);
    set(field.querySelector(".record"), say(recorder ? "stop" : "record"));
  }
  count();
}

const told = (value) => (typeof value === "boolean" ? say(value ? "yes" : "no") : String(value));

export function count() {
  const n = [...$("text").value].length;
  set($("count"), form?.most ? say("count", { n, most: form.most.toLocaleString(document.documentElement.lang) }) : n ? String(n) : "");
  $("text").setAttribute("aria-invalid", String(Boolean(form?.most && n > form.most)));
}

/** Mark the fields that the relay refused. */
export function mark(request) {
  if (request.space !== form?.name) return;
  for (const field of Object.keys(request.failure?.details ?? {})) {
    const element = field === "text" ? $("text") : form.fields.get(field)?.element;
    element?.setAttribute("aria-invalid", "true");
  }
}

/** Its kind as the space spells it: browsers name WAV in several ways, and media types are compared literally. */
function kindOf(file, kinds) {
  const names = [file.type || "application/octet-stream"];
  if (/^audio\/(x-|vnd\.)?wave?$/.test(names[0])) names.push("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave");
  return kinds.length ? names.find((name) => kinds.includes(name)) : names[0];
}

export async function readInputs() {
  const files = {};
  for (const [name, entry] of form.inputs) {
    await entry.stop();
    const { file, kinds, most, required } = entry;
    if (!file && required) throw new TypeError(say("need_input", { name }));
    if (!file) continue;
    if (file.size > most) throw new TypeError(say("too_large", { name: file.name, size: size(file.size), most: size(most) }));
    const media_type = kindOf(file, kinds);
    if (!media_type) throw new TypeError(say("wrong_type", { name: file.name, kind: file.type || "?", kinds: kinds.join(", ") }));
    const data = new Uint8Array(await file.arrayBuffer());
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    files[name] = { media_type, data, sha256: hex(digest) };
  }
  return files;
}

export function readParams() {
  const params = {};
  if (!$("text-field").hidden) params.text = $("text").value;
  for (const [name, { read }] of form.fields) {
    try {
      const value = read();
      if (value !== undefined) params[name] = value;
    } catch {
      throw new TypeError(say("no_json", { name }));
    }
  }
  return params;
}

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** The space whose form it is. */
export const formSpace = () => form?.name;

export function dropForm() {
  form = null;
}
