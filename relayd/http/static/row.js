import { $, firstButton, make, set } from "./elements.js";
import { isSeen } from "./request.js";
import { stateOfSpace } from "./space.js";
import { PEAK_S } from "./track.js";
import { clock, fault, say, seconds } from "./words.js";

/** How far an arrow key moves in the audio, in seconds. */
const STEP_S = 2;
/** SVG paths in a square of 24. */
const TRIANGLE = "M9.5 5.5 19 12l-9.5 6.5z"; // play
const BARS = "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z"; // pause

/** A request in the list. `spaceOf` returns the row of a space, `rateOf` its sample rate; `forget` removes a row. */
export class Row {
  #player;
  #spaceOf;
  #drawn = 0;
  #urls = [];
  #files = []; // those that are shown, by their first parts
  #seen = []; // their URLs

  constructor(request, { player, spaceOf, rateOf, forget }) {
    this.request = request;
    this.#player = player;
    this.#spaceOf = spaceOf;
    this.element = $("request").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.element.querySelector(name);
    const { track } = request;
    this.part(".play").onclick = () => player.toggle(track);
    this.part("input").oninput = ({ target }) => player.seek(track, Number(target.value));
    this.part("input").onkeydown = (event) => this.#step(event);
    this.part(".cancel").onclick = () => request.cancel();
    this.part(".load").onclick = () => {
      player.unlock(track.rate || rateOf(request.space));
      request.fetch(true);
    };
    this.part(".forget").onclick = () => forget(this);
    this.part(".download").onclick = () => this.#save();
    new ResizeObserver(() => this.soon()).observe(this.part("canvas"));
  }

  /** Move by STEP_S: the browser's own step is too small. */
  #step(event) {
    const back = ["ArrowLeft", "ArrowDown"].includes(event.key);
    if (!back && !["ArrowRight", "ArrowUp"].includes(event.key)) return;
    event.preventDefault();
    const { track } = this.request;
    this.#player.seek(track, track.at_s + (back ? -STEP_S : STEP_S));
  }

  /** Create the file only when the user downloads it. */
  #save() {
    this.#urls.forEach((url) => URL.revokeObjectURL(url));
    const { track, id } = this.request;
    let saved = this.request.madeFiles().map(({ kind, parts }) => [new Blob(parts), suffix(kind)]);
    if (track.samples) saved = [[track.wav(), "wav"]];
    else if (!saved.length) saved = [[new Blob([this.request.shown()], { type: "text/plain" }), "txt"]];
    this.#urls = saved.map(([blob]) => URL.createObjectURL(blob));
    this.#urls.forEach((href, i) => {
      const number = saved.length > 1 ? `-${i + 1}` : "";
      Object.assign(make("a"), { href, download: `relay-${id.slice(0, 8)}${number}.${saved[i][1]}` }).click();
    });
  }

  /** Show images, sound and videos. */
  #show(files) {
    const seen = files.filter(({ kind }) => isSeen(kind));
    const firsts = seen.map(({ parts }) => parts[0]);
    if (this.#files.some((part, i) => part !== firsts[i])) {
      this.#seen.forEach((url) => URL.revokeObjectURL(url)); // the output starts again
      this.part(".media").replaceChildren();
      [this.#files, this.#seen] = [[], []];
    }
    for (const { kind, parts } of seen.slice(this.#files.length)) {
      const url = URL.createObjectURL(new Blob(parts, { type: kind }));
      const element = make({ image: "img", audio: "audio", video: "video" }[kind.split("/")[0]]);
      Object.assign(element, { src: url, controls: true, alt: say("output"), ariaLabel: say("output") });
      element.onerror = () => element.replaceWith(make("p", `[${kind}]`)); // a kind that this browser cannot show
      this.part(".media").append(element);
      this.#seen.push(url);
    }
    this.#files = firsts;
    this.part(".media").hidden = !firsts.length;
  }

  /** Schedule one redraw for all changes until then. */
  soon() {
    if (this.#drawn) return;
    this.#drawn = setTimeout(() => {
      this.#drawn = 0;
      this.draw();
    }, 30);
  }

  draw() {
    const { request } = this;
    const { track } = request;
    const [is, words] = stateOf(request);
    const state = this.part(".state");
    set(state, words);
    state.dataset.is = is;
    this.element.dataset.state = request.state;
    this.element.dataset.id = request.id;
    set(this.part(".said"), request.title.slice(0, 400));
    set(this.part("code"), `${request.space} · ${request.id}`);
    this.element.classList.toggle("now", this.#player.plays(track));

    const part = request.state === "sending" && request.hasInputs ? request.sent : request.progress?.fraction;
    this.part(".bar").hidden = !(part > 0 && part < 1) || request.ended;
    this.part(".bar i").style.width = `${100 * (part || 0)}%`;

    const files = request.madeFiles();
    this.#show(files);
    const text = request.shown();
    this.part(".output").hidden = !text;
    set(this.part(".output"), text);
    this.part(".output").ariaLabel = say("output");
    this.#listen();
    this.#figures();

    const about = whyOf(request, this.#spaceOf(request.space));
    this.part(".why").hidden = !about;
    set(this.part(".why"), about);

    const wrong = this.part(".wrong");
    const why = request.gone ? say("not_kept") : request.failure && !(request.cancelling && request.state === "cancelled") ? fault(request.failure) : "";
    wrong.hidden = !why || (request.state === "cancelled" && request.cancelling);
    set(wrong, why + (why && track.samples && !request.gone ? ` ${say("heard")}` : ""));

    const name = request.title.slice(0, 40);
    const verbs = { cancel: !request.ended && !request.fetching, forget: request.ended, download: track.samples > 0 || Boolean(text) || files.length > 0,
      load: request.ended && request.state === "completed" && !track.samples && !text && !files.length && !request.gone };
    for (const [verb, there] of Object.entries(verbs)) {
      const button = this.part(`.${verb}`);
      const wasHere = document.activeElement === button;
      button.hidden = !there;
      set(button, say(verb));
      button.ariaLabel = say("copy", { verb: say(verb), text: name });
      if (wasHere && !there) firstButton(this.element)?.focus(); // else the keyboard focus is lost
    }
    this.part(".cancel").disabled = request.cancelling;
  }

  #listen() {
    const { track } = this.request;
    this.part(".listen").hidden = !track.samples;
    if (!track.samples) return;
    const plays = this.#player.plays(track);
    const button = this.part(".play");
    button.ariaLabel = say("copy", { verb: say(plays ? "pause" : "play"), text: this.request.title.slice(0, 40) });
    this.part(".play path").setAttribute("d", plays ? BARS : TRIANGLE);
    const all = track.length_s;
    const at = Math.min(track.at_s, all);
    const slider = this.part("input");
    slider.max = all.toFixed(1);
    slider.value = at;
    slider.ariaLabel = say("seek");
    slider.setAttribute("aria-valuetext", say("place", { at: seconds(at), all: seconds(all) }));
    const waits = plays && this.#player.waiting && at > 0 && !track.over;
    const blocked = this.#player.track === track && this.#player.blocked && !this.#player.paused;
    set(this.part(".clock"), waits ? say("gathering") : `${clock(at)} / ${clock(all)}`);
    this.part(".hint").hidden = !blocked;
    set(this.part(".hint"), blocked ? say("blocked") : "");
    this.#wave(at, all);
  }

  /** Draw one bar per 5 pixels; a running request leaves room for further audio. */
  #wave(at, all) {
    const canvas = this.part("canvas");
    const { width, height } = canvas.getBoundingClientRect();
    if (!width) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.element);
    const [played, ahead] = [style.getPropertyValue("--accent"), style.getPropertyValue("--wave")];
    const { peaks, over } = this.request.track;
    const bars = Math.floor(width / 5);
    const span = over ? all : Math.max(6, all * 1.15); // seconds across the whole width
    for (let bar = 0; bar < bars; bar++) {
      const from = (bar / bars) * span;
      if (from >= all) break;
      const until = Math.min(peaks.length, Math.max(Math.floor(from / PEAK_S) + 1, Math.floor((((bar + 1) / bars) * span) / PEAK_S)));
      let sum = 0; // the mean of peaks: the maximum is nearly the same everywhere
      for (let i = Math.floor(from / PEAK_S); i < until; i++) sum += peaks[i] ?? 0;
      const loud = sum / Math.max(1, until - Math.floor(from / PEAK_S));
      const tall = Math.max(3, Math.sqrt(loud) * (height - 6)); // closer to perceived loudness, so that soft speech is visible
      pen.fillStyle = from < at ? played : ahead;
      pen.beginPath();
      pen.roundRect(bar * 5, (height - tall) / 2, 3, tall, 1.5);
      pen.fill();
    }
  }

  #figures() {
    const { request } = this;
    const { result, track } = request;
    const figures = [];
    const run = result?.run_s ?? request.running_s;
    const length = track.length_s || result?.duration_s || 0;
    if (request.first_s !== null) figures.push(["first", seconds(request.first_s)]);
    if (run !== null) figures.push(["run", seconds(run)]);
    if (length) figures.push(["length", seconds(length)]);
    if (run !== null && length > 0.3) figures.push(["rtf", (run / length).toFixed(run < length / 10 ? 3 : 2)]);
    const list = this.part(".figures");
    while (list.childElementCount > figures.length) list.lastChild.remove();
    figures.forEach(([name, value], i) => {
      if (!list.children[i]) list.append(make("div", make("dt"), make("dd")));
      list.children[i].dataset.name = name;
      set(list.children[i].firstChild, say(name));
      set(list.children[i].lastChild, value);
    });
    list.hidden = !figures.length;
  }
}

/** The suffix of a file of this kind. */
function suffix(kind) {
  const known = { "application/octet-stream": "bin", "audio/mpeg": "mp3", "audio/mp4": "m4a", "image/jpeg": "jpg", "text/plain": "txt", "video/quicktime": "mov" };
  return known[kind] ?? kind.split("/")[1].replace(/^x-|\+.*/g, "").replace(/[^a-z0-9]/g, "").slice(0, 8);
}

/** [colour, text] for the state of a request. */
function stateOf(request) {
  const { state, place, progress, retry, away } = request;
  const left = (until) => seconds(Math.max(0, Math.ceil((until - Date.now()) / 1000)), 0);
  if (!request.ended && !request.fetching && request.unheard) return ["bad", say("unheard")];
  if (!request.ended && request.cancelling) return ["wait", say("stopping")];
  if (state === "completed") return ["good", say("completed")];
  if (["failed", "rejected", "lost"].includes(state)) return ["bad", say(state)];
  if (state === "queued" && !place) return ["wait", say("accepted")]; // the position is not known yet
  if (state === "queued") {
    const { position, of, eta_s } = place;
    if (eta_s === undefined || eta_s === null) return ["wait", say("queued", { position, of })];
    const left_s = eta_s - (Date.now() - place.at) / 1000;
    if (left_s < 1) return ["wait", say("queued_soon", { position, of })];
    return ["wait", say("queued_eta", { position, of, eta: seconds(left_s, 0) })];
  }
  if (state === "sending" && request.hasInputs && request.sent > 0) return ["", say("sending_part", { percent: Math.round(100 * request.sent) })];
  if (state === "again" && retry) return ["wait", say("again_in", { s: left(retry.at) })];
  if (state === "running" && away) return ["bad", say("away", { s: left(away.until) })];
  if (state === "running") return ["", say(["loading", "encoding"].includes(progress?.state) ? progress.state : "generating")];
  return ["", say(state)];
}

/** Why a request waits, or has nothing to show; empty if there is nothing to say. */
function whyOf(request, space) {
  const { state, lost, retry, silent } = request;
  if (silent && state === "completed") return say("no_audio");
  if (request.ended || request.unheard) return "";
  if (state === "again" && retry) return fault(retry.failure);
  if (state !== "queued") return "";
  const is = stateOfSpace(space);
  return [lost && say("queued_again", { why: fault(lost) }), is !== "ready" && say(`waits_${is}`)].filter(Boolean).join(" ");
}
