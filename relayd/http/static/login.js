// The users of the page (docs/users.md): logging in by name and password, registering, changing the password.

import { $, set } from "./elements.js";
import { kept } from "./storage.js";
import { ask } from "./talks.js";
import { fault, say } from "./words.js";

/** What the relay says of its users, and who is logged in by cookie. */
export const session = { users: false, min_password_chars: 8, name: null, role: null, proxied: false };
let invite = "";

/** Ask who is logged in. A relay that does not answer has nobody logged in; the connection says why. */
export async function look() {
  try {
    Object.assign(session, await ask("v1/session"));
  } catch {
    session.name = null;
  }
  draw();
  return session.name !== null;
}

/** A link with an invitation: its code vanishes from the address. */
export function invited(code) {
  invite = code;
  draw();
}

export async function logOut() {
  if (session.name !== null && !session.proxied) await ask("v1/session", { method: "DELETE" }).catch(() => {});
  session.name = null;
  draw();
}

export function draw() {
  const byName = session.users;
  $("user-login").hidden = !byName;
  $("or-token").hidden = !byName;
  $("login-head").hidden = byName;
  $("account").hidden = session.name === null || session.proxied;
  set($("user-title"), say(invite ? "register_title" : "login_title"));
  set($("user-help"), say(invite ? "register_help" : "user_help", { n: session.min_password_chars }));
  set($("user-enter"), say(invite ? "register" : "login"));
  $("user-password").autocomplete = invite ? "new-password" : "current-password";
  set($("account-help"), say("account_help", { n: session.min_password_chars }));
}

/**
 * Logs in, or registers, or changes the password; `done` is called once the cookie is there. A new password ends all
 * sessions and their connections, so `before` is called to close this page's own.
 */
export function onLogin(before, done) {
  $("user-login").onsubmit = async (event) => {
    event.preventDefault();
    const body = { name: $("user-name").value.trim(), password: $("user-password").value };
    const path = invite ? "v1/register" : "v1/session";
    $("user-enter").disabled = true;
    const failure = await tell("user-fault", () => ask(path, { method: "POST", body: invite ? { ...body, invite } : body }));
    $("user-enter").disabled = false;
    $("user-password").value = "";
    if (failure) return $("user-password").focus();
    [invite, $("token").value] = ["", ""];
    kept("sessionStorage", "token", null);
    await look();
    done();
  };
  $("account").onclick = () => {
    for (const id of ["account-fault", "account-done"]) $(id).hidden = true;
    $("account-dialog").showModal();
  };
  $("account-close").onclick = () => $("account-dialog").close();
  $("account-form").onsubmit = async (event) => {
    event.preventDefault();
    $("account-done").hidden = true;
    const body = { password: $("old-password").value, new_password: $("new-password").value };
    before();
    const failure = await tell("account-fault", () => ask("v1/session/password", { method: "PUT", body }));
    done();
    $("account-form").reset();
    $("account-done").hidden = failure;
  };
}

/** Do something, and show why it failed; returns whether it did. */
async function tell(id, act) {
  $(id).hidden = true;
  try {
    await act();
    return false;
  } catch (error) {
    const words = error.code === "connection" ? say("unreachable") : error.code === "unauthenticated" ? say("bad_password") : fault(error);
    set($(id), words);
    $(id).hidden = false;
    return true;
  }
}
