// A subscription to one session over one transport: its state, cursor, counters and reconnects.
//
// A transport is a module with `connect(id, cursor, handlers, request)`, which opens one connection and returns
// a function that closes it. `request` is `requestJson`, or does the same. `isStream`: its connections stay open;
// `hasLog`: it receives every event after its cursor, not only the current state. It calls these handlers:
//
//   open()                        the server accepted the connection
//   received(bytes)               bytes received, as this transport counts them
//   message({ id, event, data })  a message; `id` is its cursor, or null
//   closed(reason, retryAfter)    the connection is closed; `retryAfter` is in ms, if the server sent one
//
// A transport need not know whether the session has ended: the subscription checks when a connection closes.

import { requestJson, sessionPath } from "./api.js";
import { auth, noteExpiring } from "./auth.js";
import { Delays } from "./delays.js";
import { isRecord, parseCursor } from "./record.js";
import { isEnded } from "./state.js";
import { scheduleRender } from "./store.js";

const INITIAL_BACKOFF = 500; // ms, doubled with each failure
const MAX_BACKOFF = 10_000;
const CONNECT_TIMEOUT = 10_000; // ms until a connection must be open
const MAX_REFUSALS = 3; // attempts in a row that failed although the server could be reached

export class Subscription {
  #connect;
  #hasLog;
  #session; // what the page knows of the session; see the constructor
  #close = () => {};
  #attempt = 0; // handlers of earlier attempts are ignored
  #timer = null;
  #waits = false; // for a time of its own choice until the next attempt
  #failures = 0;
  #refusals = 0;
  #hasConnected = false; // since `start`
  #opened = false; // this attempt
  #resumes = false; // this attempt continues an earlier connection
  #snapshotNext = false; // the next record is the current state and not an event
  #recreated = false; // the log is another one, which is to be read from its beginning

  /**
   * `session` has `onMessage({ id, event, data })`, `onStatus(record)`, `onPolled(record)` and `onGone()`; the map
   * `newest`: by epoch the last seq that any subscription has received; and `timesBetween(cursor, cursor)`.
   */
  constructor({ name, connect, hasLog, session }) {
    this.name = name;
    this.#connect = connect;
    this.#hasLog = hasLog;
    this.#session = session;
    this.#reset();
  }

  #reset() {
    Object.assign(this, {
      id: null,
      state: "idle", // see CONNECTIONS in state.js
      note: "", // the reason for the state
      problem: "", // why the server can store nothing now, while it says so
      cursor: null,
      record: null, // the last one received
      events: 0, // since the cursor at which it was started
      bytes: 0,
      delays: new Delays(),
      reconnects: 0,
      missed: 0, // events that were not received
      resumeResult: null, // the server's resume event, and the number of events that were to be replayed
    });
    this.#hasConnected = false;
    this.#failures = this.#refusals = 0;
    this.#recreated = this.#snapshotNext = false;
  }

  /** Watch a session from its snapshot on. All subscriptions begin at the same cursor, so their counts agree. */
  start(id, record) {
    this.#end("idle");
    this.#reset();
    this.id = id;
    this.record = record;
    this.cursor = record.id;
    this.#noteNewest(parseCursor(record.id));
    if (isEnded(record.state)) this.#end("finished", "the session had already ended");
    else this.#open();
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
    this.#failures = this.#refusals = 0;
    this.#open();
  }

  /** Try again what the server has refused: the user has another token. */
  retryRefused() {
    if (this.state === "refused") this.reconnect();
  }

  /** Try again now, unless the server has said when. */
  retryNow() {
    if (this.#waits) this.#open();
  }

  /** Note that the server no longer has the session, if this subscription would only find that out. */
  noteGone() {
    if (["connecting", "reconnecting"].includes(this.state))
      this.#end("finished", "the server no longer has this session");
    scheduleRender();
  }

  /** Whether it is connected or tries to connect. */
  get canDisconnect() {
    return ["connecting", "connected", "reconnecting"].includes(this.state);
  }

  get canReconnect() {
    return ["disconnected", "blocked"].includes(this.state);
  }

  #end(state, note = "") {
    this.#attempt += 1;
    this.#waits = false;
    clearTimeout(this.#timer);
    this.#close();
    this.#close = () => {};
    this.state = state;
    this.note = note;
    this.problem = "";
  }

  #open() {
    clearTimeout(this.#timer);
    this.#waits = false;
    const attempt = ++this.#attempt;
    const ifCurrent =
      (handler) =>
      (...args) => {
        if (attempt === this.#attempt) {
          handler(...args);
          scheduleRender();
        }
      };
    this.state = this.#hasConnected ? "reconnecting" : "connecting";
    this.#opened = false;
    this.problem = "";
    if (!this.#recreated) this.resumeResult = null;
    const closed = ifCurrent((reason, retryAfter) => this.#handleClosed(attempt, reason, retryAfter));
    this.#close = this.#connect(this.id, this.cursor, {
      open: ifCurrent(() => this.#handleOpen()),
      received: ifCurrent((bytes) => (this.bytes += bytes)),
      message: ifCurrent((message) => this.#handleMessage(message)),
      closed,
    });
    this.#timer = setTimeout(() => closed("there was no answer in time"), CONNECT_TIMEOUT);
    scheduleRender();
  }

  #handleOpen() {
    clearTimeout(this.#timer);
    this.#resumes = this.#hasConnected && !this.#recreated;
    if (this.#resumes) this.reconnects += 1;
    this.#hasConnected = this.#opened = true;
    this.#refusals = 0;
    this.state = "connected";
    this.note = "";
  }

  #handleMessage({ id, event, data }) {
    this.#failures = 0;
    if (event === "degraded" || event === "restored") {
      this.problem = event === "degraded" ? data.reason : "";
      return;
    }
    if (event === "expiring") {
      noteExpiring(data.expires_in);
      return;
    }
    if (event === "resume") {
      this.#handleResume(data);
    } else if (id !== null) {
      const isEvent = this.#countEvent(id, event);
      if (this.#recreated && parseCursor(id).seq > 0) {
        this.#readFromBeginning();
        return;
      }
      if (isRecord(event)) {
        this.record = data;
        if (isEvent) this.delays.add(data.updated_at);
      }
    }
    if (this.#hasLog) this.#session.onMessage({ id, event, data });
    else this.#session.onPolled(data);
    if (event === "deleted") this.#end("finished", "the session was deleted");
    else if (event === "overflow") this.note = "the server disconnected this client because it was too slow";
    else if (isRecord(event) && isEnded(data.state)) this.#end("finished");
  }

  #handleResume({ status, missed }) {
    if (status === "ok") {
      // The first connection begins at the page's snapshot, of which there is nothing to tell.
      if (this.#resumes) this.resumeResult = { status, backlog: this.#unseen() };
      this.#recreated = false;
      return;
    }
    this.#snapshotNext = true;
    this.#recreated = status === "reset";
    const lost = status === "gap" ? missed : this.#unseen();
    this.missed += lost;
    this.resumeResult = { status, missed: lost };
  }

  /** Read a log that was recreated from its beginning, as the other subscriptions may have. */
  #readFromBeginning() {
    this.#end("reconnecting");
    this.cursor = `${parseCursor(this.cursor).epoch}-0`;
    this.#open();
  }

  /** The number of events that other subscriptions have received of this log and this one has not. */
  #unseen() {
    const { epoch, seq } = parseCursor(this.cursor);
    return Math.max(0, (this.#session.newest.get(epoch) ?? 0) - seq);
  }

  #noteNewest({ epoch, seq }) {
    const { newest } = this.#session;
    newest.set(epoch, Math.max(seq, newest.get(epoch) ?? 0));
  }

  /** Move the cursor and count; returns whether it is an event, and not the current state. */
  #countEvent(id, event) {
    const [previous, current] = [parseCursor(this.cursor), parseCursor(id)];
    this.cursor = id;
    this.#noteNewest(current);
    if (this.#snapshotNext || event === null) {
      this.#snapshotNext = false; // the current state is not an event
      return false;
    }
    this.events += 1;
    const missed = previous.epoch === current.epoch ? Math.max(0, current.seq - previous.seq - 1) : 0;
    this.missed += missed;
    // What was missed is known as soon as something newer is.
    if (missed > 0) this.#session.timesBetween(previous, current).forEach((time) => this.delays.add(time));
    if (this.#resumes && !this.#hasLog) {
      this.resumeResult = { status: "current", missed };
      this.#resumes = false;
    }
    return true;
  }

  async #handleClosed(attempt, reason, retryAfter) {
    clearTimeout(this.#timer);
    this.#close();
    this.state = "reconnecting";
    this.note = reason;
    this.problem = "";
    let final = null;
    try {
      const { body } = await requestJson(sessionPath(this.id, "/status"));
      if (attempt !== this.#attempt) return;
      this.#session.onStatus(body);
      if (isEnded(body.state) && body.id === this.cursor) final = ["finished", ""];
      else if (!this.#opened && ++this.#refusals >= MAX_REFUSALS) final = ["blocked", this.#blockedText(reason)];
    } catch (error) {
      if (attempt !== this.#attempt) return;
      if (error.status === 404) {
        final = ["finished", "the server no longer has this session"];
        this.#session.onGone();
        if (attempt !== this.#attempt) return;
      } else if (error.status === 403 || (error.status === 401 && auth.asked)) {
        final = ["refused", error.message];
      } else if (!error.status) {
        this.note = "the server cannot be reached";
      }
    }
    if (final !== null) {
      this.#end(...final);
    } else {
      const backoff = Math.min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** this.#failures++);
      const jittered = backoff * (0.5 + Math.random() / 2);
      this.#waits = retryAfter === undefined;
      this.#timer = setTimeout(() => this.#open(), retryAfter ?? jittered);
    }
    scheduleRender();
  }

  #blockedText(reason) {
    return (
      `${this.name} does not get through, although the server can be reached: ${reason}. ` +
      "A proxy may block it. The other transports are not affected"
    );
  }
}
