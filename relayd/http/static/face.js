// A drawn face whose mouth follows what is played.

import { PEAK_S } from "./track.js";

/** Loudness of a mouth that is wide open. */
const LOUD = 0.45;
const WIDTH = 17;
const HEIGHT = 15;

/** How the mouth stands at a time, {opening, width} of 0..1: by the visemes that came as data, else by loudness. */
export function mouthAt(track, at_s) {
  const shape = track.visemes?.findLast(({ t }) => t <= at_s);
  if (shape) return { opening: shape.opening ?? 0, width: shape.width ?? 0.5 };
  const loud = Math.min(1, (track.peaks[Math.floor(at_s / PEAK_S)] ?? 0) / LOUD);
  return { opening: loud, width: 0.75 - 0.35 * loud };
}

export class Face {
  #mouth;
  #opening = 0;
  #frame = 0;
  #track = null;
  #told = { at_s: 0, now: 0 };

  constructor(svg) {
    this.#mouth = svg.querySelector(".mouth");
    this.#draw({ opening: 0, width: 0.75 });
  }

  /** The player's position has changed; `track` is null if nothing plays. */
  follow(track) {
    if (track !== this.#track || track?.at_s !== this.#told.at_s) this.#told = { at_s: track?.at_s ?? 0, now: performance.now() };
    this.#track = track;
    if (track && !this.#frame) this.#frame = requestAnimationFrame(() => this.#step());
  }

  #step() {
    const track = this.#track;
    // The player tells where it is some 10 to 20 times a second.
    const since_s = Math.min(0.2, (performance.now() - this.#told.now) / 1000);
    const wanted = track ? mouthAt(track, this.#told.at_s + since_s) : { opening: 0, width: 0.75 };
    this.#opening += (wanted.opening - this.#opening) * 0.5; // lips have a mass
    this.#draw({ ...wanted, opening: this.#opening });
    this.#frame = track || this.#opening > 0.01 ? requestAnimationFrame(() => this.#step()) : 0;
  }

  #draw({ opening, width }) {
    this.#mouth.setAttribute("ry", (1 + HEIGHT * opening).toFixed(2));
    this.#mouth.setAttribute("rx", (WIDTH * (0.4 + 0.6 * width)).toFixed(2));
    this.#mouth.dataset.opening = opening.toFixed(2);
  }
}
