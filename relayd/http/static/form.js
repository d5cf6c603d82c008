// The form of a space: fields from the JSON Schema of its params, and its inputs.

import { $, make, set } from "./elements.js";
import { InputField } from "./input.js";
import { say } from "./words.js";

let form = null; // {name of the space, shape, fields, inputs; text: param of the large field, its rule, and most characters}

/** Disable the form while no worker can serve it; enabling it again restores the cursor. */
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

/** Build fields for the space's params and inputs, only if these have changed. */
export function build(space) {
  const shape = JSON.stringify([space.name, space.params, space.inputs]);
  if (form?.shape === shape) return;
  const properties = space.params?.properties ?? {};
  const needed = space.params?.required ?? [];
  form?.inputs.forEach((field) => field.stop());
  const wanted = Object.entries(space.inputs ?? {}).filter(([name]) => !(name in properties)); // else the param's field has it
  const inputs = wanted.map(([name, rule]) => new InputField(name, rule));
  form = { name: space.name, shape, fields: new Map(), inputs };
  form.text = textParam(properties, needed);
  const rule = properties[form.text];
  form.rule = rule ?? {};
  $("text-field").hidden = !form.text;
  $("text").required = Boolean(form.text) && (!rule || needed.includes(form.text));
  form.most = rule?.maxLength ?? null;
  set($("text-about"), rule?.description ?? "");
  $("text-about").hidden = !rule?.description;
  $("settings").replaceChildren();
  for (const [name, schema] of Object.entries(properties)) if (name !== form.text && !("const" in schema)) setting(name, schema, needed.includes(name));
  $("more").hidden = !form.fields.size;
  $("more").open = [...form.fields.values()].some(({ element }) => element.required) || (!form.text && form.fields.size > 0);
  $("inputs").replaceChildren(...inputs.map(({ element }) => element));
  $("inputs").hidden = !inputs.length;
  wordForm();
}

/** The param that is written in the large field: `text`, or else the first text, a required one before others; null without any. */
function textParam(properties, needed) {
  if ("text" in properties || !Object.keys(properties).length) return "text";
  const isText = ({ type, anyOf = [], enum: values, const: fixed }) =>
    values === undefined && fixed === undefined && ([type].flat().includes("string") || anyOf.some(isText));
  const texts = Object.keys(properties).filter((name) => isText(properties[name]));
  return texts.find((name) => needed.includes(name)) ?? texts[0] ?? null;
}

/** Add a field for a param, according to its schema. `read` returns its value; undefined leaves it out. */
function setting(name, schema, required) {
  const id = `param-${name}`;
  const kinds = [schema.type].flat().filter((type) => type !== "null");
  const kind = schema.enum ? "enum" : kinds.length === 1 ? kinds[0] : null;
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

/** Set the texts of the form in the current language. */
export function wordForm() {
  if (!form) return;
  set($("text-label"), form.text === "text" ? say("text") : (form.rule.title ?? form.text));
  $("text").placeholder = form.rule.default ? String(form.rule.default) : form.text === "text" ? say("text_hint") : "";
  for (const { element, schema } of form.fields.values()) {
    if (element.tagName !== "SELECT") continue;
    element.options[0].text = schema.default === undefined ? say("standard_none") : say("standard", { value: told(schema.default) });
    if (schema.type === "boolean") [...element.options].slice(1).forEach((option, i) => (option.text = say(i ? "no" : "yes")));
  }
  form.inputs.forEach((field) => field.word());
  count();
}

const told = (value) => (typeof value === "boolean" ? say(value ? "yes" : "no") : String(value));

export function count() {
  const n = [...$("text").value].length;
  set($("count"), form?.most ? say("count", { n, most: form.most.toLocaleString(document.documentElement.lang) }) : n ? String(n) : "");
  $("text").setAttribute("aria-invalid", String(Boolean(form?.most && n > form.most)));
}

/** Mark the fields that the relay rejected. */
export function mark(request) {
  if (request.space !== form?.name) return;
  for (const field of Object.keys(request.failure?.details ?? {})) {
    const element = field === form.text ? $("text") : form.fields.get(field)?.element;
    element?.setAttribute("aria-invalid", "true");
  }
}

/** Name → {media_type, data, sha256}; throws errors to show to the user, as `readParams` does. */
export async function readInputs() {
  const files = {};
  for (const field of form.inputs) {
    const file = await field.read();
    if (file) files[field.name] = file;
  }
  return files;
}

export function readParams() {
  const params = {};
  if (form.text && ($("text").value || $("text").required)) params[form.text] = $("text").value;
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

/** The space of the current form. */
export const formSpace = () => form?.name;

export function dropForm() {
  form?.inputs.forEach((field) => field.stop());
  form = null;
}
