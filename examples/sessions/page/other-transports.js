// The same session over WebSocket and by polling, to compare with Server-Sent Events.

import { authorizedFetch, takeTicket } from "./sign-in.js";
import { session, show } from "./view.js";

const { server, session_id: sessionId } = await session;
const statusUrl = `${server}/api/sessions/${sessionId}/status`;
const RECONNECT_DELAY = 1000; // ms

async function connect(lastEventId = "") {
  let ticket;
  try {
    ticket = await takeTicket(sessionId);
  } catch (error) {
    console.error("WebSocket failed:", error);
    if (!error.status) setTimeout(connect, RECONNECT_DELAY, lastEventId);
    return;
  }
  const socket = new WebSocket(`${statusUrl.replace("http", "ws")}/ws?ticket=${ticket}&last_event_id=${lastEventId}`);
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
    const status = await (await authorizedFetch(statusUrl)).json();
    show("poll", status);
    if (status.ended_at) return;
  } catch (error) {
    console.error("Polling failed:", error);
    if (error.status === 403) return; // This user may not watch the session.
  }
  setTimeout(poll, 2000);
}
poll();
