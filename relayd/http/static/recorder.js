import { wavHeader } from "./track.js";

/** Records the microphone as WAV, which every engine can read. */
export class Recorder {
  #context = null;
  #stream = null;
  #node = null;
  #pieces = [];
  #bytes = 0;

  /** `report` is called with the recorded seconds, and with null when `mostBytes` is reached. */
  async start(mostBytes, report) {
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
      if (!pcm || this.#bytes + 2 * pcm.length + 44 > mostBytes) return pcm && report(null);
      this.#pieces.push(Int16Array.from(pcm, (sample) => Math.round(Math.min(1, Math.max(-1, sample)) * 32767)));
      this.#bytes += 2 * pcm.length;
      return report(this.#bytes / 2 / this.#context.sampleRate);
    };
    this.#context.createMediaStreamSource(this.#stream).connect(this.#node);
  }

  async stop() {
    const { port } = this.#node;
    await new Promise((resolve) => {
      port.addEventListener("message", ({ data }) => data.last && resolve());
      port.postMessage("stop");
      setTimeout(resolve, 1000); // a suspended context does not answer
    });
    const rate = this.#context.sampleRate;
    this.#release();
    return new File([wavHeader(rate, 1, this.#bytes), ...this.#pieces], "microphone.wav", { type: "audio/wav" });
  }

  /** Stop the microphone; until then the browser shows that it is recording. */
  #release() {
    this.#stream.getTracks().forEach((track) => track.stop());
    this.#context.close();
  }
}
