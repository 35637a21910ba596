// WebSocket transport: JSON text messages {"id", "event", "data"}. It cannot send a token, so with one each
// connection has a ticket of its own.

import { byteLength, requestJson, sessionPath } from "./api.js";
import { hasToken } from "./auth.js";

export const title = "WebSocket";
export const bytesTooltip = "Text of each message, without frame headers";
export const description = "One connection that stays open in both directions: the server sends each event at once.";
export const isStream = true;
export const hasLog = true;

// Used when the server sends a close code without a reason.
const CLOSE_REASONS = {
  1000: "the server closed the connection",
  1001: "the server is shutting down",
  1006: "the connection was lost or refused",
  1012: "the server is restarting",
  1013: "the server is temporarily unavailable",
  3000: "the token has expired or was revoked",
};

/** Return a ticket for one connection, or null if none is needed. */
async function takeTicket(id, signal) {
  if (!hasToken()) return null;
  const { body } = await requestJson("/api/tickets", { method: "POST", value: { sessions: [id] }, signal });
  return body.ticket;
}

export function connect(id, cursor, handlers) {
  const controller = new AbortController();
  takeTicket(id, controller.signal).then(
    (ticket) => {
      if (controller.signal.aborted) return;
      const socket = open(id, cursor, ticket, handlers);
      controller.signal.addEventListener("abort", () => socket.close());
    },
    (error) => handlers.closed(error.message, error.retryAfter),
  );
  return () => controller.abort();
}

function open(id, cursor, ticket, handlers) {
  const url = new URL(sessionPath(id, "/status/ws", { last_event_id: cursor, ticket }), location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  let retryAfter;

  socket.addEventListener("open", () => handlers.open());
  socket.addEventListener("message", ({ data: text }) => {
    const message = JSON.parse(text);
    retryAfter = message.retry ?? retryAfter;
    handlers.received(byteLength(text));
    handlers.message(message);
  });
  socket.addEventListener("close", ({ code, reason }) =>
    handlers.closed(reason || CLOSE_REASONS[code] || `connection closed with code ${code}`, retryAfter),
  );
  return socket;
}
