// The session on the page, as all subscriptions together know it: its newest record, whether it still exists,
// its stages and the latest events.

import { requestJson, sessionPath } from "./api.js";
import { cursorBefore, isRecord, mergeRecord, parseCursor } from "./record.js";
import { scheduleRender, serverNow } from "./store.js";

const HISTORY = 100; // events before the snapshot that are read for the stages and the latest events
const MAX_LATEST = 30;
const MAX_STAGES = 200;
const MAX_TIMES = 1000;

export class WatchedSession {
  newest = new Map(); // by epoch, the last seq that was received
  record = null;
  cursor = null;
  existence = "present"; // or "deleted", "gone"
  stalled = false;
  stages = []; // names, in the order in which they began
  latest = []; // { seq, type, data }: events that changed more than the amount, the newest first
  eventCount = 0; // the seq of the newest event
  #times = new Map(); // by cursor, when an event was recorded; of the latest events
  #logged = null; // the newest record in the log
  #oldEpochs = new Set();
  #announce;

  constructor(id, announce) {
    this.id = id;
    this.#announce = announce;
  }

  /** Read the snapshot and what came before it. Rejects with an error that can be shown. */
  async load(signal) {
    const { body } = await requestJson(sessionPath(this.id, "/status"), { signal });
    this.onStatus(body);
    const query = { after: cursorBefore(body.id, HISTORY), limit: HISTORY };
    try {
      const { body: history } = await requestJson(sessionPath(this.id, "/events", query), { signal });
      for (const message of history.events) this.#log(message);
    } catch {
      // The page can do without.
    }
    this.#noteStage(this.record.stage);
    scheduleRender();
  }

  /** The age of the record in seconds. */
  get age() {
    return Math.max(0, serverNow() - Date.parse(this.record.updated_at)) / 1000;
  }

  /** Store a snapshot. */
  onStatus(body) {
    this.existence = "present";
    this.#update(body, body.id);
    scheduleRender();
  }

  /** Take a record that was polled, which may be older than the session's end. */
  onPolled(record) {
    if (this.existence === "present") this.onStatus(record);
  }

  onGone() {
    if (this.existence === "present") this.existence = "gone";
    scheduleRender();
  }

  onMessage({ id, event, data }) {
    if (event === "deleted") this.existence = "deleted";
    if (id === null || event === null || !this.#isCurrent(parseCursor(id).epoch)) return;
    this.existence = "present";
    if (isRecord(event)) {
      this.#noteTime(id, data.updated_at);
      this.#update(data, id);
    } else if (event === "control" && this.record && this.#isNews(id)) this.record.control = data?.control;
    else if (event === "stalled" && this.#isNews(id)) this.stalled = true;
    this.#log({ id, event, data });
  }

  #noteTime(id, time) {
    this.#times.set(id, time);
    if (this.#times.size > MAX_TIMES) this.#times.delete(this.#times.keys().next().value);
  }

  /** The times of the events between two, given as parsed cursors of one log, as far as they are known. */
  timesBetween(first, last) {
    const isBetween = ({ epoch, seq }) => epoch === last.epoch && seq > first.seq && seq < last.seq;
    return [...this.#times].filter(([id]) => isBetween(parseCursor(id))).map(([, time]) => time);
  }

  /** Whether an epoch is that of the log as it is now, or of a newer one. */
  #isCurrent(epoch) {
    return !this.#oldEpochs.has(epoch);
  }

  /** Whether an event is not older than the record. */
  #isNews(id) {
    const [current, next] = [parseCursor(this.cursor), parseCursor(id)];
    return current.epoch !== next.epoch || next.seq > current.seq;
  }

  /** Take a record, unless a newer one is known already. */
  #update(record, cursor) {
    const { epoch, seq } = parseCursor(cursor);
    if (!this.#isCurrent(epoch)) return;
    const current = this.cursor === null ? null : parseCursor(this.cursor);
    if (current !== null && current.epoch !== epoch) {
      this.#oldEpochs.add(current.epoch);
      this.record = null;
      this.stages = [];
      this.latest = [];
      this.eventCount = 0;
      this.#logged = null;
      // An event has no title, and the new session may have another one.
      if (!("created_at" in record)) {
        requestJson(sessionPath(this.id, "/status")).then(
          ({ body }) => this.onStatus(body),
          () => {},
        );
      }
    } else if (current !== null && seq <= current.seq && !(seq === current.seq && record.created_at)) {
      return;
    }
    const previous = this.record;
    this.record = mergeRecord(previous, record);
    this.cursor = cursor;
    this.stalled = false;
    this.#announceChange(previous, this.record);
  }

  #noteStage(stage) {
    if (stage !== undefined && !this.stages.includes(stage) && this.stages.length < MAX_STAGES) this.stages.push(stage);
  }

  /** Note the events of the log, once and in order, whichever subscription is the first to deliver them. */
  #log({ id, event, data }) {
    const { epoch, seq } = parseCursor(id);
    if (epoch !== parseCursor(this.cursor).epoch || seq <= this.eventCount) return;
    this.eventCount = seq;
    if (isRecord(event)) {
      const previous = this.#logged;
      this.#logged = data;
      this.#noteStage(data.stage);
      if (previous !== null && ["state", "status", "stage"].every((name) => previous[name] === data[name])) return;
    }
    this.latest.unshift({ seq, type: event, data });
    this.latest.length = Math.min(this.latest.length, MAX_LATEST);
  }

  #announceChange(previous, record) {
    if (previous === null) return;
    const name = record.title ?? this.id;
    if (previous.state !== record.state) this.#announce(`${name}: ${record.state}`);
    else if (previous.stage !== record.stage && record.stage) this.#announce(`${name}: stage ${record.stage}`);
  }
}
