// The one truth about a session: the words, colour, bar and buttons for its record. What a page shows of a
// session's state comes from here, and never from the state of a connection.

const STATES = {
  queued: { tone: "neutral", note: "Waiting to start." },
  running: { tone: "active" },
  paused: { tone: "warning" },
  succeeded: { tone: "success", ended: true },
  failed: { tone: "danger", ended: true },
  cancelled: { tone: "neutral", ended: true },
  lost: { tone: "danger", ended: true, note: "The worker has not been heard of for three times its lease." },
  // The record does not say these: the server does.
  deleted: { tone: "neutral", over: true, note: "This session was deleted." },
  gone: {
    tone: "neutral",
    over: true,
    note: "The server no longer has this session: it has expired, was deleted, or the server was restarted.",
  },
};

export const ACTIVE_STATES = Object.keys(STATES).filter((state) => !STATES[state].ended && !STATES[state].over);
export const ENDED_STATES = Object.keys(STATES).filter((state) => STATES[state].ended);

export const isActive = (state) => ACTIVE_STATES.includes(state);
export const isEnded = (state) => ENDED_STATES.includes(state);

/** The text of a record's `error`, which publishers may set to a string or to any object. */
export const errorText = (error) =>
  error === null || error === undefined
    ? ""
    : typeof error === "string"
      ? error
      : String(error.message ?? JSON.stringify(error));

/**
 * Describe a session.
 *
 * `existence`: "present", "deleted" or "gone". `stalled`: the worker has been silent for longer than its lease.
 *
 * Returns:
 *   label      the state in one word
 *   tone       neutral, active, warning, success or danger: the colour of everything that shows the state
 *   active     whether the work goes on
 *   message    what to say about it, with the error if there is one
 *   value      percent from 0 to 100, rounded down so that 100 is only at the end; null: unknown
 *   bar        how much of the bar is filled, in percent; null: indeterminate. What has not begun is empty
 *   busy       whether an unknown amount is in motion
 *   status     the publisher's own word for the state, if it is another one
 *   controls   null, or { resumes, asked }: whether the first button resumes, and whether cancelling was asked
 */
export function describeSession({ record, existence = "present", stalled = false }) {
  const name = existence === "present" ? record.state : existence;
  const state = STATES[name] ?? STATES.running;
  const active = isActive(name);
  const unknown = record.indeterminate === true && name !== "succeeded";
  return {
    label: name,
    tone: active && stalled ? "warning" : state.tone,
    active,
    message: sessionMessage(name, state, record, stalled),
    value: unknown ? null : Math.floor(record.progress),
    bar: unknown && name !== "queued" ? null : Math.floor(record.progress),
    busy: unknown && name === "running" && !stalled,
    status: record.status === record.state ? "" : record.status,
    controls: active
      ? { resumes: record.state === "paused" || record.control === "pause", asked: record.control === "cancel" }
      : null,
  };
}

function sessionMessage(name, state, record, stalled) {
  if (state.over) return state.note;
  if (isActive(name) && record.control === "cancel") return "Cancelling: waiting for the worker’s next update.";
  if (name === "running" && record.control === "pause") return "Pausing: waiting for the worker’s next update.";
  if (isActive(name) && stalled) return "The worker has not been heard of for longer than its lease.";
  // The server says what went wrong in both if the publisher did so in the message.
  const texts = new Set([record.message, errorText(record.error)].filter(Boolean));
  return [...texts].join(": ") || (state.note ?? "");
}

export const percentText = ({ value }) => (value === null ? "–" : `${value}%`);

/**
 * Seconds that the work will still take, or null if nobody can say. `age` is that of the record, in seconds;
 * `live`: newer records would arrive here.
 */
export function remainingTime(record, description, age, live) {
  if (!live || !description.active || record.eta === undefined || record.state !== "running") return null;
  const remaining = record.eta - age;
  return remaining > -2 ? Math.max(1, remaining) : null;
}

// --- Connections: shown beside the state, never instead of it -------------------------------------

export const CONNECTIONS = {
  idle: { label: "not connected", tone: "neutral" },
  connecting: { label: "connecting", tone: "warning" },
  connected: { label: "connected", tone: "success" },
  reconnecting: { label: "reconnecting", tone: "warning" },
  disconnected: { label: "disconnected", tone: "neutral" },
  finished: { label: "finished", tone: "neutral" }, // nothing will follow
  blocked: { label: "blocked", tone: "danger" }, // the server can be reached, but not over this transport
  refused: { label: "refused", tone: "danger" },
};

/** Describe several connections to one session together. */
export function describeConnections(states, description, reachable) {
  const count = (name) => states.filter((state) => state === name).length;
  if (description.label === "deleted" || description.label === "gone") return { label: "", tone: "neutral" };
  if (!description.active && count("finished") > 0) return { label: "all events received", tone: "neutral" };
  if (!reachable) return { label: "offline", tone: "warning" };
  const connected = count("connected");
  if (connected === 0) return { label: "not connected", tone: "warning" };
  return { label: `${connected} of ${states.length} connected`, tone: "success" };
}
