// What plays the samples of a request: on the browser's audio thread, or where there is none for pages, on this one.

/** Seconds of audio buffered before playback starts, and the maximum buffered after an underrun. */
const FIRST_S = 0.15;
const MOST_S = 2.4;
/** Seconds of fading in after a pause, which avoids clicks; fading out multiplies by FADE per sample. */
const RISE_S = 0.004;
const FADE = 0.98;
/** Frames between position reports, about 20 per second. */
export const REPORT_FRAMES = 2048;

/**
 * Plays pieces of interleaved 16-bit samples without gaps, and is silent during an underrun; after each underrun it
 * buffers more before it continues.
 *
 * It takes: {pcm: Int16Array}, {cut: frame} (everything from there on is void and sent again), {over: true},
 * {stop: true}; and tells: {at: frame, waiting: bool, ended: bool, pauses: count}.
 */
export class Speaker {
  constructor(channels, at, rate, tell) {
    this.channels = channels;
    this.rate = rate;
    this.tell = tell;
    this.pieces = [];
    this.offset = 0; // played samples of the first piece
    this.at = at; // the next frame to play …
    this.next = at; // … and the next frame to receive
    this.need = FIRST_S * this.rate;
    this.playing = false;
    this.over = false;
    this.stopped = false;
    this.pauses = 0;
    this.gain = 0;
    this.last = new Float32Array(channels); // last output, to fade out from
    this.unreported = 0;
  }

  take({ pcm, cut, over, stop }) {
    if (pcm) this.append(pcm);
    if (cut !== undefined) this.cut(cut);
    if (over) this.over = true;
    if (stop) this.stopped = true;
  }

  append(pcm) {
    const frames = pcm.length / this.channels;
    const played = Math.min(frames, Math.max(0, this.at - this.next)); // sent again, and already played
    if (played < frames) this.pieces.push(pcm.subarray(played * this.channels));
    this.next += frames;
  }

  cut(frame) {
    let surplus = (this.next - Math.max(frame, this.at)) * this.channels;
    this.next = frame;
    this.over = false;
    while (surplus > 0 && this.pieces.length) {
      const piece = this.pieces.pop();
      const left = piece.length - (this.pieces.length ? 0 : this.offset);
      if (left > surplus) this.pieces.push(piece.subarray(0, piece.length - surplus));
      surplus -= left;
    }
    if (!this.pieces.length) this.offset = 0;
  }

  ready() {
    return Math.max(0, this.next - this.at);
  }

  /** Fill the next frames, one array a channel; false after the last of them. */
  process(output) {
    if (this.stopped && this.faded()) return false;
    if (!this.playing && !this.stopped && this.ready() > 0 && (this.over || this.ready() >= this.need)) {
      this.playing = true;
      this.gain = 0;
    }
    const frames = output[0].length;
    const rise = 1 / (RISE_S * this.rate);
    for (let i = 0; i < frames; i++) {
      const sounds = this.playing && !this.stopped && this.pieces.length > 0;
      if (sounds) this.gain = Math.min(1, this.gain + rise);
      for (let channel = 0; channel < this.channels; channel++) {
        this.last[channel] = sounds
          ? (this.pieces[0][this.offset + channel] / 32768) * this.gain
          : this.last[channel] * FADE;
        output[channel][i] = this.last[channel];
      }
      if (sounds) this.step();
    }
    const dry = this.playing && this.pieces.length === 0;
    if (dry && !this.over) {
      this.pauses++;
      this.need = Math.min(MOST_S * this.rate, this.need * 2);
    }
    if (dry) this.playing = false;
    this.unreported += frames;
    const ended = this.over && this.pieces.length === 0 && this.faded();
    if (dry || ended || this.unreported >= REPORT_FRAMES) this.report(ended);
    return !ended;
  }

  step() {
    this.at++;
    this.offset += this.channels;
    if (this.offset >= this.pieces[0].length) {
      this.pieces.shift();
      this.offset = 0;
    }
  }

  faded() {
    return this.last.every((sample) => Math.abs(sample) < 1e-4);
  }

  report(ended) {
    this.unreported = 0;
    this.tell({ at: this.at, waiting: !this.playing && !ended, ended, pauses: this.pauses });
  }
}
