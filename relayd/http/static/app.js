// The relay's page, a client of the WebSocket protocol in docs/protocol.md; docs/page.md describes it.
// This module connects its parts, which are separate modules.

import { admin } from "./admin.js";
import { $, announce, firstButton, set } from "./elements.js";
import { build, count, dropForm, enable, formSpace, mark, readInputs, readParams, wordForm } from "./form.js";
import { newId } from "./input.js";
import { Link } from "./link.js";
import { draw as drawLogin, invited, logOut, look, onLogin, session } from "./login.js";
import { encode } from "./msgpack.js";
import { Player } from "./player.js";
import { Request } from "./request.js";
import { Row } from "./row.js";
import { stateOfSpace } from "./space.js";
import { kept } from "./storage.js";
import { Talk } from "./conversation.js";
import { fault, language, say, seconds, setLanguage, size } from "./words.js";

const MAX_ROWS = 50;
/** Room for the other fields of a message that carries params (§4). */
const MARGIN_BYTES = 2048;
/** After a reload, results are read again until the page holds this much. */
const MAX_RESTORED_BYTES = 64 * 1048576;

const rows = new Map(); // id → Row
const player = new Player((track) => {
  for (const row of rows.values()) if (row.request.track === track) row.soon();
  talk.played(track);
});
const talk = new Talk(player);
const link = new Link((what, message) => ({ welcome, down, refused, message: take })[what](message));
let principal = kept("sessionStorage", "principal");
let limits = {}; // from the relay's welcome
let server = "";
let linkState = "";
let resumed = 0; // when a session that had ended was last found to go on
let spaces = []; // the latest list from the relay
let page = []; // spaces of an incomplete answer

// Requests.

function changed(request, what, before) {
  const row = rows.get(request.id);
  if (!row) return;
  row.soon();
  if (what === "track" && (request.fetching ? request.listening : !request.ended)) player.enqueue(request.track);
  if (what === "away") announce(say("said_away"));
  if (what !== "state") return;
  if (request.ended) restore();
  if (request.fetching || request.state === before) return remember();
  if (request.state === "accepted") announce(say("said_accepted"));
  if (request.state === "queued" && before !== "queued") {
    if (request.lost) announce(say("queued_again", { why: fault(request.lost) }));
    announce(say("said_queued", request.place));
  }
  if (request.state === "running") announce(say("said_started"));
  if (request.state === "completed") {
    const s = request.track.length_s;
    announce(s ? say("said_completed", { s: seconds(s) }) : say(request.silent ? "no_audio" : "said_done"));
  }
  if (["failed", "rejected", "lost"].includes(request.state)) {
    announce(say("said_failed", { why: fault(request.failure ?? {}) }));
    if (request.state === "rejected") mark(request);
  }
  if (request.state === "cancelled") announce(say("said_cancelled"));
  remember();
}

function remember() {
  if (principal === null) return;
  const list = [...rows.values()].map(({ request }) => request.row()).slice(-MAX_ROWS);
  kept("sessionStorage", `requests.${principal}`, JSON.stringify(list));
}

function recall() {
  let list = [];
  try {
    list = JSON.parse(kept("sessionStorage", `requests.${principal}`) ?? "[]");
  } catch { /* not written by this page */ }
  for (const row of list) add(new Request(link, row, changed));
}

/** After a reload, read the results again that the relay still keeps: one at a time, the newest first. */
function restore() {
  const requests = [...rows.values()].map(({ request }) => request);
  const held_bytes = requests.reduce((sum, request) => sum + request.held_bytes, 0);
  if (!link.open || held_bytes > MAX_RESTORED_BYTES || requests.some(({ fetching }) => fetching)) return;
  requests.findLast((request) => request.missing)?.fetch(false);
}

function add(request) {
  const row = new Row(request, { player, spaceOf, rateOf, forget });
  rows.set(request.id, row);
  $("list").prepend(row.element);
  const old = [...rows.values()].filter((other) => other.request.ended);
  if (rows.size > MAX_ROWS && old.length) forget(old[0]);
  $("none").hidden = true;
  row.draw();
}

function forget(row) {
  const hadFocus = row.element.contains(document.activeElement);
  const beside = row.element.nextElementSibling ?? row.element.previousElementSibling;
  player.forget(row.request.track);
  rows.delete(row.request.id);
  row.element.remove();
  if (hadFocus) ((beside && firstButton(beside)) ?? $("text")).focus();
  $("none").hidden = rows.size > 0;
  remember();
}

function clear() {
  player.silence();
  rows.clear();
  $("list").replaceChildren();
  $("none").hidden = false;
}

// The connection.

function welcome(message) {
  if (principal !== message.principal) {
    clear();
    principal = message.principal;
    kept("sessionStorage", "principal", principal);
    recall();
  }
  ({ server, limits } = message);
  if (linkState === "off") announce(say("back_link"));
  kept("sessionStorage", "token", $("token").value || kept("sessionStorage", "token"));
  $("token").value = "";
  $("enter").disabled = false;
  page = [];
  const token = kept("sessionStorage", "token");
  admin.begin(token ? token.startsWith("rly_o_") : session.role === "operator", token ?? "");
  showLink("on");
  show("desk");
  talk.begin();
  for (const { request } of rows.values()) if (!request.ended) request.resume();
  restore();
}

function down() {
  if (linkState === "on") announce(say("lost_link"));
  for (const { request } of rows.values()) request.unplugged();
  showLink("off");
  showSpace();
}

/** The relay refused the login: show the login form, with the reason. */
function refused({ code, message }) {
  for (const { request } of rows.values()) request.unplugged();
  if (code !== "connection") kept("sessionStorage", "token", null);
  admin.end();
  $("enter").disabled = false;
  showLink("");
  show("door");
  const over = session.users && session.name !== null;
  const words = code === "unauthenticated" ? say(over ? "session_over" : "bad_token") : code === "connection" ? say("unreachable") : fault({ code, message });
  const shown = $(over ? "user-fault" : "login-fault");
  shown.hidden = false;
  set(shown, words);
  if (!over) $("token").setAttribute("aria-invalid", "true");
  $(session.users ? "user-name" : "token").focus();
  if (!over) return;
  look().then((known) => { // another tab may have logged in again
    if (!known || code !== "unauthenticated" || Date.now() - resumed < 5000) return;
    resumed = Date.now();
    shown.hidden = true;
    resume("");
  });
}

function take(message) {
  if (message.type === "spaces") {
    page.push(...message.spaces);
    if (message.more) return;
    [spaces, page] = [page, []];
    showSpaces();
  } else {
    rows.get(message.request_id)?.request.take(message);
  }
}

function showLink(state) {
  linkState = state;
  const { dataset } = $("link");
  $("link").hidden = !state;
  dataset.is = { on: "good", off: "bad", wait: "wait" }[state] ?? "";
  if (state) set($("link"), say(`link_${state}`, { who: principal }));
  set($("server"), server && say("server", { server }));
}

function show(which) {
  $("door").hidden = which !== "door";
  $("desk").hidden = which !== "desk" || !$("admin").hidden;
  $("leave").hidden = which !== "desk";
}

// The form.

const spaceOf = (name) => spaces.find((space) => space.name === name);
const rateOf = (name) => spaceOf(name)?.format?.sample_rate ?? 24000;

function showSpaces() {
  const select = $("space");
  const wanted = select.value || kept("sessionStorage", "space");
  const lines = spaces.map((space) => [space.name, `${space.name} · ${say(stateOfSpace(space))}`]);
  if (lines.map(([name]) => name).join() === [...select.options].map(({ value }) => value).join()) {
    lines.forEach(([, words], i) => set(select.options[i], words)); // keeps an open menu usable
  } else {
    select.replaceChildren(...lines.map(([name, words]) => new Option(words, name)));
    select.value = (spaceOf(wanted) ?? spaces.find((space) => stateOfSpace(space) === "ready") ?? spaces[0])?.name ?? "";
  }
  showSpace();
}

function showSpace() {
  const space = spaceOf($("space").value);
  const is = link.open ? stateOfSpace(space) : "off";
  const words = is === "off" ? "no_worker" : space ? is : "no_spaces";
  const chip = $("space-state");
  set(chip, say(words));
  chip.dataset.is = is === "ready" ? "good" : "bad";
  set($("space-load"), space || is === "off" ? say(`load_${is}`, space) : "");
  set($("space-about"), space?.description ?? "");
  $("space-about").hidden = !space?.description;
  if (space) build(space);
  enable(is === "ready");
}

let reading = false; // the files of a request about to be submitted
async function submit() {
  if (reading) return;
  const space = formSpace();
  player.unlock(rateOf(space)); // while this counts as a user action
  $("ask-fault").hidden = true;
  for (const element of $("form").querySelectorAll("[aria-invalid]")) element.removeAttribute("aria-invalid");
  let params;
  let files;
  try {
    reading = true;
    params = readParams();
    const most = (limits.max_control_bytes ?? 65536) - MARGIN_BYTES;
    const bytes = encode(params).length;
    if (bytes > most) throw new TypeError(say("too_long", { size: size(bytes), most: size(most) }));
    files = await readInputs();
  } catch (error) {
    set($("ask-fault"), error.message);
    $("ask-fault").hidden = false;
    return;
  } finally {
    reading = false;
  }
  const hasInputs = Object.keys(files).length > 0;
  const row = { id: newId(), space, params, made: Date.now(), hasInputs };
  const request = new Request(link, row, changed);
  request.files = hasInputs ? files : null;
  add(request);
  remember();
  request.resume();
}

// Language and user input.

function speak() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) set(element, say(element.dataset.say));
  const other = language === "zh" ? "en" : "zh";
  Object.assign($("language"), { lang: other, textContent: other === "zh" ? "中文" : "English", ariaLabel: other === "zh" ? "切换到中文" : "Switch to English" });
  showLink(linkState);
  if (principal !== null && spaces.length) showSpaces();
  for (const element of document.querySelectorAll("[data-name]")) element.setAttribute("aria-label", say(element.dataset.name));
  wordForm();
  talk.draw();
  drawLogin();
  admin.word();
  for (const row of rows.values()) row.draw();
}

$("language").onclick = () => {
  setLanguage(language === "zh" ? "en" : "zh");
  speak();
};

$("login").onsubmit = (event) => {
  event.preventDefault();
  $("login-fault").hidden = true;
  $("token").removeAttribute("aria-invalid");
  $("enter").disabled = true;
  link.start($("token").value.trim(), false);
};

$("leave").onclick = async () => {
  link.stop();
  if (!kept("sessionStorage", "token")) await logOut();
  kept("sessionStorage", "token", null);
  kept("sessionStorage", `requests.${principal}`, null);
  kept("sessionStorage", "principal", null);
  admin.end();
  talk.end();
  clear();
  [principal, spaces] = [null, []];
  dropForm();
  showLink("");
  enter();
};

$("space").onchange = () => {
  kept("sessionStorage", "space", $("space").value);
  showSpace();
};

$("ask").onsubmit = (event) => {
  event.preventDefault();
  submit();
};

$("text").oninput = count;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};

addEventListener("pagehide", remember);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => rows.forEach((row) => row.draw()));
// Figures that change with time: processing time, and time until a request starts.
setInterval(() => rows.forEach((row) => row.request.ended || row.soon()), 250);

/** A link with a login, as `relayd demo --talk` prints it: it opens the tab to talk, and vanishes from the address. */
const login = location.hash.match(/^#login=(.+)$/)?.[1];
if (login) {
  history.replaceState(null, "", location.pathname + location.search);
  if (!kept("sessionStorage", "token")) {
    kept("sessionStorage", "token", login);
    kept("sessionStorage", "tab", "talk");
  }
}

/** An invitation: whoever is logged in stays so only if it is not used. */
const invite = location.hash.match(/^#invite=(.+)$/)?.[1];
if (invite) history.replaceState(null, "", location.pathname + location.search);

function enter() {
  show("door");
  $(session.users ? "user-name" : "token").focus();
}

/** Go on with a token, or "" for the cookie of a user. */
function resume(text) {
  showLink("wait");
  show("desk");
  link.start(text, true);
}

onLogin(() => [link, admin].forEach((each) => each.stop()), () => resume(""));
const token = kept("sessionStorage", "token");
if (principal !== null) recall();
speak();
if (token) {
  resume(token);
} else {
  enter(); // at once; whoever types a token meanwhile is not disturbed
  const known = await look();
  if (session.users && !linkState && known && !invite) resume("");
  else if (session.users && !linkState) {
    if (invite) invited(invite);
    enter();
  }
}
