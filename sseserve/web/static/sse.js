// Server-Sent Events over fetch: every event type is received and every byte counted, which EventSource does
// not allow. `Subscription` reconnects with its cursor. The programs in examples/ use EventSource itself.

import { sessionPath } from "./api.js";
import { setReachable } from "./store.js";
import { readEventStream } from "./sse-parser.js";

export const title = "Server-Sent Events";
export const bytesTooltip = "Bytes of the event stream, with heartbeats, without HTTP framing";
export const description = "One response that stays open: the server sends each event at once.";
export const isStream = true;
export const hasLog = true;

export function connect(id, cursor, handlers) {
  const controller = new AbortController();
  let retryAfter;
  readEventStream(sessionPath(id, "/status/stream"), {
    signal: controller.signal,
    headers: cursor === null ? {} : { "Last-Event-ID": cursor },
    onOpen: () => {
      setReachable(true);
      handlers.open();
    },
    onBytes: (bytes) => handlers.received(bytes),
    onRetry: (milliseconds) => {
      retryAfter = milliseconds;
    },
    onMessage: ({ id: messageId, event, data }) =>
      handlers.message({ id: messageId, event, data: data === null ? null : JSON.parse(data) }),
  }).then(
    () => handlers.closed("the server has ended the stream", retryAfter),
    (error) => handlers.closed(error.status ? error.message : "the connection was lost", retryAfter),
  );
  return () => controller.abort();
}
