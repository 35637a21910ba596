// A subscription to one session over one transport: its state, cursor, counters and reconnects.
//
// A transport is a module with `connect(id, cursor, handlers)`, which opens one connection (EventSource may
// reopen it) and returns a function that closes it. It calls these handlers:
//
//   open()                        the server accepted the connection
//   interrupted(reason)           the connection was lost, and the transport reconnects by itself
//   received(bytes)               bytes received, as this transport counts them
//   message({ id, event, data })  a message; `id` is its cursor, or null
//   closed(reason, retryAfter)    the connection is closed; `retryAfter` is in ms, if the server sent one
//
// A transport need not know whether the session has ended: the subscription checks when a connection closes.

import { requestJson, sessionPath } from "./api.js";
import { isEnded, parseCursor } from "./session.js";
import { scheduleRender } from "./state.js";

const INITIAL_BACKOFF = 500; // ms, doubled with each failure
const MAX_BACKOFF = 10_000;

export class Subscription {
  #connect;
  #onMessage;
  #latestCursor;
  #close = () => {};
  #attempt = 0; // handlers of earlier attempts are ignored
  #timer = null;
  #failures = 0;
  #hasConnected = false; // since `start`
  #snapshotNext = false; // the next progress event is the current state, so it tells nothing about latency

  /** `latestCursor` returns the newest cursor that any subscription has received, or null. */
  constructor({ name, connect, onMessage, latestCursor }) {
    this.name = name;
    this.#connect = connect;
    this.#onMessage = onMessage;
    this.#latestCursor = latestCursor;
    this.#reset();
  }

  #reset() {
    Object.assign(this, {
      id: null,
      state: "idle", // idle, connecting, connected, reconnecting, disconnected, complete, refused
      note: "", // the reason for the state
      cursor: null,
      percent: 0,
      jobState: null,
      events: 0,
      bytes: 0,
      latency: null, // ms
      reconnects: 0,
      skipped: 0, // sequence numbers that were not received
      resumeResult: null, // the server's resume event, and the number of events that were to be replayed
    });
    this.#hasConnected = false;
    this.#failures = 0;
  }

  start(id) {
    this.#end("idle");
    this.#reset();
    this.id = id;
    this.#open();
  }

  stop() {
    this.#end("idle");
    this.#reset();
    scheduleRender();
  }

  disconnect() {
    this.#end("disconnected");
    scheduleRender();
  }

  reconnect() {
    this.#end("reconnecting");
    this.#failures = 0;
    this.#open();
  }

  /** Whether it is connected or tries to connect. */
  get canDisconnect() {
    return ["connecting", "connected", "reconnecting"].includes(this.state);
  }

  #end(state, note = "") {
    this.#attempt += 1;
    clearTimeout(this.#timer);
    this.#close();
    this.#close = () => {};
    this.state = state;
    this.note = note;
  }

  #open() {
    const attempt = ++this.#attempt;
    const ifCurrent = (handler) => (...args) => {
      if (attempt === this.#attempt) {
        handler(...args);
        scheduleRender();
      }
    };
    this.state = "connecting";
    this.resumeResult = null;
    this.#snapshotNext = this.cursor === null;
    this.#close = this.#connect(this.id, this.cursor, {
      open: ifCurrent(() => this.#handleOpen()),
      interrupted: ifCurrent((reason) => this.#handleInterrupted(reason)),
      received: ifCurrent((bytes) => (this.bytes += bytes)),
      message: ifCurrent((message) => this.#handleMessage(message)),
      closed: ifCurrent((reason, retryAfter) => this.#handleClosed(attempt, reason, retryAfter)),
    });
    scheduleRender();
  }

  #handleOpen() {
    if (this.#hasConnected) this.reconnects += 1;
    this.#hasConnected = true;
    this.state = "connected";
    this.note = "";
  }

  #handleInterrupted(reason) {
    this.state = "reconnecting";
    this.note = reason;
  }

  #handleMessage({ id, event, data }) {
    this.#failures = 0;
    if (event === "resume") {
      this.resumeResult = { ...data, backlog: this.#countBacklog() };
      if (data.status !== "ok") {
        this.cursor = null; // the server sends the current state next
        this.#snapshotNext = true;
      }
    } else if (event === null) {
      this.cursor ??= id; // carries only the cursor at which this connection starts
    } else {
      this.#countEvent(id);
      if (typeof data?.progress === "number") {
        if (!this.#snapshotNext) this.latency = Date.now() - Date.parse(data.updated_at);
        this.percent = data.progress;
        this.jobState = data.state;
        this.#snapshotNext = false;
      }
    }
    this.#onMessage({ id, event, data });
    if (event === "deleted") this.#end("complete", "the session was deleted");
    else if (event === "overflow") this.note = "the server disconnected this client because it was too slow";
    else if (["complete", "error"].includes(event) && isEnded(data?.state)) this.#end("complete");
  }

  /** The number of events between this subscription's cursor and the latest one. */
  #countBacklog() {
    const latest = this.#latestCursor();
    if (latest === null || this.cursor === null) return 0;
    const [end, start] = [parseCursor(latest), parseCursor(this.cursor)];
    return end.epoch === start.epoch ? Math.max(0, end.seq - start.seq) : 0;
  }

  /** Count an event of the log. Events for one client only are not in the log and have no id. */
  #countEvent(id) {
    if (id === null) return;
    this.events += 1;
    const previous = this.cursor === null ? null : parseCursor(this.cursor);
    const { epoch, seq } = parseCursor(id);
    if (previous?.epoch === epoch) this.skipped += Math.max(0, seq - previous.seq - 1);
    this.cursor = id;
  }

  async #handleClosed(attempt, reason, retryAfter) {
    this.#handleInterrupted(reason);
    let finalState = null;
    let detail = "";
    try {
      const { body } = await requestJson(sessionPath(this.id, "/status"));
      if (isEnded(body.state) && body.id === this.cursor) finalState = "complete";
    } catch (error) {
      detail = error.message;
      if (error.status === 404 && this.#hasConnected) {
        [finalState, detail] = ["complete", "the session no longer exists"];
      } else if ([401, 403, 404].includes(error.status)) {
        finalState = "refused";
      }
    }
    if (attempt !== this.#attempt) return;
    if (finalState !== null) {
      this.#end(finalState, detail);
    } else {
      this.note = detail || reason;
      const backoff = Math.min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** this.#failures++);
      const jittered = backoff * (0.5 + Math.random() / 2);
      this.#timer = setTimeout(() => this.#open(), retryAfter ?? jittered);
    }
    scheduleRender();
  }
}
