// Runs on the browser's audio thread, where nothing may block: plays samples, and records the microphone.
/* global AudioWorkletProcessor, registerProcessor, sampleRate */

import { REPORT_FRAMES, Speaker } from "./speaker.js";

/** Plays samples; what it receives and sends is as in `Speaker`. */
class RelayPlayer extends AudioWorkletProcessor {
  constructor({ processorOptions: { channels, at } }) {
    super();
    this.speaker = new Speaker(channels, at, sampleRate, (told) => this.port.postMessage(told));
    this.port.onmessage = ({ data }) => this.speaker.take(data);
  }

  process(_inputs, [output]) {
    return this.speaker.process(output);
  }
}

/** Sends the microphone's samples: {pcm: Float32Array} of one channel, every REPORT_FRAMES. */
class RelayRecorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(REPORT_FRAMES);
    this.filled = 0;
    this.on = true;
    this.port.onmessage = () => {
      this.on = false;
      this.send();
      this.port.postMessage({ last: true });
    };
  }

  process([input]) {
    if (!this.on) return false;
    for (const sample of input[0] ?? []) {
      this.block[this.filled++] = sample;
      if (this.filled === this.block.length) this.send();
    }
    return true;
  }

  send() {
    this.port.postMessage({ pcm: this.block.slice(0, this.filled) });
    this.filled = 0;
  }
}

registerProcessor("relay-player", RelayPlayer);
registerProcessor("relay-recorder", RelayRecorder);
