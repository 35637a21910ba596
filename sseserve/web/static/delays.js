// The delay of each event of a subscription: from when the server recorded it to when it arrived in this page.
//
// The server's clock and this one differ by an unknown amount. The fastest event of all subscriptions is taken to
// have needed half of the fastest round trip, as NTP does; the others are compared with it. So the clocks need not
// be synchronized. An event that a subscription missed counts as arrived when a newer one arrives.

export const WINDOW = 30_000; // ms of events that are shown
const LATE = 200; // ms
const MAX_SAMPLES = 3000;

let fastest = Infinity; // ms: the least difference between an arrival, by this clock, and its time by the server's
let roundTrip = Infinity; // ms

/** Note how many ms a request took until its response began. */
export function noteRoundTrip(duration) {
  roundTrip = Math.min(roundTrip, duration);
}

const toDelay = (difference) => difference - fastest + (roundTrip < Infinity ? roundTrip / 2 : 0);

export class Delays {
  late = 0; // events that took longer than LATE
  newest = -Infinity; // the time of the newest event, in ms by the server's clock
  #samples = []; // { at, difference }, in the order of arrival

  /** Note the arrival of an event that the server recorded at `time`, an RFC 3339 text. */
  add(time) {
    const at = Date.parse(time);
    // Unlike Date.now(), this does not jump when the clock is set.
    const difference = performance.timeOrigin + performance.now() - at;
    fastest = Math.min(fastest, difference);
    if (toDelay(difference) > LATE) this.late += 1;
    this.newest = Math.max(this.newest, at);
    this.#samples.push({ at, difference });
    if (this.#samples.length > MAX_SAMPLES) this.#samples.shift();
  }

  /** The events of the WINDOW before `end`: `[{ at, delay }]`, both in ms. */
  recent(end) {
    return this.#samples
      .filter(({ at }) => at > end - WINDOW)
      .map(({ at, difference }) => ({ at, delay: toDelay(difference) }));
  }
}

/** The last, the median and the greatest delay of some samples, in ms; null without any. */
export function figures(samples) {
  if (samples.length === 0) return null;
  const sorted = samples.map(({ delay }) => delay).sort((a, b) => a - b);
  return { last: samples.at(-1).delay, median: sorted[Math.floor((sorted.length - 1) / 2)], worst: sorted.at(-1) };
}
