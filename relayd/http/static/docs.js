// Draws openapi.json for people: the document itself is the only source of what is said here.

import { $, make, set } from "./elements.js";

const METHODS = ["get", "put", "post", "patch", "delete"];

/** `text` as nodes, with what stands in backticks as code. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? make("code", part) : part));

function marked(tag, className, ...children) {
  const element = make(tag, ...children);
  element.className = className;
  return element;
}

/** The part of the document that a $ref names. */
function follow(spec, part) {
  if (!part?.$ref) return part ?? {};
  return part.$ref.slice(2).split("/").reduce((at, key) => at[key], spec);
}

/** The type of a schema in a few words. */
function typeOf(spec, raw) {
  const schema = follow(spec, raw);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map((each) => typeOf(spec, each)).join(" | ");
  if (schema.type === "array") return `array of ${typeOf(spec, schema.items)}`;
  const type = [schema.type ?? "any"].flat().join(" | ");
  const bounds = [
    schema.minimum !== undefined && `≥ ${schema.minimum}`, schema.maximum !== undefined && `≤ ${schema.maximum}`,
    schema.maxLength !== undefined && `≤ ${schema.maxLength} characters`, schema.format, schema.pattern,
    schema.default !== undefined && `default ${JSON.stringify(schema.default)}`,
  ];
  return [type, ...bounds.filter(Boolean)].join(", ");
}

function table(rows) {
  return make("table", make("tbody", ...rows.map((cells) => make("tr", ...cells.map((cell) => make("td", ...[cell].flat()))))));
}

/** The fields of an object's schema; one inside another is named `outer.inner`. */
function fields(spec, raw, before = "") {
  const schema = follow(spec, raw);
  return Object.entries(schema.properties ?? {}).flatMap(([name, each]) => {
    const of = follow(spec, each);
    const inner = of.type === "array" ? follow(spec, of.items) : of;
    const required = schema.required?.includes(name) ? " (required)" : "";
    const about = of.description ? [make("br"), ...prose(of.description)] : [];
    const row = [[make("code", before + name), required], [marked("span", "soft", typeOf(spec, each)), ...about]];
    return [row, ...fields(spec, inner, `${before}${name}${of.type === "array" ? "[]" : ""}.`)];
  });
}

function section(title, ...content) {
  return content.length ? [make("h3", title), ...content] : [];
}

/** A command that calls the operation. */
function curl(path, method, operation, body) {
  const words = ["curl"];
  if (method !== "get") words.push("-X", method.toUpperCase());
  if (operation.security?.length !== 0) words.push('-H "Authorization: Bearer $TOKEN"');
  if (body?.content["application/json"]) words.push(`-H "Content-Type: application/json" -d '{…}'`);
  return `${words.join(" ")} "${new URL(path.slice(1), document.baseURI)}"`.replace(/%7B(\w+)%7D/g, "{$1}");
}

function drawOperation(spec, path, method, operation, shared) {
  const seen = new Map([...shared, ...(operation.parameters ?? [])].map((raw) => follow(spec, raw)).map((each) => [each.name, each]));
  const parameters = [...seen.values()].map(({ name, in: where, required, schema, description = "" }) => [
    [make("code", name), ` in ${where}${required ? " (required)" : ""}`],
    [marked("span", "soft", typeOf(spec, schema)), make("br"), ...prose(description)],
  ]);
  const body = operation.requestBody && follow(spec, operation.requestBody);
  const bodies = Object.entries(body?.content ?? {}).flatMap(([type, { schema }]) => {
    const about = follow(spec, schema).description;
    return [make("p", make("code", type)), ...(about ? [make("p", ...prose(about))] : []), table(fields(spec, schema))];
  });
  const answers = Object.entries(operation.responses).map(([status, raw]) => {
    const { description, content = {} } = follow(spec, raw);
    const types = Object.keys(content).join(", ");
    const rows = status < 300 ? fields(spec, content["application/json"]?.schema) : [];
    return [status, [...prose(description), ...(types ? [make("br"), marked("span", "soft", types)] : []), ...(rows.length ? [table(rows)] : [])]];
  });
  const token = operation.security?.length === 0 ? "Needs no token." : "";
  const element = make(
    "details",
    make("summary", make("code", marked("span", "method", method.toUpperCase()), ` ${path}`), " ", marked("span", "soft", ...prose(operation.summary ?? ""))),
    ...(operation.description ? [make("p", ...prose(operation.description))] : []),
    ...(token ? [make("p", token)] : []),
    make("pre", curl(path, method, operation, body)),
    ...section("Parameters", ...(parameters.length ? [table(parameters)] : [])),
    ...section("Body", ...bodies),
    ...section("Answers", table(answers)),
  );
  element.id = operation.operationId;
  return element;
}

function draw(spec) {
  set($("title"), `${spec.info.title} ${spec.info.version} · HTTP API`);
  $("about").replaceChildren(...prose([spec.info.summary, spec.info.description].filter(Boolean).join(". ")));
  for (const [path, { parameters = [], ...item }] of Object.entries(spec.paths)) {
    for (const method of METHODS) {
      if (item[method]) $("main").append(drawOperation(spec, path, method, item[method], parameters));
    }
  }
  openWanted();
}

/** Open the operation that the address names, as in docs#submit. */
function openWanted() {
  const wanted = location.hash && $(decodeURIComponent(location.hash.slice(1)));
  if (!wanted) return;
  wanted.open = true;
  wanted.scrollIntoView();
}

addEventListener("hashchange", openWanted);

try {
  const answer = await fetch(new URL("openapi.json", document.baseURI));
  if (!answer.ok) throw new Error(`the relay answered with status ${answer.status}`);
  draw(await answer.json());
} catch (error) {
  $("main").append(marked("p", "wrong", `The description cannot be read: ${error.message}. Reload the page to try again.`));
}
