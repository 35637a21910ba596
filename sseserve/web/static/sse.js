// Server-Sent Events transport. It uses the browser's EventSource, which reconnects by itself.

import { byteLength, sessionPath } from "./api.js";

// An EventSource dispatches only event types that have a listener.
const EVENT_TYPES = [
  "message", "progress", "complete", "error", "warning", "control", "resume", "stalled", "overflow", "deleted",
];

// Sent to one client only and not part of the log, so they have no id.
const UNLOGGED_TYPES = new Set(["resume", "overflow", "deleted"]);

export const title = "Server-Sent Events";
export const bytesTooltip = "Size of each event on the wire, reconstructed from its fields; comments are not counted";

export function connect(id, cursor, handlers) {
  const source = new EventSource(sessionPath(id, "/status/stream", { last_event_id: cursor }));

  function onEvent(event) {
    if (event.data === undefined) {
      // EventSource's own "error" event, which has no data: the connection was lost.
      if (source.readyState === EventSource.CLOSED) handlers.closed("the server refused or ended the stream");
      else handlers.interrupted("connection lost; the browser is reconnecting");
      return;
    }
    // For an event without an id, `lastEventId` is that of the previous event.
    const eventId = UNLOGGED_TYPES.has(event.type) ? null : event.lastEventId || null;
    const idLine = eventId && `id: ${eventId}`;
    const typeLine = event.type !== "message" && `event: ${event.type}`;
    const lines = [idLine, typeLine, `data: ${event.data}`];
    handlers.received(byteLength(`${lines.filter(Boolean).join("\n")}\n\n`));
    handlers.message({ id: eventId, event: event.type, data: JSON.parse(event.data) });
  }

  source.addEventListener("open", () => handlers.open());
  for (const type of EVENT_TYPES) source.addEventListener(type, onEvent);
  return () => source.close();
}
