import { Speaker } from "./speaker.js";

/** The audio context is suspended after this time without sound. */
const REST_MS = 2000;
/** Frames that the page's own thread fills at once: 0.17 s at 24 kHz. */
const FILL_FRAMES = 4096;

/** A node that plays on the audio thread; on this thread over plain HTTP from another machine, where browsers have no AudioWorklet. */
function speakerNode(context, channels, at) {
  if (context.audioWorklet) {
    return new AudioWorkletNode(context, "relay-player", {
      numberOfInputs: 0, outputChannelCount: [channels], processorOptions: { channels, at },
    });
  }
  const node = context.createScriptProcessor(FILL_FRAMES, 0, channels);
  const speaker = new Speaker(channels, at, context.sampleRate, (data) => node.port.onmessage({ data }));
  node.port = { onmessage: () => {}, postMessage: (message) => speaker.take(message) };
  node.onaudioprocess = ({ outputBuffer }) => {
    const output = Array.from({ length: channels }, (_, channel) => outputBuffer.getChannelData(channel));
    if (speaker.process(output)) return;
    node.onaudioprocess = null;
    node.disconnect();
  };
  return node;
}

/** Plays one track at a time; queued tracks follow automatically. */
export class Player {
  track = null; // the playing or paused track
  paused = false;
  waiting = false; // for more audio
  #turns = [];
  #contexts = new Map(); // sample rate → context; the browser resamples
  #node = null;
  #context = null;
  #number = 0; // incremented by each start and stop
  #changed;

  constructor(changed) {
    this.#changed = changed;
  }

  /** The browser blocks sound until the user interacts with the page. */
  get blocked() {
    return Boolean(this.#node) && this.#context.state !== "running";
  }

  plays(track) {
    return this.track === track && !this.paused && !this.blocked;
  }

  /** Must be called in a user action, so that later audio may play. */
  unlock(rate) {
    this.#open(rate).context.resume();
  }

  #open(rate) {
    let opened = this.#contexts.get(rate);
    if (!opened) {
      const context = new AudioContext({ sampleRate: rate, latencyHint: "playback" });
      context.onstatechange = () => this.#changed(this.track);
      opened = { context, ready: context.audioWorklet?.addModule(new URL("worklet.js", import.meta.url)) };
      this.#contexts.set(rate, opened);
    }
    return opened;
  }

  /** Play the track now, or after the playing one. */
  enqueue(track) {
    if (this.track === track || this.#turns.includes(track)) return;
    if (this.track && !this.paused) this.#turns.push(track);
    else this.play(track);
  }

  async play(track) {
    if (track.over && track.at * track.channels >= track.samples) track.at = 0;
    this.#detach();
    this.#turns = this.#turns.filter((other) => other !== track);
    [this.track, this.paused, this.waiting] = [track, false, true];
    const mine = ++this.#number;
    const { context, ready } = this.#open(track.rate);
    context.resume();
    this.#changed(track);
    await ready;
    if (mine !== this.#number) return;
    const { channels, at } = track;
    const node = speakerNode(context, channels, at);
    node.connect(context.destination);
    node.port.onmessage = ({ data }) => this.#onReport(node, data);
    [this.#node, this.#context] = [node, context];
    context.resume(); // it may have been suspended meanwhile
    track.listener = this;
    for (const piece of track.from(at)) this.more(piece);
    if (track.over) this.over();
    this.#changed(track);
  }

  #onReport(node, { at, waiting, ended }) {
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
    this.#detach();
    this.paused = true;
    this.#changed(this.track);
  }

  seek(track, at) {
    track.at = Math.round(Math.min(track.length_s, Math.max(0, at)) * track.rate);
    if (this.track === track && !this.paused) this.play(track);
    else this.#changed(track);
  }

  /** End the current track, and play the next one. */
  stop() {
    const { track } = this;
    this.#detach();
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

  #detach() {
    this.#number++;
    this.#node?.port.postMessage({ stop: true });
    this.#node = null;
    const context = this.#context;
    const number = this.#number;
    // A later stop of the same context has a rest of its own: an earlier one would cut off how its sound fades.
    setTimeout(() => (number !== this.#number && this.#context === context) || context?.suspend(), REST_MS);
    if (this.track) this.track.listener = null;
  }

  // Called by the track that is playing.

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
