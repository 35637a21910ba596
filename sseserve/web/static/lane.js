// One lane: a session seen over one transport, with its counters, its cursor and its reconnections.
//
// A transport is a module with `connect(id, cursor, sink)`, which returns a function that closes the
// connection. It makes one connection (or lets the browser repeat it), and tells its sink:
//
//   open()                        the server answers
//   lost(words)                   the connection broke; the transport itself is trying again
//   received(bytes)               so much came, as that transport counts
//   message({ id, event, data })  a message; `id` is its cursor, or null
//   closed(words, retryAfter)     it is over; `retryAfter` in ms if the server asked for one
//
// A transport need not know whether the work has ended: the lane asks when a connection closes.

import { ask, sessionPath } from "./api.js";
import { isEnded, readCursor } from "./model.js";
import { changed } from "./state.js";

const FIRST_WAIT = 500; // ms, doubled with each failure
const LONGEST_WAIT = 10_000;

export class Lane {
  #connect;
  #onMessage;
  #newest;
  #close = () => {};
  #turn = 0; // a sink of an earlier turn is heard no more
  #timer = null;
  #failures = 0;
  #known = false; // whether the server has ever answered
  #snapshot = false; // whether the next event is the state that was found, not news

  /** `newest` returns the newest cursor that anybody here knows, or null. */
  constructor({ name, connect, onMessage, newest }) {
    this.name = name;
    this.#connect = connect;
    this.#onMessage = onMessage;
    this.#newest = newest;
    this.#reset();
  }

  #reset() {
    Object.assign(this, {
      id: null,
      state: "idle", // idle, connecting, open, lost, off, ended, failed
      note: "", // why it is in this state
      cursor: null,
      percent: 0,
      jobState: null,
      events: 0,
      bytes: 0,
      delay: null, // ms
      reconnects: 0,
      skipped: 0, // numbers of the log between two events that this lane did not get
      verdict: null, // what the server said about the last resumption, and how far behind it began
    });
    this.#known = false;
    this.#failures = 0;
  }

  start(id) {
    this.#end("idle");
    this.#reset();
    this.id = id;
    this.#begin();
  }

  stop() {
    this.#end("idle");
    this.#reset();
    changed();
  }

  disconnect() {
    this.#end("off");
    changed();
  }

  reconnect() {
    this.#end("lost");
    this.#failures = 0;
    this.#begin();
  }

  /** Whether it is connected or will be without anybody's help. */
  get on() {
    return ["connecting", "open", "lost"].includes(this.state);
  }

  #end(next, note = "") {
    this.#turn += 1;
    clearTimeout(this.#timer);
    this.#close();
    this.#close = () => {};
    this.state = next;
    this.note = note;
  }

  #begin() {
    const turn = ++this.#turn;
    const heard = (method) => (...args) => {
      if (turn === this.#turn) {
        method(...args);
        changed();
      }
    };
    this.state = "connecting";
    this.verdict = null;
    this.#snapshot = this.cursor === null;
    this.#close = this.#connect(this.id, this.cursor, {
      open: heard(() => this.#answered()),
      lost: heard((words) => this.#lost(words)),
      received: heard((bytes) => (this.bytes += bytes)),
      message: heard((message) => this.#message(message)),
      closed: heard((words, retryAfter) => this.#closed(turn, words, retryAfter)),
    });
    changed();
  }

  #answered() {
    if (this.#known) this.reconnects += 1;
    this.#known = true;
    this.state = "open";
    this.note = "";
  }

  #lost(words) {
    this.state = "lost";
    this.note = words;
  }

  #message({ id, event, data }) {
    this.#failures = 0;
    if (event === "resume") {
      this.verdict = { ...data, behind: this.#behind() };
      if (data.status !== "ok") {
        this.cursor = null; // what comes next is the state that the server found
        this.#snapshot = true;
      }
    } else if (event === null) {
      this.cursor ??= id; // only says where this connection begins
    } else {
      this.#count(id);
      if (typeof data?.progress === "number") {
        if (!this.#snapshot) this.delay = Date.now() - Date.parse(data.updated_at);
        this.percent = data.progress;
        this.jobState = data.state;
        this.#snapshot = false;
      }
    }
    this.#onMessage({ id, event, data });
    if (event === "deleted") this.#end("ended", "the session was deleted");
    else if (event === "overflow") this.note = "the server cut this lane because it was too slow";
    else if (["complete", "error"].includes(event) && isEnded(data?.state)) this.#end("ended");
  }

  #behind() {
    const newest = this.#newest();
    if (newest === null || this.cursor === null) return 0;
    const [there, here] = [readCursor(newest), readCursor(this.cursor)];
    return there.epoch === here.epoch ? Math.max(0, there.seq - here.seq) : 0;
  }

  /** Count an event of the log; what is said to one client alone has no id. */
  #count(id) {
    if (id === null) return;
    this.events += 1;
    const before = this.cursor === null ? null : readCursor(this.cursor);
    const { epoch, seq } = readCursor(id);
    if (before?.epoch === epoch) this.skipped += Math.max(0, seq - before.seq - 1);
    this.cursor = id;
  }

  async #closed(turn, words, retryAfter) {
    this.#lost(words);
    let [verdict, why] = ["again", ""];
    try {
      const { body } = await ask(sessionPath(this.id, "/status"));
      if (isEnded(body.state) && body.id === this.cursor) verdict = "ended";
    } catch (error) {
      why = error.message;
      if (error.status === 404 && this.#known) [verdict, why] = ["ended", "the session is no more"];
      else if ([401, 403, 404].includes(error.status)) verdict = "failed";
    }
    if (turn !== this.#turn) return;
    if (verdict !== "again") {
      this.#end(verdict, why);
    } else {
      this.note = why || words;
      const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#failures++);
      this.#timer = setTimeout(() => this.#begin(), retryAfter ?? wait * (0.5 + Math.random() / 2));
    }
    changed();
  }
}
