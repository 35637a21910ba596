// One watcher of a session. It is connected to one of several servers, and may continue on any other one.

const RETRY = 500; // ms before it tries the next server
const ENDS = new Set(["completed", "failed"]);

export class Watcher {
  #servers;
  #sessionId;
  #index;
  #onChange;
  #source = null;
  #timer = 0;
  #cursor = "";

  /**
   * @param {string[]} servers their URLs
   * @param {number} index the one to begin with
   * @param {(change: object) => void} onChange gets {status}, {resumed}, {connection} or {problem}, as these change
   */
  constructor(servers, index, sessionId, onChange) {
    this.#servers = servers;
    this.#index = index;
    this.#sessionId = sessionId;
    this.#onChange = onChange;
  }

  /** The number of the server, from 0. */
  get index() {
    return this.#index;
  }

  /** The number of the server that it would continue on. */
  get next() {
    return (this.#index + 1) % this.#servers.length;
  }

  /** Continue on the next server, after the last message. */
  move() {
    this.#close();
    this.#index = this.next;
    this.connect();
  }

  #close() {
    clearTimeout(this.#timer);
    this.#source?.close();
  }

  /** Connect to its server, and continue after the last message if there was one. */
  connect() {
    const url = new URL(`/api/v1/sessions/${this.#sessionId}/status/stream`, this.#servers[this.#index]);
    if (this.#cursor) url.searchParams.set("last_event_id", this.#cursor);
    this.#onChange({ connection: "connecting" });
    const source = (this.#source = new EventSource(url));
    source.onopen = () => this.#onChange({ connection: "connected" });
    source.addEventListener("resume", (event) => this.#onChange({ resumed: JSON.parse(event.data) }));
    // The server cannot use Redis, and can again.
    source.addEventListener("degraded", (event) => this.#onChange({ problem: JSON.parse(event.data).reason }));
    source.addEventListener("restored", () => this.#onChange({ problem: "" }));
    source.onmessage = (event) => {
      this.#cursor = event.lastEventId;
      const status = JSON.parse(event.data);
      this.#onChange({ status });
      if (ENDS.has(status.status)) {
        this.#close();
        this.#onChange({ connection: "ended" });
      }
    };
    source.onerror = () => {
      // The server stops, or is gone: the other one has the same log.
      this.#close();
      this.#onChange({ connection: "disconnected" });
      this.#timer = setTimeout(() => this.move(), RETRY);
    };
  }
}
