// Parses an event stream (HTML Living Standard, section 9.2.6). Unlike EventSource it passes on every event,
// whatever its type, and tells an event's own id from that of an earlier one.

import { authorizedFetch } from "./auth.js";

export class EventStreamParser {
  #rest = ""; // an incomplete line
  #skipLineFeed = false; // the last chunk ended with CR
  #started = false;
  #data = [];
  #event = "";
  #id = null;
  #hasFields = false;

  /** `onMessage({ id, event, data })`: `data` is text or null, `event` a type or null. `onRetry(ms)`. */
  constructor({ onMessage, onRetry = () => {} }) {
    this.onMessage = onMessage;
    this.onRetry = onRetry;
  }

  push(text) {
    if (!text) return;
    if (!this.#started && text.startsWith("\uFEFF")) text = text.slice(1);
    this.#started = true;
    if (this.#skipLineFeed && text.startsWith("\n")) text = text.slice(1);
    this.#skipLineFeed = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    for (const line of lines) this.#readLine(line);
  }

  #readLine(line) {
    if (line === "") {
      this.#dispatch();
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.onRetry(Number(value));
    this.#hasFields = true;
  }

  #dispatch() {
    const [data, event, id] = [this.#data, this.#event, this.#id];
    const hasFields = this.#hasFields;
    this.#data = [];
    this.#event = "";
    this.#id = null;
    this.#hasFields = false;
    if (data.length > 0) this.onMessage({ id: id || null, event: event || "message", data: data.join("\n") });
    else if (hasFields && id) this.onMessage({ id, event: null, data: null }); // only a cursor
  }
}

/**
 * Read an event stream over fetch until it ends. Resolves to false if the server answers 204, which means that
 * there is nothing more to come; rejects with an Error whose `status` is that of a refusal.
 */
export async function readEventStream(url, { signal, headers = {}, onOpen, onBytes = () => {}, onMessage, onRetry }) {
  const response = await authorizedFetch(url, { signal, headers: { Accept: "text/event-stream", ...headers } });
  if (response.status === 204) return false;
  const type = response.headers.get("Content-Type") ?? "";
  if (!response.ok || !type.toLowerCase().startsWith("text/event-stream")) {
    const body = await response.json().catch(() => null);
    const error = new Error(body?.error?.message ?? `the server responded with status ${response.status}`);
    error.status = response.status;
    throw error;
  }
  onOpen(response);
  const parser = new EventStreamParser({ onMessage, onRetry });
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return true;
    onBytes(value.length);
    parser.push(decoder.decode(value, { stream: true }));
  }
}
