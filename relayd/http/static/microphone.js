// Listens to the user: the microphone's samples go to the relay's Realtime API, which tells what was said.

import { kept } from "./storage.js";

/** What the API takes: 24,000 samples a second, one channel. */
const RATE = 24000;
/** Replies are asked for elsewhere: here, the relay only listens. */
const SESSION = {
  type: "realtime",
  output_modalities: ["text"],
  audio: { input: { turn_detection: { type: "server_vad", create_response: false, interrupt_response: false } } },
};

/** Ask for the microphone, without the echo: a reply that is heard would interrupt itself. */
export function openMicrophone() {
  return navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
}

/** The microphone; `tell` is called with "began" when the user speaks, "said" and the words, and "ended" and a fault or null. */
export class Microphone {
  #tell;
  #context = null;
  #stream = null;
  #socket = null;
  #resample = null;

  constructor(tell) {
    this.#tell = tell;
  }

  /** Throws if the browser gives no microphone. */
  async start() {
    this.#stream = await openMicrophone();
    this.#context = new AudioContext();
    try {
      await this.#context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    } catch (error) {
      this.stop();
      throw error;
    }
    this.#resample = resampler(this.#context.sampleRate);
    const url = new URL("v1/realtime", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const token = kept("sessionStorage", "token"); // else the cookie of a user goes along
    const socket = new WebSocket(url, ["realtime", ...(token ? [`openai-insecure-api-key.${token}`] : [])]);
    this.#socket = socket;
    socket.onopen = () => socket.send(JSON.stringify({ type: "session.update", session: SESSION }));
    socket.onmessage = ({ data }) => socket === this.#socket && this.#take(JSON.parse(data));
    socket.onclose = () => socket === this.#socket && this.#end({ code: "connection" });
    const node = new AudioWorkletNode(this.#context, "relay-recorder", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data: { pcm } }) => pcm && this.#send(pcm);
    this.#context.createMediaStreamSource(this.#stream).connect(node);
  }

  stop() {
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    this.#stream?.getTracks().forEach((track) => track.stop()); // until then the browser shows that it listens
    if (this.#context?.state !== "closed") this.#context?.close();
  }

  #send(pcm) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    const samples = Int16Array.from(this.#resample(pcm), (sample) => Math.round(Math.min(1, Math.max(-1, sample)) * 32767));
    const audio = btoa(String.fromCharCode(...new Uint8Array(samples.buffer)));
    this.#socket.send(JSON.stringify({ type: "input_audio_buffer.append", audio }));
  }

  #take(event) {
    const { type } = event;
    if (type === "input_audio_buffer.speech_started") this.#tell("began");
    if (type === "conversation.item.input_audio_transcription.completed" && event.transcript) this.#tell("said", event.transcript);
    if (type === "conversation.item.input_audio_transcription.failed" || type === "error") this.#end(event.error);
  }

  #end(fault) {
    this.stop();
    this.#tell("ended", fault);
  }
}

/** Converts pieces of sound to RATE: each sample is the mean of those that fall into its time. */
export function resampler(from) {
  let held = [];
  let dropped = 0; // samples before those in `held`
  let made = 0;
  const startOf = (sample) => Math.floor((sample * from) / RATE) - dropped;
  return (piece) => {
    held = held.concat([...piece]);
    const pieces = [];
    for (;;) {
      const first = startOf(made);
      const last = Math.max(first + 1, startOf(made + 1));
      if (last > held.length) break;
      let sum = 0;
      for (let i = first; i < last; i++) sum += held[i];
      pieces.push(sum / (last - first));
      made++;
    }
    const done = Math.min(startOf(made), held.length);
    held = held.slice(done);
    dropped += done;
    return pieces;
  };
}
