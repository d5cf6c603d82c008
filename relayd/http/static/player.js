/** After so long without a sound the machine's audio may sleep. */
const REST_MS = 2000;

/** Plays one track at a time; those that wait for their turn follow by themselves. */
export class Player {
  track = null; // that plays, or is paused
  paused = false;
  waiting = false; // for more audio
  #turns = [];
  #contexts = new Map(); // sample rate → context. Browsers resample better than we would.
  #node = null;
  #context = null;
  #number = 0; // of the last start
  #changed;

  constructor(changed) {
    this.#changed = changed;
  }

  get able() {
    return typeof AudioWorkletNode === "function";
  }

  /** The browser lets nothing sound until the person has done something on the page. */
  get blocked() {
    return Boolean(this.#node) && this.#context.state !== "running";
  }

  plays(track) {
    return this.track === track && !this.paused && !this.blocked;
  }

  /** To be called while the person does something, so that what comes later may sound. */
  unlock(rate) {
    if (this.able) this.#open(rate).context.resume();
  }

  #open(rate) {
    let opened = this.#contexts.get(rate);
    if (!opened) {
      const context = new AudioContext({ sampleRate: rate, latencyHint: "playback" });
      context.onstatechange = () => this.#changed(this.track);
      opened = { context, ready: context.audioWorklet.addModule(new URL("worklet.js", import.meta.url)) };
      this.#contexts.set(rate, opened);
    }
    return opened;
  }

  /** Let it sound when its turn comes. */
  enqueue(track) {
    if (!this.able || this.track === track || this.#turns.includes(track)) return;
    if (this.track && !this.paused) this.#turns.push(track);
    else this.play(track);
  }

  async play(track) {
    if (track.over && track.at * track.channels >= track.samples) track.at = 0;
    this.#let();
    this.#turns = this.#turns.filter((other) => other !== track);
    [this.track, this.paused, this.waiting] = [track, false, true];
    const mine = ++this.#number;
    const { context, ready } = this.#open(track.rate);
    context.resume();
    this.#changed(track);
    await ready;
    if (mine !== this.#number) return;
    const { channels, at } = track;
    const node = new AudioWorkletNode(context, "relay-player", {
      numberOfInputs: 0, outputChannelCount: [channels], processorOptions: { channels, at },
    });
    node.connect(context.destination);
    node.port.onmessage = ({ data }) => this.#told(node, data);
    [this.#node, this.#context] = [node, context];
    context.resume(); // it may have gone to rest meanwhile
    track.listener = this;
    for (const piece of track.from(at)) this.more(piece);
    if (track.over) this.over();
    this.#changed(track);
  }

  #told(node, { at, waiting, ended }) {
    if (node !== this.#node) return;
    this.track.at = at;
    this.waiting = waiting;
    this.#changed(this.track);
    if (ended) this.stop();
  }

  toggle(track) {
    if (this.track === track && this.blocked) this.#context.resume();
    else if (this.plays(track)) this.pause();
    else this.play(track);
  }

  pause() {
    this.#let();
    this.paused = true;
    this.#changed(this.track);
  }

  seek(track, at) {
    track.at = Math.round(Math.min(track.length_s, Math.max(0, at)) * track.rate);
    if (this.track === track && !this.paused) this.play(track);
    else this.#changed(track);
  }

  /** The track is at its end, or is gone; the next one's turn. */
  stop() {
    const { track } = this;
    this.#let();
    this.track = null;
    this.#changed(track);
    const next = this.#turns.shift();
    if (next) this.play(next);
  }

  forget(track) {
    this.#turns = this.#turns.filter((other) => other !== track);
    if (this.track === track) this.stop();
  }

  silence() {
    this.#turns = [];
    if (this.track) this.stop();
  }

  #let() {
    this.#number++;
    this.#node?.port.postMessage({ stop: true });
    this.#node = null;
    const context = this.#context;
    setTimeout(() => (this.#node && this.#context === context) || context?.suspend(), REST_MS);
    if (this.track) this.track.listener = null;
  }

  // What a track tells the one who plays it.

  more(piece) {
    const copy = piece.slice();
    this.#node?.port.postMessage({ pcm: copy }, [copy.buffer]);
  }

  cut(frame) {
    this.#node?.port.postMessage({ cut: frame });
  }

  over() {
    this.#node?.port.postMessage({ over: true });
  }

  lost() {
    this.stop();
  }
}
