// The video generator's SseClient: EventSource with its own backoff (1, 2, 4, 8, 16 s; then it gives up).
//
// A new EventSource does not know the last event ID of the old one, so the client keeps it.

const FIRST_DELAY = 1000; // ms
const MAX_RECONNECT_ATTEMPTS = 5;

const EVENT_TYPES = [
  "job-status", "step-status", "step-progress", "warning", "error", "job-completed", "job-failed", "job-cancelled",
];

export class SseClient {
  #url;
  #source = null;
  #handlers = new Map();
  #lastEventId = "";
  #attempts = 0;
  #timer = null;

  constructor(url) {
    this.#url = url;
  }

  on(type, handler) {
    if (!this.#handlers.has(type)) this.#handlers.set(type, new Set());
    this.#handlers.get(type).add(handler);
  }

  off(type, handler) {
    this.#handlers.get(type)?.delete(handler);
  }

  connect() {
    const url = new URL(this.#url);
    if (this.#lastEventId) url.searchParams.set("last_event_id", this.#lastEventId);
    const source = (this.#source = new EventSource(url));
    source.onopen = () => {
      this.#attempts = 0;
      this.#emit("open", {});
    };
    for (const type of EVENT_TYPES) {
      source.addEventListener(type, (event) => {
        // An "error" event with data is the server's; one without data is EventSource's own.
        if (event.data === undefined) return;
        this.#lastEventId = event.lastEventId;
        this.#emit(type, { type, id: event.lastEventId, data: JSON.parse(event.data) });
      });
    }
    source.onerror = (event) => {
      if (event.data === undefined && source === this.#source) this.#handleConnectionError();
    };
  }

  /** Close the connection, and do not reconnect. */
  close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #handleConnectionError() {
    this.close();
    if (this.#attempts < MAX_RECONNECT_ATTEMPTS) {
      const delay = FIRST_DELAY * 2 ** this.#attempts;
      this.#attempts += 1;
      this.#emit("reconnecting", { attempt: this.#attempts, delay });
      this.#timer = setTimeout(() => this.connect(), delay);
    } else {
      this.#emit("error", { type: "error", data: { message: "Connection failed" } });
    }
  }

  #emit(type, event) {
    for (const handler of this.#handlers.get(type) ?? []) handler(event);
  }
}
