// Requests to the server, and its errors in words.

export class ServerError extends Error {
  constructor(status, { code = "", message = "", request_id = "" } = {}) {
    const detail = [code, request_id && `request ${request_id}`].filter(Boolean).join(", ");
    const words = message ? message[0].toUpperCase() + message.slice(1) : `The server answered with status ${status}`;
    super(`${words}${detail && ` (${detail})`}`);
    this.status = status;
    this.code = code;
  }
}

export const bytesOf = (text) => new TextEncoder().encode(text).length;

/** Ask for JSON; resolves to its value and its size in bytes, rejects with an error fit to be shown. */
export async function ask(path, { method = "GET", signal } = {}) {
  let response, text;
  try {
    response = await fetch(path, { method, signal, headers: { Accept: "application/json" }, cache: "no-store" });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  let body = null;
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    if (response.ok) throw new Error("The server's answer is not JSON.");
  }
  if (!response.ok) throw new ServerError(response.status, body?.error);
  return { body, size: bytesOf(text) };
}

/** The path of a session, or of what lies below it; `query` entries that are empty are left out. */
export function sessionPath(id, below = "", query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== "");
  const search = new URLSearchParams(given).toString();
  return `/api/sessions/${encodeURIComponent(id)}${below}${search && `?${search}`}`;
}
