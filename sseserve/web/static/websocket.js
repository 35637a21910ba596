// WebSocket transport: JSON text messages {"id", "event", "data"}.

import { byteLength, sessionPath } from "./api.js";

export const title = "WebSocket";
export const bytesTooltip = "Text of each message, without frame headers";

// Used when the server sends a close code without a reason.
const CLOSE_REASONS = {
  1000: "the server closed the connection",
  1001: "the server is shutting down",
  1006: "the connection was lost or refused",
  1012: "the server is restarting",
  1013: "the server is temporarily unavailable",
};

export function connect(id, cursor, handlers) {
  const url = new URL(sessionPath(id, "/status/ws", { last_event_id: cursor }), location.href);
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
  return () => socket.close();
}
