// Session records and cursors as the server sends them.

const ACTIVE = new Set(["queued", "running", "paused"]);
const ENDED = new Set(["succeeded", "failed", "cancelled", "lost"]);

export const isActive = (state) => ACTIVE.has(state);
export const isEnded = (state) => ENDED.has(state);

/** The event type under which the server sends a progress record in this state. */
export const eventType = (state) => (state === "succeeded" ? "complete" : isEnded(state) ? "error" : "progress");

/** Parse a cursor, `<epoch>-<seq>`. The epoch changes when a session's log is recreated. */
export function parseCursor(text) {
  const separator = text.lastIndexOf("-");
  return { epoch: text.slice(0, separator), seq: Number(text.slice(separator + 1)) };
}

/** The text of a record's `error`, which publishers may set to a string or to any JSON value. */
export const errorText = (error) =>
  error === null || error === undefined
    ? ""
    : typeof error === "string"
      ? error
      : String(error.message ?? JSON.stringify(error));
