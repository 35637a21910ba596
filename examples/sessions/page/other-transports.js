// The same session over WebSocket and by polling, to compare with Server-Sent Events.

import { session, show } from "./view.js";

const { server, session_id: sessionId } = await session;
const statusUrl = `${server}/api/sessions/${sessionId}/status`;

const socket = new WebSocket(`${statusUrl.replace("http", "ws")}/ws`);
socket.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  if (message.data?.progress !== undefined) show("ws", message.data);
};

async function poll() {
  const status = await (await fetch(statusUrl)).json();
  show("poll", status);
  if (!status.ended_at) setTimeout(poll, 2000);
}
poll();
