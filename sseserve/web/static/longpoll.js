// Long-polling transport: each request asks for the events after the cursor and waits until there are some.

import { sessionPath } from "./api.js";

export const title = "Long polling";
export const bytesTooltip = "JSON body of each response, without headers";
export const description = "One request after the other: the server responds when there are events.";
export const isStream = false;
export const hasLog = true;

const WAIT = 25; // seconds
const MIN_INTERVAL = 1000; // ms between requests if the server responds at once with no events

export function connect(id, cursor, handlers, request) {
  const controller = new AbortController();
  const { signal } = controller;

  async function poll() {
    let after = cursor;
    // The first request does not wait, so that the result of resuming is known at once.
    for (let first = true; !signal.aborted; first = false) {
      const requestedAt = performance.now();
      const path = sessionPath(id, "/events", { after, wait: first ? 0 : WAIT });
      const { body, size } = await request(path, { signal });
      if (first) handlers.open();
      handlers.received(size);
      if (body.resume && (first || body.resume.status !== "ok")) {
        handlers.message({ id: null, event: "resume", data: body.resume });
      }
      body.events.forEach(handlers.message);
      if (body.end) return;
      after = body.next;
      if (!first && body.events.length === 0 && performance.now() - requestedAt < MIN_INTERVAL) {
        await new Promise((resolve) => setTimeout(resolve, MIN_INTERVAL));
      }
    }
  }

  poll().then(
    () => handlers.closed("the session has ended"),
    (error) => handlers.closed(error.message),
  );
  return () => controller.abort();
}
