// Records and cursors as the server sends them.

// The events whose data is a session's record. A publisher's own events may have any data.
const RECORD_EVENTS = new Set(["progress", "complete", "error"]);

export const isRecord = (event) => RECORD_EVENTS.has(event);

/** Parse a cursor, `<epoch>-<seq>`. The epoch changes when a session's log is recreated. */
export function parseCursor(text) {
  const separator = text.lastIndexOf("-");
  return { epoch: text.slice(0, separator), seq: Number(text.slice(separator + 1)) };
}

/** The cursor `count` events before another one; its log may not reach back so far. */
export function cursorBefore(text, count) {
  const { epoch, seq } = parseCursor(text);
  return `${epoch}-${Math.max(0, seq - count)}`;
}

/** A record with what only snapshots have, and what an event leaves out because it is large, from an older one. */
export function mergeRecord(previous, record) {
  const { title, control, created_at, data } = previous ?? {};
  return { title, control, created_at, data, ...record };
}
