// The same session over WebSocket and by polling, to compare with Server-Sent Events.

import { session, show } from "./view.js";

const { server, session_id: sessionId } = await session;
const statusUrl = `${server}/api/sessions/${sessionId}/status`;
const RECONNECT_DELAY = 1000; // ms

function connect(lastEventId = "") {
  const socket = new WebSocket(`${statusUrl.replace("http", "ws")}/ws?last_event_id=${lastEventId}`);
  let hasEnded = false;
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    lastEventId = message.id ?? lastEventId;
    if (message.data?.progress === undefined) return;
    show("ws", message.data);
    hasEnded = Boolean(message.data.ended_at);
  };
  // A WebSocket, unlike an EventSource, does not reconnect by itself.
  socket.onclose = () => hasEnded || setTimeout(connect, RECONNECT_DELAY, lastEventId);
}
connect();

async function poll() {
  try {
    const status = await (await fetch(statusUrl)).json();
    show("poll", status);
    if (status.ended_at) return;
  } catch (error) {
    console.error("Polling failed:", error);
  }
  setTimeout(poll, 2000);
}
poll();
