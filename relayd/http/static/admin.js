// The operators' part of the page: users, tokens and spaces, by the steers of docs/protocol.md §9.2. Every action asks
// first, and shows the command that does the same.

import { $, make, set } from "./elements.js";
import { Link } from "./link.js";
import { stateOfSpace } from "./space.js";
import { fault, language, say } from "./words.js";

const SETTINGS = [
  ["description", "text"], ["max_workers", "number"], ["max_queued", "number"], ["max_queued_per_principal", "number"],
  ["max_running_per_principal", "number"], ["queue_timeout_s", "number"], ["run_timeout_s", "number"],
  ["idle_timeout_s", "number"], ["when_empty", ["queue", "refuse"]], ["max_attempts", "number"], ["cache_s", "number"],
];
const LIMITS = [
  "max_queued", "max_running", "max_connections", "requests_per_s", "max_uploads", "max_input_bytes", "max_readers",
  "max_retained", "max_priority",
];
const ROLES = ["client", "operator"];
const WORDED = ["name", "role", "password", "spaces", "expires"];

const drawn = new Map(); // id of a table → what it shows

/** A word as a shell takes it. */
const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${String(word).replaceAll("'", "'\\''")}'`);
const flag = (name, value) => [`--${name.replaceAll("_", "-")}`, quote(value)];
const flags = (values, names) => names.filter((name) => values[name]).flatMap((name) => flag(name, values[name]));
const number = (text) => (Number.isFinite(Number(text)) ? Number(text) : text); // the relay says what is wrong with others

/** The values of some fields that are filled in, as options of a steer. */
function options(values, names, numbers = names) {
  const filled = names.filter((name) => values[name]);
  return Object.fromEntries(filled.map((name) => [name, numbers.includes(name) ? number(values[name]) : values[name]]));
}

export class Admin {
  #link = new Link((what, message) => this.#heard(what, message));
  #asked = new Map(); // steer_id → [resolve, reject]
  #number = 0;
  #spaces = [];
  #action = null;
  #login = null; // the token, or "" for a cookie, with which the link was started

  constructor() {
    $("admin-open").onclick = () => this.show($("admin").hidden);
    $("add-user").onclick = () => this.#ask(this.#addUser());
    $("add-invite").onclick = () => this.#ask(this.#addInvite());
    $("add-token").onclick = () => this.#ask(this.#addToken());
    $("add-space").onclick = () => this.#ask(this.#addSpace());
    $("sure-no").onclick = () => $("sure").close();
    $("sure-form").oninput = () => this.#command();
    $("sure-form").onsubmit = (event) => {
      event.preventDefault();
      this.#act();
    };
  }

  /** After a login: an operator, by token or, with "", by the cookie; or nobody who may do anything here. */
  begin(isOperator, token) {
    if (!isOperator) return this.end();
    $("admin-open").hidden = false;
    if (this.#login !== token) this.#link.start(token, true, "operator");
    this.#login = token;
  }

  /** Until `begin`. */
  stop() {
    this.#link.stop();
    this.#login = null;
  }

  end() {
    this.stop();
    $("sure").close();
    $("admin-open").hidden = true;
    this.show(false);
    [this.#rows, this.#spaces] = [{ users: [], tokens: [] }, []];
    for (const id of ["user-rows", "token-rows", "space-rows"]) $(id).replaceChildren();
    drawn.clear();
  }

  show(shown) {
    if (shown === !$("admin").hidden) return;
    $("admin").hidden = !shown;
    $("desk").hidden = shown;
    this.word();
    if (shown) this.#refresh();
  }

  /** Texts that depend on what is shown. */
  word() {
    set($("admin-open"), say($("admin").hidden ? "admin" : "back"));
    this.#draw(this.#rows);
  }

  // -- the connection

  #heard(what, message) {
    if (what === "welcome") this.#refresh();
    if (what === "refused") this.end();
    if (what === "down") for (const [, reject] of this.#asked.values()) reject({ code: "connection" });
    if (what === "down") this.#asked.clear();
    if (what !== "message") return;
    const [resolve, reject] = this.#asked.get(message.steer_id ?? message.request_id) ?? [];
    this.#asked.delete(message.steer_id ?? message.request_id);
    if (message.type === "done") resolve?.(message.data);
    if (message.type === "rejected") reject?.(message);
    if (message.type === "spaces") this.#list(message);
  }

  #steer(action, target = "", more = {}) {
    const steer_id = String(++this.#number);
    return new Promise((resolve, reject) => {
      if (!this.#link.open) return reject({ code: "connection" });
      this.#asked.set(steer_id, [resolve, reject]);
      this.#link.send({ type: "steer", steer_id, action, target, options: more });
    });
  }

  async #all(action, name, key) {
    const rows = [];
    for (let more = true; more;) {
      const page = await this.#steer(action, "", rows.length ? { after: rows.at(-1)[key] } : {});
      rows.push(...page[name]);
      ({ more } = page);
    }
    return rows;
  }

  // -- the lists

  #rows = { users: [], tokens: [] };
  #page = [];

  async #refresh() {
    if (!this.#link.open || $("admin").hidden) return;
    $("admin-fault").hidden = true;
    try {
      const [users, tokens] = await Promise.all([this.#all("list_users", "users", "id"), this.#all("list_tokens", "tokens", "token_id")]);
      this.#rows = { users, tokens: tokens.filter(({ state }) => state === "live") };
      this.#draw(this.#rows);
    } catch (error) {
      set($("admin-fault"), error.code === "connection" ? say("unreachable") : fault(error));
      $("admin-fault").hidden = false;
    }
  }

  #list({ spaces, more }) {
    this.#page.push(...spaces);
    if (more) return;
    const [before, now] = [JSON.stringify(this.#spaces), this.#page.map(({ name, state, queued, workers, draining }) => ({ name, state, queued, workers, draining }))];
    this.#page = [];
    if (before === JSON.stringify(now)) return;
    this.#spaces = now;
    this.#draw(this.#rows);
  }

  #draw({ users, tokens }) {
    if ($("admin").hidden) return;
    table("user-rows", users, (user) => [
      [user.name || user.id, user.role, say(`user_${user.state}`), user.seen ?? user.expires ?? "–"],
      [
        ...(user.name ? [["set_role", () => this.#setRole(user)], ["set_password", () => this.#setPassword(user)]] : []),
        ["remove", () => this.#removeUser(user)],
      ],
    ]);
    table("token-rows", tokens, (token) => [
      [token.principal, token.role, token.spaces.join(", ") || "*", token.expires ?? "–"],
      [["revoke", () => this.#revoke(token)]],
    ]);
    table("space-rows", this.#spaces, (space) => [
      [space.name, say(stateOfSpace(space)), say("load_admin", space)],
      [
        [space.state === "paused" ? "resume" : "pause", () => this.#pause(space)],
        ["settings", () => this.#settings(space)],
        ["remove", () => this.#deleteSpace(space)],
      ],
    ]);
  }

  // -- the question before each action

  /** Ask: {title, fields, command(values), act(values)}; `act` may resolve to {secret, note}, which is shown once. */
  #ask(action) {
    this.#action = action;
    set($("sure-title"), say(action.title, action));
    $("sure-fields").replaceChildren(...action.fields.map(field));
    $("sure-fault").hidden = true;
    $("sure-secret").hidden = true;
    $("sure-yes").hidden = false;
    set($("sure-no"), say("cancel"));
    this.#command();
    $("sure").showModal();
  }

  #values() {
    return Object.fromEntries(this.#action.fields.map(({ name }) => [name, $(`sure-${name}`).value.trim()]));
  }

  #command() {
    set($("sure-command"), this.#action.command(this.#values()).join(" "));
  }

  async #act() {
    $("sure-fault").hidden = true;
    $("sure-yes").disabled = true;
    try {
      const told = await this.#action.act(this.#values());
      if (told?.secret) {
        $("sure-fields").replaceChildren();
        set($("sure-note"), told.note);
        $("sure-text").value = told.secret;
        $("sure-secret").hidden = false;
        $("sure-yes").hidden = true;
        set($("sure-no"), say("close"));
        $("sure-text").select();
      } else {
        $("sure").close();
      }
    } catch (error) {
      set($("sure-fault"), error.code === "connection" ? say("unreachable") : fault(error));
      $("sure-fault").hidden = false;
    }
    $("sure-yes").disabled = false;
    this.#refresh();
  }

  #addUser() {
    return {
      title: "add_user",
      fields: [{ name: "name" }, { name: "role", kind: ROLES }, { name: "password", kind: "password", optional: true }],
      command: ({ name, role, password }) => ["relayd user add", quote(name || "NAME"), ...flag("role", role), ...(password ? [] : ["--no-password"])],
      act: ({ name, role, password }) => this.#steer("create_user", name, { role, password }).then(() => null),
    };
  }

  #addInvite() {
    return {
      title: "add_invite",
      fields: [{ name: "role", kind: ROLES }, { name: "expires", value: "7d" }],
      command: (values) => ["relayd user invite", ...flags(values, ["role", "expires"])],
      act: (values) => this.#steer("create_invite", "", options(values, ["role", "expires"], [])).then(({ code }) => ({
        secret: new URL(`./#invite=${code}`, document.baseURI).href, note: say("invite_note"),
      })),
    };
  }

  #setRole({ name, role }) {
    return {
      title: "ask_role", name,
      fields: [{ name: "role", kind: ROLES, value: role }],
      command: (values) => ["relayd user role", quote(name), values.role],
      act: (values) => this.#steer("set_user_role", name, values).then(() => null),
    };
  }

  #setPassword({ name }) {
    return {
      title: "ask_password", name,
      fields: [{ name: "password", kind: "password" }],
      command: () => ["relayd user passwd", quote(name)],
      act: ({ password }) => this.#steer("set_user_password", name, { password }).then(() => null),
    };
  }

  #removeUser({ id, name }) {
    const which = name || id;
    return {
      title: "ask_remove", name: which, fields: [],
      command: () => ["relayd user remove", quote(which)],
      act: () => this.#steer("remove_user", which).then(() => null),
    };
  }

  #addToken() {
    const fields = [
      { name: "name" }, { name: "role", kind: ["client", "worker", "operator"] }, { name: "spaces", optional: true },
      { name: "expires", optional: true }, ...LIMITS.map((name) => ({ name, kind: "number", optional: true })),
    ];
    const split = (spaces) => spaces.split(/[\s,]+/).filter(Boolean);
    return {
      title: "add_token", fields,
      command: (values) => [
        "relayd token create", ...flag("role", values.role), ...flag("name", values.name || "NAME"),
        ...split(values.spaces).flatMap((space) => flag("space", space)), ...flags(values, ["expires", ...LIMITS]),
      ],
      act: (values) => this.#steer("create_token", values.name, {
        role: values.role, spaces: split(values.spaces), ...options(values, ["expires"], []), limits: options(values, LIMITS),
      }).then(({ token }) => ({ secret: token, note: say("token_note") })),
    };
  }

  #revoke({ token_id, principal }) {
    return {
      title: "ask_revoke", name: `${principal} (${token_id})`, fields: [],
      command: () => ["relayd token revoke", token_id],
      act: () => this.#steer("revoke_token", token_id).then(() => null),
    };
  }

  #addSpace() {
    return {
      title: "add_space",
      fields: [{ name: "name" }, ...SETTINGS.map(([name, kind]) => ({ name, kind: Array.isArray(kind) ? ["", ...kind] : kind, optional: true }))],
      command: (values) => ["relayd space create", quote(values.name || "NAME"), ...flags(values, SETTINGS.map(([name]) => name))],
      act: (values) => this.#steer("create_space", values.name, settings(values)).then(() => null),
    };
  }

  async #settings({ name }) {
    const { settings: now, made_by } = await this.#steer("change_space", name).catch(() => ({ settings: null }));
    if (now === null) return;
    const changed = (values) => Object.fromEntries(Object.entries(values).filter(([key, value]) => value !== String(now[key] ?? "")));
    this.#ask({
      title: made_by === "config" ? "ask_configured" : "ask_settings", name,
      fields: SETTINGS.map(([key, kind]) => ({ name: key, kind, value: String(now[key] ?? ""), optional: true })),
      command: (values) => ["relayd space change", quote(name), ...flags(changed(values), SETTINGS.map(([key]) => key))],
      act: (values) => this.#steer("change_space", name, settings(changed(values))).then(() => null),
    });
  }

  #pause({ name, state }) {
    const what = state === "paused" ? "resume" : "pause";
    return {
      title: `ask_${what}`, name, fields: [],
      command: () => [`relayd space ${what}`, quote(name)],
      act: () => this.#steer(`${what}_space`, name).then(() => null),
    };
  }

  #deleteSpace({ name }) {
    return {
      title: "ask_remove", name, fields: [],
      command: () => ["relayd space delete", quote(name)],
      act: () => this.#steer("delete_space", name).then(() => null),
    };
  }

  /** Whether a button's action is a question to ask, or asks by itself. */
  do(action) {
    if (action && !(action instanceof Promise)) this.#ask(action);
  }
}

const settings = (values) => {
  const numbers = SETTINGS.filter(([, kind]) => kind === "number").map(([name]) => name);
  return options(values, SETTINGS.map(([name]) => name), numbers);
};

/** Rows of texts, with a button for each action: rows(row) → [texts, [[word, act]]]. */
function table(id, list, rows) {
  const all = JSON.stringify([language, list]);
  if (drawn.get(id) === all) return; // whoever is about to press a button is not disturbed
  drawn.set(id, all);
  $(id).replaceChildren(...list.map((row) => {
    const [texts, actions] = rows(row);
    const buttons = actions.map(([word, act]) => {
      const button = make("button", say(word));
      button.type = "button";
      button.ariaLabel = `${say(word)}: ${texts[0]}`;
      button.onclick = () => admin.do(act());
      return button;
    });
    return make("tr", ...texts.map((text) => make("td", text)), make("td", ...buttons));
  }));
}

/** A field of the question: {name, kind, value, optional}. */
function field({ name, kind = "text", value = "", optional = false }) {
  const input = Array.isArray(kind) ? make("select", ...kind.map((each) => new Option(each))) : make("input");
  if (!Array.isArray(kind)) Object.assign(input, { type: kind === "number" ? "text" : kind, autocomplete: kind === "password" ? "new-password" : "off" });
  if (kind === "number") input.inputMode = "decimal";
  Object.assign(input, { id: `sure-${name}`, required: !optional, value: value || input.value });
  const label = make("label", WORDED.includes(name) ? say(`field_${name}`) : name); // settings are called what they are
  label.htmlFor = input.id;
  const box = make("div", label, input);
  box.className = "field";
  return box;
}

export const admin = new Admin();
