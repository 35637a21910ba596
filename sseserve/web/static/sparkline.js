// The delays of a subscription as a line: the time of an event to the right, its delay upwards on a logarithmic scale.
// All subscriptions have the same scales, so that an event is at the same place in each.

import { WINDOW } from "./delays.js";

const WIDTH = 300; // of the viewBox in index.html
const DECADE = 20; // its height is four: 1 ms to 10 s
const COLUMN = 100; // ms; of the events in it the slowest is drawn

/** Return the paths `{ curve, dots }` of samples that end at `end`. */
export function drawDelays(samples, end) {
  const columns = new Map();
  for (const { at, delay } of samples) {
    const column = Math.ceil((at - end) / COLUMN);
    columns.set(column, Math.max(delay, columns.get(column) ?? 0));
  }
  const points = [...columns].map(([column, delay]) => {
    const x = WIDTH * (1 + (column * COLUMN) / WINDOW);
    const y = DECADE * (4 - Math.log10(Math.min(Math.max(delay, 1), 10_000)));
    return `${x.toFixed(1)} ${y.toFixed(1)}`;
  });
  return {
    curve: points.length > 0 ? `M${points.join("L")}` : "",
    dots: points.map((point) => `M${point}h0`).join(""), // lines of no length, with round ends
  };
}
