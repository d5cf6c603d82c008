// The tab "Talk": conversations that the relay keeps, replies as they come, and their speech.

import { Call } from "./call.js";
import { $, announce, make, set } from "./elements.js";
import { Face } from "./face.js";
import { Microphone, openMicrophone } from "./microphone.js";
import { kept } from "./storage.js";
import { ask, bytesOf, events, readSpeech } from "./talks.js";
import { Track } from "./track.js";
import { fault, language, say } from "./words.js";

/** How often turns are read while nothing is streamed: another device may talk … */
const LOOK_MS = 1500;
/** … and while a reply goes on whose connection was lost. */
const CATCH_UP_MS = 400;
const RUNNING = ["waiting", "thinking", "speaking"];

export class Talk {
  #player;
  #face;
  #talks = [];
  #open = null; // id of the open conversation; null: a new one
  #turns = []; // as the relay has them
  #reply = null; // {text, said, track, stopped, ended} of the reply that is streamed here
  #tracks = new Map(); // speech_request → Track
  #heard = null; // {talk, number, track}: the reply that is played
  #fault = null;
  #drawn = "";
  #microphone = null; // while it listens
  #listens = false; // whether this relay understands speech
  #call = null; // while there is one: replies are heard on it
  #calls = false; // whether this relay takes calls

  constructor(player) {
    this.#player = player;
    this.#face = new Face($("face"));
    $("talk-form").onsubmit = (event) => {
      event.preventDefault();
      this.#say();
    };
    $("talk-text").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("talk-form").requestSubmit();
    };
    $("talk-stop").onclick = () => this.stop();
    $("talk-mic").onclick = () => (this.#microphone ? this.#deafen() : this.#listen());
    $("talk-call").onclick = () => (this.#call ? this.#hangUp() : this.#ring());
    $("talk-mute").onclick = () => this.#mute($("talk-mute").ariaPressed !== "true");
    $("talk-new").onclick = () => this.#choose(null);
    $("talk-delete").onclick = () => this.#delete();
    $("talks").onchange = () => this.#choose($("talks").value || null);
    $("tab-talk").onclick = () => this.show("talk");
    $("tab-requests").onclick = () => this.show("requests");
    setInterval(() => this.shown && !document.hidden && !this.#reply && this.#look(), LOOK_MS);
  }

  get shown() {
    return !$("talk").hidden && !$("desk").hidden;
  }

  /** After a login: whether this relay holds conversations for it. */
  async begin() {
    try {
      const { paths } = await ask("openapi.json"); // a question after what is not there would be an error in the console
      if (!("/v1/talks" in paths)) return this.end();
      await this.#list();
    } catch ({ status }) {
      if (status) this.end();
      return;
    }
    $("tabs").hidden = false;
    this.#open ??= kept("sessionStorage", "talk") ?? this.#talks[0]?.id ?? null;
    if (!this.#talks.some(({ id }) => id === this.#open)) this.#open = null;
    this.show(kept("sessionStorage", "tab") ?? "requests");
  }

  /** There is nobody to talk for. */
  end() {
    this.#silence();
    this.#deafen();
    this.#hangUp();
    [this.#talks, this.#turns, this.#open, this.#reply, this.#fault] = [[], [], null, null, null];
    this.#tracks.clear();
    kept("sessionStorage", "talk", null);
    $("tabs").hidden = true;
    this.show("requests");
  }

  show(tab) {
    const talks = tab === "talk";
    $("talk").hidden = !talks;
    $("requests").hidden = talks;
    $("tab-talk").setAttribute("aria-current", String(talks));
    $("tab-requests").setAttribute("aria-current", String(!talks));
    if ($("tabs").hidden) return;
    kept("sessionStorage", "tab", tab);
    if (talks) this.#look();
  }

  /** The player has moved on. */
  played(track) {
    const mine = this.#heard?.track;
    if (!mine || track !== mine) return;
    this.#face.follow(this.#player.plays(mine) ? mine : null);
    $("talk-blocked").hidden = !this.#player.blocked;
    if (this.#player.track !== mine) this.#heard = null; // to its end
    this.draw();
  }

  /** Stop the reply and its sound; the relay keeps what was heard. */
  async stop() {
    const reply = this.#reply;
    const talk = this.#open;
    if (reply) reply.stopped = true;
    this.#silence();
    const running = reply ?? this.#turns.some(({ state }) => RUNNING.includes(state));
    this.draw();
    if ((running || this.#isOnCall) && talk) await this.#try(() => ask(`v1/talks/${talk}/interrupt`, { method: "POST", body: {} }));
  }

  /** End the sound, and tell the relay how much of it was played. */
  #silence() {
    const heard = this.#heard;
    this.#heard = null;
    if (!heard) return;
    this.#player.forget(heard.track);
    this.#face.follow(null);
    if (heard.number !== null) this.#tellHeard(heard.talk, heard.number, heard.track);
  }

  #tellHeard(talk, number, track) {
    this.#try(() => ask(`v1/talks/${talk}/heard`, { method: "POST", body: { number, samples: track.at } }));
  }

  get #isOnCall() {
    return this.#call?.state === "connected";
  }

  /** Call: from then on, the call is heard, and not what this page plays. */
  async #ring() {
    const call = new Call($("talk-video"), (why) => {
      if (call !== this.#call) return;
      if (call.state === "connected" && this.#heard) { // the call plays it, too
        this.#player.forget(this.#heard.track);
        this.#heard = null;
        this.#face.follow(null);
      }
      if (call.state === "ended") this.#call = null;
      if (why) this.#fault = { code: "call", message: say(why) };
      const reply = this.#reply;
      if (why && reply?.track.samples && !reply.stopped && !this.#heard) this.#play(this.#open, null, reply.track);
      this.draw();
    });
    this.#deafen();
    [this.#call, this.#fault] = [call, null];
    this.#mute(false);
    this.draw();
    try {
      await call.start(await this.#talkToSayIn(), await this.#microphoneOfCall());
    } catch (error) {
      if (call === this.#call) this.#fault = { code: error.code ?? "call", message: error.message };
      call.end();
    }
    this.draw();
  }

  #hangUp() {
    this.#call?.end();
  }

  /** The stream that the relay hears on a call; null if it does not, or the user gives none. */
  async #microphoneOfCall() {
    if (!this.#listens || !navigator.mediaDevices) return null;
    try {
      return await openMicrophone();
    } catch (error) {
      this.#fault = { code: "microphone", message: say("no_microphone", { why: error.message }) };
      return null;
    }
  }

  /** On a call with a microphone, the relay hears nothing; on another one, the user does not. */
  #mute(muted) {
    if (this.#call?.speaks) this.#call.muted = muted;
    else $("talk-video").muted = muted;
    $("talk-mute").setAttribute("aria-pressed", String(muted));
  }

  /** Have the microphone heard: what is said there is said here, and interrupts the reply. */
  async #listen() {
    this.#player.unlock(24000); // while this counts as a user action
    const microphone = new Microphone((what, data) => {
      if (microphone !== this.#microphone) return;
      if (what === "began" && (this.#reply || this.#heard)) this.stop();
      if (what === "said") this.#say(data);
      if (what === "ended") [this.#microphone, this.#fault] = [null, data];
      this.draw();
    });
    [this.#microphone, this.#fault] = [microphone, null];
    this.draw();
    try {
      await microphone.start();
      if (this.#microphone !== microphone) microphone.stop(); // it was turned off while the browser asked
    } catch (error) {
      if (this.#microphone === microphone) this.#microphone = null;
      this.#fault = { code: "microphone", message: say("no_microphone", { why: error.message }) };
    }
    this.draw();
  }

  #deafen() {
    this.#microphone?.stop();
    this.#microphone = null;
    this.draw();
  }

  async #say(spoken = null) {
    const text = spoken ?? $("talk-text").value.trim();
    if (!text) return;
    this.#player.unlock(this.#heard?.track.rate || 24000); // while this counts as a user action
    const before = this.#reply;
    if (before) before.stopped = true; // what is said interrupts the reply
    this.#silence();
    if (spoken === null) $("talk-text").value = "";
    this.#fault = null;
    const reply = { text: "", said: text, track: new Track(), stopped: false, ended: false };
    this.#reply = reply;
    this.draw();
    try {
      const talk = await this.#talkToSayIn();
      for await (const [kind, data] of events(`v1/talks/${talk}/say`, { text, interrupt: true })) this.#take(talk, reply, kind, data);
    } catch (error) {
      if (error.status) this.#refused(reply, error);
    }
    if (this.#reply !== reply) return;
    this.#reply = null;
    if (reply.ended) await this.#look();
    else await this.#catchUp(this.#open, reply);
    this.#list().catch(() => {});
  }

  /** It was not said; what was written is not lost. */
  #refused(reply, error) {
    reply.ended = true;
    this.#fault = error;
    if (!$("talk-text").value) $("talk-text").value = reply.said;
    this.draw();
  }

  /** The connection was lost: follow the reply among the turns to its end, and read the rest of its speech. */
  async #catchUp(talk, reply) {
    const { track } = reply;
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, CATCH_UP_MS));
      if (talk !== this.#open || this.#reply || reply.stopped) return track.end();
      let turns;
      try {
        ({ turns } = await ask(`v1/talks/${talk}/turns`));
      } catch (error) {
        if (error.status && error.status < 500 && error.status !== 429) return track.end();
        continue; // the relay is not back
      }
      if (talk !== this.#open || this.#reply) continue;
      this.#turns = turns;
      this.draw();
      const said = turns.findLast(({ role }) => role === "user");
      if (said?.content !== reply.said) return this.#refused(reply, { code: "connection", message: say("talk_lost") });
      const turn = turns.find(({ role, number }) => role === "assistant" && number > said.number);
      if (!turn || RUNNING.includes(turn.state)) continue;
      if (turn.speech_request && !reply.stopped) {
        if (this.#heard?.track === track) this.#heard.number = turn.number;
        else if (!this.#isOnCall) this.#play(talk, turn.number, track);
        this.#tracks.set(turn.speech_request, track);
        await this.#try(() => readSpeech(turn.speech_request, track));
      }
      return track.end();
    }
  }

  async #talkToSayIn() {
    if (this.#open) return this.#open;
    const made = await ask("v1/talks", { method: "POST", body: {} });
    this.#open = made.id;
    kept("sessionStorage", "talk", made.id);
    this.#talks.unshift(made);
    return made.id;
  }

  #take(talk, reply, kind, data) {
    const { track } = reply;
    if (kind === "text") reply.text += data.text;
    if (kind === "speech_started") {
      track.begin(data);
      if (!reply.stopped && this.#reply === reply && !this.#isOnCall) this.#play(talk, null, track);
    }
    if (kind === "speech") track.add(bytesOf(data.pcm));
    if (kind === "extra" && Array.isArray(data.data?.visemes)) (track.visemes ??= []).push(...data.data.visemes);
    if (kind === "speech_ended") {
      track.end();
      if (data.code) this.#fault = data;
    }
    if (kind === "ended" || kind === "failed") reply.ended = true;
    if (kind === "ended") {
      if (!track.over) track.end();
      if (data.speech_request) this.#tracks.set(data.speech_request, track);
      if (this.#heard?.track === track) this.#heard.number = data.number;
      else if (reply.stopped && track.samples && !this.#isOnCall) this.#tellHeard(talk, data.number, track);
      announce(`${say("talk_them")}: ${data.content}`);
    }
    if (kind === "failed") this.#fault = data;
    this.draw();
  }

  #play(talk, number, track) {
    this.#player.silence();
    this.#heard = { talk, number, track };
    this.#player.enqueue(track);
  }

  /** Hear a reply again, from what the relay keeps of it. */
  async #again({ number, speech_request: id }) {
    this.#silence();
    let track = this.#tracks.get(id);
    if (!track) {
      track = new Track();
      this.#player.unlock(24000);
      const done = await this.#try(() => readSpeech(id, track));
      if (done === false) return;
      track.end();
      this.#tracks.set(id, track);
    }
    track.at = 0;
    this.#play(this.#open, number, track);
    this.#heard.number = null; // it was heard before
  }

  async #choose(id) {
    this.#hangUp(); // it is a call of that conversation
    if (this.#reply) this.#reply.stopped = true;
    this.#silence();
    [this.#open, this.#turns, this.#reply, this.#fault] = [id, [], null, null];
    kept("sessionStorage", "talk", id);
    this.draw();
    await this.#look();
    $("talk-text").focus();
  }

  async #delete() {
    const id = this.#open;
    if (!id || !confirm(say("talk_delete_sure"))) return;
    if ((await this.#try(() => ask(`v1/talks/${id}`, { method: "DELETE" }))) === false) return;
    this.#talks = this.#talks.filter((talk) => talk.id !== id);
    this.#choose(this.#talks[0]?.id ?? null);
  }

  async #list() {
    ({ talks: this.#talks, transcribes: this.#listens, calls: this.#calls } = await ask("v1/talks?user="));
    this.draw();
  }

  async #look() {
    const id = this.#open;
    if (!id) return this.draw();
    try {
      const { turns } = await ask(`v1/talks/${id}/turns`);
      if (id === this.#open && !this.#reply) this.#turns = turns;
    } catch (error) {
      if (error.status === 404 && id === this.#open) { // deleted elsewhere
        [this.#open, this.#turns] = [null, []];
        await this.#list().catch(() => {});
      }
    }
    this.draw();
  }

  async #try(work) {
    try {
      return await work();
    } catch (error) {
      if (error.status) this.#fault = error;
      this.draw();
      return false;
    }
  }

  /** Draw what differs from what is there. */
  draw() {
    const reply = this.#reply;
    const rows = this.#turns.filter(({ content, state, role }) => role !== "system" && (content || state === "failed"));
    if (reply) rows.push({ role: "user", content: reply.said, state: "done" }, { role: "assistant", content: reply.text || "…", state: "thinking" });
    const list = $("turns");
    while (list.childElementCount > rows.length) list.lastChild.remove();
    while (list.childElementCount < rows.length) list.append(this.#row());
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    rows.forEach((turn, i) => this.#fill(list.children[i], turn));
    if (atEnd) list.scrollTop = list.scrollHeight;
    $("talk-none").hidden = rows.length > 0;
    const running = reply || this.#turns.some(({ state }) => RUNNING.includes(state));
    $("talk-stop").disabled = !running && !this.#heard && !this.#isOnCall;
    $("talk-call").hidden = !this.#calls || !window.RTCPeerConnection;
    set($("talk-call"), say(!this.#call ? "talk_call" : this.#isOnCall ? "talk_hang_up" : "talk_calling"));
    $("talk-call").setAttribute("aria-pressed", String(Boolean(this.#call)));
    $("talk-mute").hidden = $("talk-video").hidden = !this.#isOnCall;
    $("face").classList.toggle("gone", this.#isOnCall);
    const mic = $("talk-mic");
    mic.hidden = !this.#listens || Boolean(this.#call?.speaks);
    mic.disabled = !navigator.mediaDevices; // browsers give the microphone to secure contexts only
    mic.title = mic.disabled ? say("talk_insecure") : "";
    set(mic, say(this.#microphone ? "talk_deaf" : "talk_listen"));
    mic.classList.toggle("recording", Boolean(this.#microphone));
    mic.setAttribute("aria-pressed", String(Boolean(this.#microphone)));
    $("talk-delete").hidden = !this.#open;
    $("talk-fault").hidden = !this.#fault;
    if (this.#fault) set($("talk-fault"), fault(this.#fault));
    this.#drawList();
  }

  #row() {
    const again = make("button");
    Object.assign(again, { type: "button", className: "plain again" });
    const row = make("li", make("p"), make("small"), again);
    return row;
  }

  #fill(row, turn) {
    const [words, note, again] = row.children;
    const { role, content, state, heard_chars: heard } = turn;
    row.className = `turn ${role}`;
    row.dataset.state = state;
    row.setAttribute("aria-label", say(role === "user" ? "talk_you" : "talk_them"));
    const told = state === "failed" ? fault(turn) : content;
    const cut = heard ?? told.length;
    if (words.dataset.of !== `${cut}:${told}`) { // what was not heard is struck out
      words.dataset.of = `${cut}:${told}`;
      words.replaceChildren(told.slice(0, cut), ...(cut < told.length ? [make("del", told.slice(cut))] : []));
    }
    set(note, state === "interrupted" ? say("talk_interrupted") : state === "waiting" ? say("talk_waiting") : "");
    again.hidden = !turn.speech_request || RUNNING.includes(state);
    set(again, say("talk_again"));
    again.setAttribute("aria-label", say("copy", { verb: say("talk_again"), text: content }));
    again.onclick = () => this.#again(turn);
  }

  #drawList() {
    const shape = JSON.stringify([language, this.#open, this.#talks.map(({ id, touched_at }) => [id, touched_at])]);
    if (shape === this.#drawn) return;
    this.#drawn = shape;
    const title = ({ session, touched_at }) => `${new Date(touched_at).toLocaleString(document.documentElement.lang)} · ${session}`;
    $("talks").replaceChildren(new Option(say("talk_new"), ""), ...this.#talks.map((talk) => new Option(title(talk), talk.id)));
    $("talks").value = this.#open ?? "";
  }
}
