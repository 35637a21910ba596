// HTTP requests to the server, with errors that can be shown to the user.

import { authorizedFetch } from "./auth.js";
import { noteRoundTrip } from "./delays.js";
import { capitalize } from "./format.js";
import { setReachable, setServerTime } from "./store.js";

export class ServerError extends Error {
  constructor(status, { code = "", message = "", request_id = "" } = {}, retryAfter = null) {
    const details = [code, request_id && `request ${request_id}`].filter(Boolean).join(", ");
    const text = message ? capitalize(message) : `The server responded with status ${status}`;
    super(`${text}${details && ` (${details})`}`);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter === null ? undefined : Number(retryAfter) * 1000; // ms
  }
}

export const byteLength = (text) => new TextEncoder().encode(text).length;

/**
 * Request JSON, and send `value` as JSON if there is one. Resolves to its value, its size in bytes and the response; rejects with an error that can be
 * shown. One without a `status` means that the server was not reached, which `store.reachable` says, too.
 */
export async function requestJson(path, { method = "GET", value, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (value !== undefined) headers["Content-Type"] = "application/json";
  let response, text;
  const sentAt = performance.now();
  try {
    response = await authorizedFetch(path, { method, signal, headers, body: JSON.stringify(value) });
    noteRoundTrip(performance.now() - sentAt);
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setReachable(false);
    throw new Error("The server cannot be reached.");
  }
  setReachable(true);
  setServerTime(response.headers.get("Date"));
  let body = null;
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    if (response.ok) throw new Error("The server sent a response that is not valid JSON.");
  }
  if (!response.ok) throw new ServerError(response.status, body?.error, response.headers.get("Retry-After"));
  return { body, size: byteLength(text), response };
}

/** The path of a session or of a resource below it. Query parameters that are null or empty are omitted. */
export function sessionPath(id, subpath = "", query = {}) {
  const parameters = Object.entries(query).filter(([, value]) => value !== null && value !== "");
  const search = new URLSearchParams(parameters).toString();
  return `/api/sessions/${encodeURIComponent(id)}${subpath}${search && `?${search}`}`;
}
