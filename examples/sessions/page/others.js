// The same session over WebSocket, and asked for every two seconds: the same numbers from one tracker.

import { begun, show } from "./view.js";

const { server, session_id: sessionId } = await begun;
const base = `${server}/api/sessions/${sessionId}/status`;

const socket = new WebSocket(`${base.replace("http", "ws")}/ws`);
socket.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  if (message.data?.progress !== undefined) show("ws", message.data);
};

async function poll() {
  const status = await (await fetch(base)).json();
  show("poll", status);
  if (!status.ended_at) setTimeout(poll, 2000);
}
poll();
