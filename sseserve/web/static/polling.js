// Polling: a request for the current state every two seconds. There is no log in it, so a state that came and
// went between two requests is never seen.

import { sessionPath } from "./api.js";

export const title = "Polling";
export const bytesTooltip = "JSON body of each response, without headers";
export const description = "One request every 2 s for the current state: what changes in between is missed.";
export const isStream = false;
export const hasLog = false;

const INTERVAL = 2000; // ms between requests

export function connect(id, cursor, handlers, request) {
  const controller = new AbortController();
  const { signal } = controller;

  async function poll() {
    let known = cursor;
    for (let first = true; !signal.aborted; first = false) {
      const { body, size } = await request(sessionPath(id, "/status"), { signal });
      if (first) handlers.open();
      handlers.received(size);
      if (body.id !== known) handlers.message({ id: body.id, event: "progress", data: body });
      known = body.id;
      await new Promise((resolve) => setTimeout(resolve, INTERVAL));
    }
  }

  poll().catch((error) => handlers.closed(error.message));
  return () => controller.abort();
}
