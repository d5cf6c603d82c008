/** Seconds of audio per peak of the waveform. */
export const PEAK_S = 0.02;

export function wavHeader(rate, channels, bytes) {
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, channels, true);
  head.setUint32(24, rate, true);
  head.setUint32(28, rate * channels * 2, true);
  head.setUint16(32, channels * 2, true);
  head.setUint16(34, 16, true);
  text(36, "data");
  head.setUint32(40, bytes, true);
  return head.buffer;
}

/** The received audio of a request. `at` is the next sample frame to play. */
export class Track {
  rate = 0;
  channels = 1;
  pieces = []; // Int16Array
  samples = 0;
  over = false; // the audio is complete
  at = 0;
  peaks = []; // one per PEAK_S, 0..1
  listener = null; // the player, while it plays this track

  get length_s() {
    return this.rate ? this.samples / this.channels / this.rate : 0;
  }

  get at_s() {
    return this.rate ? this.at / this.rate : 0;
  }

  begin({ sample_rate: rate, channels = 1 }) {
    if (this.rate && (rate !== this.rate || channels !== this.channels)) {
      this.cut(0);
      this.listener?.lost(); // another format: the player has to restart
      this.at = 0;
    }
    this.rate = rate;
    this.channels = channels;
  }

  add(pcm) {
    const piece = new Int16Array(pcm.slice().buffer); // pcm may be unaligned in its message
    if (!piece.length) return;
    this.#measure(piece);
    this.pieces.push(piece);
    this.samples += piece.length;
    this.listener?.more(piece);
  }

  #measure(piece) {
    const window = Math.round(this.rate * PEAK_S) * this.channels;
    for (let i = 0; i < piece.length; i++) {
      const slot = Math.floor((this.samples + i) / window);
      const loud = Math.abs(piece[i]) / 32768;
      if (!(this.peaks[slot] >= loud)) this.peaks[slot] = loud;
    }
  }

  /** Discard everything from this byte on; it will be sent again. */
  cut(bytes) {
    const samples = bytes / 2;
    while (this.samples > samples) {
      const piece = this.pieces.pop();
      this.samples -= piece.length;
      if (this.samples < samples) {
        this.pieces.push(piece.subarray(0, samples - this.samples));
        this.samples = samples;
      }
    }
    this.over = false;
    if (this.rate) this.peaks.length = Math.min(this.peaks.length, Math.ceil(samples / this.channels / this.rate / PEAK_S));
    this.listener?.cut(samples / this.channels);
  }

  end() {
    this.over = true;
    this.listener?.over();
  }

  /** The pieces from a sample frame on. */
  *from(frame) {
    let before = frame * this.channels;
    for (const piece of this.pieces) {
      if (before < piece.length) yield piece.subarray(Math.max(0, before));
      before -= piece.length;
    }
  }

  wav() {
    return new Blob([wavHeader(this.rate, this.channels, 2 * this.samples), ...this.pieces], { type: "audio/wav" });
  }
}
