// Signs the user in at the application's own server, which makes the tokens. A token is sent in a header; what
// cannot send headers, an EventSource or a WebSocket, gets a ticket for each connection.

import { session, user } from "./view.js";

const { server } = await session;
let token = null;

async function signIn() {
  const response = await fetch("/login", { method: "POST", body: JSON.stringify({ user }) });
  ({ token } = await response.json());
}
await signIn();

/** Fetch something from the event server. Rejects if it is refused, with the response's `status`. */
export async function authorizedFetch(url, { headers = {}, ...options } = {}) {
  const response = await fetch(url, { ...options, headers: { ...headers, Authorization: `Bearer ${token}` } });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw Object.assign(new Error(body?.error?.message ?? `status ${response.status}`), { status: response.status });
}

const post = (path, value) =>
  authorizedFetch(`${server}${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(value),
  });

/** Return a ticket for one connection. */
export const takeTicket = async (sessionId) => (await (await post("/api/tickets", { sessions: [sessionId] })).json()).ticket;

/** Get a new token, since the old one is about to expire. The open streams of this user go on. */
export async function renew() {
  await signIn();
  await post("/api/tokens/refresh");
}
