// The list of sessions, as the server streams it: a snapshot, then what changes.

import { auth, noteExpiring } from "./auth.js";
import { setReachable, setServerTime } from "./store.js";
import { readEventStream } from "./sse-parser.js";

const PATH = "/api/streams/sessions";
const IDLE_TIMEOUT = 20_000; // ms without a byte after which the connection is taken for lost; the server sends every 5 s
const INITIAL_BACKOFF = 500; // ms, doubled with each failure
const MAX_BACKOFF = 10_000;
const MAX_SESSIONS = 5000; // that the page keeps; those that changed least recently are dropped

export class SessionListStream {
  sessions = new Map(); // by ID
  isComplete = false; // whether a snapshot has come
  total = 0; // how many sessions there are; more than `sessions` if the list is long
  server = null; // what the server is doing, and when it said so
  state = "idle"; // see CONNECTIONS in state.js
  error = ""; // why the server refuses
  problem = ""; // why the server can store nothing now, while it says so
  #onChange;
  #controller = null;
  #timer = null;
  #failures = 0;
  #snapshot = null; // the pages that have come

  constructor(onChange) {
    this.#onChange = onChange;
  }

  stop() {
    this.#controller?.abort();
    this.#controller = null;
    clearTimeout(this.#timer);
    this.problem = "";
    this.state = "disconnected";
    this.#onChange();
  }

  async start() {
    if (this.#controller !== null) return;
    clearTimeout(this.#timer);
    const controller = (this.#controller = new AbortController());
    this.state = this.sessions.size || this.server ? "reconnecting" : "connecting";
    this.#snapshot = null;
    let retryAfter;
    let idleTimer;
    let mustSignIn = false;
    const isCurrent = () => this.#controller === controller;
    const watch = () => {
      clearTimeout(idleTimer);
      idleTimer = setTimeout(() => controller.abort(), IDLE_TIMEOUT);
    };
    watch();
    try {
      await readEventStream(PATH, {
        signal: controller.signal,
        onOpen: (response) => {
          setReachable(true);
          setServerTime(response.headers.get("Date"));
          [this.state, this.error] = ["connected", ""];
          this.#onChange();
        },
        onBytes: watch,
        onRetry: (milliseconds) => (retryAfter = milliseconds),
        onMessage: ({ event, data }) => {
          if (!isCurrent() || data === null) return;
          this.#failures = 0;
          this.#handle(event, JSON.parse(data));
          this.#onChange();
        },
      });
    } catch (error) {
      if (isCurrent()) {
        mustSignIn = error.status === 401 && auth.asked !== "";
        if (mustSignIn) this.error = ""; // The form says it.
        else if (error.status) [this.error, this.#failures] = [error.message, Math.max(this.#failures, 3)];
        setReachable(Boolean(error.status));
      }
    }
    clearTimeout(idleTimer);
    if (!isCurrent()) return; // stopped
    this.#controller = null;
    this.problem = "";
    this.state = this.error || mustSignIn ? "refused" : "reconnecting";
    if (mustSignIn) {
      this.#onChange();
      return;
    }
    const backoff = Math.min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** this.#failures++);
    this.#timer = setTimeout(() => this.start(), retryAfter ?? backoff * (0.5 + Math.random() / 2));
    this.#onChange();
  }

  #handle(event, data) {
    if (event === "expiring") noteExpiring(data.expires_in);
    else if (event === "degraded") this.problem = data.reason;
    else if (event === "restored") this.problem = "";
    else if (event === "server") this.server = { ...data, at: performance.now() };
    else if (event === "snapshot") this.#handleSnapshot(data);
    else if (event === "changes") this.#handleChanges(data);
  }

  #handleSnapshot({ sessions, total, complete }) {
    this.#snapshot = [...(this.#snapshot ?? []), ...sessions];
    if (!complete) return;
    this.sessions = new Map(this.#snapshot.map((session) => [session.session_id, session]));
    this.total = total;
    this.isComplete = true;
    this.#snapshot = null;
  }

  #handleChanges({ sessions, created, removed }) {
    for (const id of removed) {
      this.sessions.delete(id);
      this.total -= 1;
    }
    this.total += created.filter((id) => !this.sessions.has(id)).length;
    for (const session of sessions) {
      this.sessions.delete(session.session_id); // so that the map is in the order of the changes
      this.sessions.set(session.session_id, session);
    }
    for (const id of this.sessions.keys()) {
      if (this.sessions.size <= MAX_SESSIONS) break;
      this.sessions.delete(id);
    }
    this.total = Math.max(this.total, this.sessions.size);
  }
}
