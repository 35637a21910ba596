// WebSocket: JSON text messages {"id", "event", "data"}.

import { bytesOf, sessionPath } from "./api.js";

export const title = "WebSocket";
export const unit = "The text of each message, without its frame";

const REASONS = {
  1000: "the server closed it",
  1001: "the server goes away",
  1006: "the connection broke or was refused",
  1012: "the server restarts",
  1013: "the server asks to come back later",
};

export function connect(id, cursor, sink) {
  const url = new URL(sessionPath(id, "/status/ws", { last_event_id: cursor }), location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  let retryAfter;

  socket.addEventListener("open", () => sink.open());
  socket.addEventListener("message", ({ data: text }) => {
    const message = JSON.parse(text);
    retryAfter = message.retry ?? retryAfter;
    sink.received(bytesOf(text));
    sink.message(message);
  });
  socket.addEventListener("close", ({ code, reason }) =>
    sink.closed(reason || REASONS[code] || `closed with code ${code}`, retryAfter),
  );
  return () => socket.close();
}
