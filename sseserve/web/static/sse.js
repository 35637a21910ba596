// Server-Sent Events, by the browser's own EventSource, which reconnects by itself.

import { bytesOf, sessionPath } from "./api.js";

// An EventSource hears only names that somebody listens to.
const NAMES = [
  "message", "progress", "complete", "error", "warning", "control", "resume", "stalled", "overflow", "deleted",
];

// Said to one client and not part of the log, so without an id.
const ASIDE = new Set(["resume", "overflow", "deleted"]);

export const title = "Server-Sent Events";
export const unit = "Each event's block as it stands on the wire, rebuilt from its fields; comments are not seen";

export function connect(id, cursor, sink) {
  const source = new EventSource(sessionPath(id, "/status/stream", { last_event_id: cursor }));

  function hear(event) {
    if (event.data === undefined) {
      // EventSource's own "error", which has no data: the connection broke.
      if (source.readyState === EventSource.CLOSED) sink.closed("the stream was refused or has ended");
      else sink.lost("the connection broke; the browser tries again");
      return;
    }
    // For an event without an id of its own, `lastEventId` is still that of the one before.
    const id = ASIDE.has(event.type) ? null : event.lastEventId || null;
    const fields = [id && `id: ${id}`, event.type !== "message" && `event: ${event.type}`, `data: ${event.data}`];
    sink.received(bytesOf(`${fields.filter(Boolean).join("\n")}\n\n`));
    sink.message({ id, event: event.type, data: JSON.parse(event.data) });
  }

  source.addEventListener("open", () => sink.open());
  for (const name of NAMES) source.addEventListener(name, hear);
  return () => source.close();
}
