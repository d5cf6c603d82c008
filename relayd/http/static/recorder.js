import { wavHeader } from "./track.js";

/** The microphone, as WAV: what every engine can read. */
export class Recorder {
  #context = null;
  #stream = null;
  #node = null;
  #pieces = [];
  #bytes = 0;

  /** `told` is called with the seconds that are recorded, and with null where no more than `mostBytes` are taken. */
  async start(mostBytes, told) {
    this.#stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    this.#context = new AudioContext();
    try {
      await this.#context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    } catch (error) {
      this.#release();
      throw error;
    }
    this.#node = new AudioWorkletNode(this.#context, "relay-recorder", { numberOfOutputs: 0 });
    this.#node.port.onmessage = ({ data: { pcm } }) => {
      if (!pcm || this.#bytes + 2 * pcm.length + 44 > mostBytes) return pcm && told(null);
      this.#pieces.push(Int16Array.from(pcm, (sample) => Math.round(Math.min(1, Math.max(-1, sample)) * 32767)));
      this.#bytes += 2 * pcm.length;
      return told(this.#bytes / 2 / this.#context.sampleRate);
    };
    this.#context.createMediaStreamSource(this.#stream).connect(this.#node);
  }

  async stop() {
    const { port } = this.#node;
    await new Promise((resolve) => {
      port.addEventListener("message", ({ data }) => data.last && resolve());
      port.postMessage("stop");
      setTimeout(resolve, 1000); // a context that sleeps does not answer
    });
    const rate = this.#context.sampleRate;
    this.#release();
    return new File([wavHeader(rate, 1, this.#bytes), ...this.#pieces], "microphone.wav", { type: "audio/wav" });
  }

  /** The browser shows that it listens until then. */
  #release() {
    this.#stream.getTracks().forEach((track) => track.stop());
    this.#context.close();
  }
}
