// The video generator's SseClient: EventSource with its own backoff (1, 2, 4, 8, 16 s). If that fails, or if the
// browser has no EventSource, it uses WebSocket, with the same backoff; then it gives up.
//
// A new connection does not know the last event ID of the old one, so the client keeps it.

const FIRST_DELAY = 1000; // ms
const MAX_RECONNECT_ATTEMPTS = 5;

const EVENT_TYPES = [
  "job-status", "step-status", "step-progress", "warning", "error", "job-completed", "job-failed", "job-cancelled",
];

export class SseClient {
  #urls;
  #usesWebSocket = typeof EventSource === "undefined";
  #connection = null;
  #handlers = new Map();
  #lastEventId = "";
  #attempts = 0;
  #timer = null;

  /** `url` is the event stream's, `webSocketUrl` has the same events; without it there is no fallback. */
  constructor(url, webSocketUrl = null) {
    this.#urls = { stream: url, webSocket: webSocketUrl };
  }

  on(type, handler) {
    if (!this.#handlers.has(type)) this.#handlers.set(type, new Set());
    this.#handlers.get(type).add(handler);
  }

  off(type, handler) {
    this.#handlers.get(type)?.delete(handler);
  }

  connect() {
    this.#connection = this.#usesWebSocket ? this.#openWebSocket() : this.#openEventSource();
  }

  /** Close the connection, and do not reconnect. */
  close() {
    clearTimeout(this.#timer);
    const connection = this.#connection;
    this.#connection = null;
    connection?.close();
  }

  #openEventSource() {
    const source = new EventSource(this.#resuming(this.#urls.stream));
    source.onopen = () => this.#emit("open", { transport: "SSE" });
    source.addEventListener("resume", () => (this.#attempts = 0));
    for (const type of EVENT_TYPES) {
      source.addEventListener(type, (event) => {
        // An "error" event with data is the server's; one without data is EventSource's own.
        if (event.data !== undefined) this.#handleEvent(type, event.lastEventId, JSON.parse(event.data));
      });
    }
    source.onerror = (event) => {
      if (event.data === undefined && source === this.#connection) this.#handleConnectionError();
    };
    return source;
  }

  #openWebSocket() {
    const socket = new WebSocket(this.#resuming(this.#urls.webSocket));
    socket.onopen = () => this.#emit("open", { transport: "WebSocket" });
    socket.onmessage = (message) => {
      const { id, event, data } = JSON.parse(message.data);
      if (socket !== this.#connection) return;
      this.#attempts = 0;
      if (EVENT_TYPES.includes(event)) this.#handleEvent(event, id, data);
    };
    socket.onclose = ({ code }) => {
      // 1000: the job has ended, and everything has been sent.
      if (socket === this.#connection && code !== 1000) this.#handleConnectionError();
    };
    return socket;
  }

  #resuming(address) {
    const url = new URL(address);
    if (this.#lastEventId) url.searchParams.set("last_event_id", this.#lastEventId);
    return url;
  }

  #handleEvent(type, id, data) {
    // Not when the connection opens: a proxy may open one, and let nothing through.
    this.#attempts = 0;
    this.#lastEventId = id;
    this.#emit(type, { type, id, data });
  }

  #handleConnectionError() {
    this.close();
    if (this.#attempts < MAX_RECONNECT_ATTEMPTS) {
      const delay = FIRST_DELAY * 2 ** this.#attempts;
      this.#attempts += 1;
      this.#emit("reconnecting", { attempt: this.#attempts, delay });
      this.#timer = setTimeout(() => this.connect(), delay);
    } else if (!this.#usesWebSocket && this.#urls.webSocket !== null) {
      this.#usesWebSocket = true;
      this.#attempts = 0;
      this.connect();
    } else {
      this.#emit("error", { type: "error", data: { message: "Connection failed" } });
    }
  }

  #emit(type, event) {
    for (const handler of this.#handlers.get(type) ?? []) handler(event);
  }
}
