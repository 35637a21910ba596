// What the server's records mean: states, cursors, and how figures are written.

const ACTIVE = new Set(["queued", "running", "paused"]);
const ENDED = new Set(["succeeded", "failed", "cancelled", "lost"]);

export const isActive = (state) => ACTIVE.has(state);
export const isEnded = (state) => ENDED.has(state);

/** The name under which a progress record comes as an event. */
export const eventName = (state) => (state === "succeeded" ? "complete" : isEnded(state) ? "error" : "progress");

/** A cursor is `<epoch>-<seq>`; the epoch names one life of a session's log. */
export function readCursor(text) {
  const cut = text.lastIndexOf("-");
  return { epoch: text.slice(0, cut), seq: Number(text.slice(cut + 1)) };
}

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const formatNumber = (value) => number.format(value);

// Rounded down, so that only the end is 100.
export const formatPercent = (value) => `${Math.floor(value)}%`;

export function formatBytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${number.format(count / 1e3)} kB` : `${number.format(count / 1e6)} MB`;
}

export function formatDuration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 90) return `${whole} s`;
  if (whole < 5400) return `${Math.round(whole / 60)} min`;
  if (whole < 129600) return `${Math.round(whole / 3600)} h`;
  return `${Math.round(whole / 86400)} days`;
}

export const formatDelay = (milliseconds) => `${number.format(milliseconds)} ms`;

/** An error may be text or an object of the publisher's making. */
export const errorText = (error) =>
  error === null || error === undefined
    ? ""
    : typeof error === "string"
      ? error
      : String(error.message ?? JSON.stringify(error));
