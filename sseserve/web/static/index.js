// The page: what is pressed, which session is watched, and how the state is drawn.

import { ask, sessionPath } from "./api.js";
import { drawResults } from "./artifacts.js";
import { byId, element, onPress, reconcile, setAttribute, setHidden, setOff, setText } from "./dom.js";
import { Lane } from "./lane.js";
import { drawLane, makeLane } from "./laneview.js";
import * as longpoll from "./longpoll.js";
import {
  errorText, formatDuration, formatNumber, formatPercent, isActive, isEnded, readCursor,
} from "./model.js";
import * as sse from "./sse.js";
import { changed, onChange, state } from "./state.js";
import * as websocket from "./websocket.js";

const LIST_EVERY = 3000; // ms
const LISTED = 8;

// --- What happens -------------------------------------------------------------------------------

/** Take over a record that a lane brought, unless another lane has brought a newer one. */
function learn(record, cursor) {
  const now = readCursor(cursor);
  const known = state.job?.cursor ? readCursor(state.job.cursor) : null;
  if (known?.epoch === now.epoch && now.seq <= known.seq) return;
  const before = state.job;
  state.job = { control: before?.control, title: before?.title, ...record, cursor };
  announceProgress(before, state.job);
}

function onMessage({ id, event, data }) {
  if (event === "control" && state.job) state.job.control = data.control;
  else if (event === "deleted" && state.job) state.job.deleted = true;
  else if (id !== null && typeof data?.progress === "number") learn(data, id);
}

async function act(path) {
  state.trouble = "";
  try {
    return (await ask(path, { method: "POST" })).body;
  } catch (error) {
    state.trouble = error.message;
    return null;
  } finally {
    changed();
  }
}

async function start() {
  state.starting = true;
  changed();
  const made = await act("/api/quick/demo");
  state.starting = false;
  if (made) {
    announce(`Started job ${made.session_id}`);
    location.hash = encodeURIComponent(made.session_id);
    refreshList();
  }
  changed();
}

async function control(wish) {
  const id = state.selected;
  const answer = await act(sessionPath(id, `/${wish}`));
  if (answer && state.selected === id && state.job) {
    state.job.control = { pause: "pause", resume: "continue", cancel: "cancel" }[wish];
    changed();
  }
}

async function select(id) {
  if (state.selected === id) return;
  state.selected = id;
  state.job = null;
  state.trouble = "";
  for (const lane of state.lanes) lane.stop();
  changed();
  try {
    const { body } = await ask(sessionPath(id, "/status"));
    if (state.selected !== id) return;
    if (state.job === null) state.job = { ...body, cursor: body.id };
  } catch (error) {
    if (state.selected !== id) return;
    state.trouble = error.message;
    if (error.status) {
      changed();
      return; // it is refused; asking again over three lanes would not help
    }
  }
  for (const lane of state.lanes) lane.start(id);
  changed();
}

function selectFromHash() {
  try {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id) select(id);
  } catch {
    state.trouble = "The address names no session: what stands after # cannot be read.";
    changed();
  }
}

async function refreshList() {
  try {
    const { body } = await ask("/api/sessions");
    state.sessions = body.sessions;
    state.listTrouble = "";
    const newest = state.sessions.filter((session) => isActive(session.state)).sort(byAge)[0];
    if (state.selected === null && newest) select(newest.session_id);
  } catch (error) {
    state.listTrouble = error.message;
  }
  changed();
}

const byAge = (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at);

// --- What a screen reader is told: phases and ends, not each percent ----------------------------

function announce(text) {
  byId("announcer").textContent = text;
}

function announceProgress(before, job) {
  if (before === null || before.session_id !== job.session_id) return;
  if (before.state !== job.state) announce(`Job ${job.session_id} ${job.state}`);
  else if (before.stage !== job.stage && job.stage) announce(`Stage ${job.stage}, ${formatPercent(job.progress)}`);
}

// --- How it is drawn ----------------------------------------------------------------------------

const PHASES = [...byId("phases").children];
const ORDER = PHASES.map((step) => step.dataset.phase);

function drawPhases(job) {
  const at = ORDER.indexOf(job.phase);
  setHidden(byId("phases"), at < 0);
  PHASES.forEach((step, index) => {
    const done = index < at || (index === at && job.state === "succeeded");
    setAttribute(step, "data-step", done ? "done" : index === at ? (isEnded(job.state) ? "stopped" : "now") : "next");
    setAttribute(step, "aria-current", index === at && !isEnded(job.state) ? "step" : null);
  });
}

function messageOf(job) {
  const error = errorText(job.error);
  if (job.deleted) return "This session was deleted.";
  if (!isEnded(job.state) && job.control === "cancel") return "Asked to cancel; the worker will see it with its next update.";
  if (job.state === "running" && job.control === "pause") return "Asked to pause; the worker will see it with its next update.";
  return [job.message, error].filter(Boolean).join(": ");
}

function drawConnection() {
  const open = state.lanes.filter((lane) => lane.state === "open").length;
  const over = state.lanes.every((lane) => lane.state === "ended");
  const badge = byId("connection");
  setHidden(badge, state.selected === null || state.job === null);
  setAttribute(badge, "data-state", over ? "ended" : open ? "open" : "lost");
  setText(badge, over ? "complete" : open ? `live over ${open} of ${state.lanes.length}` : "not connected");
}

const WAITING = byId("job-none").textContent;

function drawJob() {
  const { job } = state;
  setHidden(byId("job-none"), job !== null);
  setText(byId("job-none"), state.selected === null ? WAITING : "There is nothing to show of this session.");
  setHidden(byId("job-body"), job === null);
  setText(byId("job-title"), [job?.title, state.selected].filter(Boolean).join(" ") || "No job yet");
  const badge = byId("job-state");
  setHidden(badge, job === null);
  document.title = job === null ? "sseserve" : `${formatPercent(job.progress)} ${state.selected} – sseserve`;
  if (job === null) return;
  setText(badge, job.status);
  setAttribute(badge, "data-state", job.state);
  setText(byId("job-percent"), formatPercent(job.progress));
  byId("job-progress").value = job.progress;
  drawPhases(job);
  setText(byId("job-message"), messageOf(job));
  const ended = isEnded(job.state);
  setText(byId("job-eta"), job.eta !== undefined && !ended ? `about ${formatDuration(job.eta)}` : "–");
  const until = Date.parse(job.ended_at ?? job.updated_at);
  const elapsed = job.started_at ? (until - Date.parse(job.started_at)) / 1000 : null;
  setText(byId("elapsed-label"), ended ? "Ran for" : "Running for");
  setText(byId("job-elapsed"), elapsed === null ? "–" : formatDuration(elapsed));
  setText(byId("job-rate"), job.rate !== undefined && !ended ? `${formatNumber(job.rate)} %/s` : "–");
  const paused = job.state === "paused" || job.control === "pause";
  const over = ended || job.deleted || job.control === "cancel";
  setText(byId("pause"), paused ? "Resume" : "Pause");
  setOff(byId("pause"), over);
  setOff(byId("cancel"), over);
}

function drawSessions() {
  const shown = [
    ...state.sessions.filter((session) => isActive(session.state)).sort(byAge),
    ...state.sessions.filter((session) => isEnded(session.state)).sort(byAge),
  ].slice(0, LISTED);
  setHidden(byId("sessions-none"), shown.length > 0 || state.listTrouble !== "");
  setHidden(byId("sessions-trouble"), state.listTrouble === "");
  setText(byId("sessions-trouble"), state.listTrouble);
  reconcile(byId("sessions"), shown, {
    key: (session) => session.session_id,
    make: (session) =>
      element("li", {}, element("a", { href: `#${encodeURIComponent(session.session_id)}` },
        element("span", { class: "name", text: session.session_id }), " ",
        element("span", { class: "amount" }), " ",
        element("span", { class: "badge" }))),
    fill: (item, session) => {
      const [link] = item.children;
      const [, amount, badge] = link.children;
      // The session on show is at least as new here as in the list.
      const record = session.session_id === state.selected && state.job !== null ? state.job : session;
      setText(amount, formatPercent(record.progress));
      setText(badge, record.status);
      setAttribute(badge, "data-state", record.state);
      setAttribute(link, "aria-current", session.session_id === state.selected ? "true" : null);
    },
  });
}

function draw() {
  const start = byId("start");
  setText(start, state.starting ? "Starting…" : "Start a job");
  setOff(start, state.starting);
  setHidden(byId("trouble"), state.trouble === "");
  setText(byId("trouble"), state.trouble);
  drawJob();
  drawConnection();
  drawSessions();
  drawResults(byId("results"), byId("previews"), byId("files"), state.job?.artifacts ?? []);
  for (const lane of state.lanes) drawLane(lane);
}

// --- Begin --------------------------------------------------------------------------------------

for (const [name, transport] of Object.entries({ SSE: sse, WebSocket: websocket, "Long-poll": longpoll })) {
  const lane = new Lane({ name, connect: transport.connect, onMessage, newest: () => state.job?.cursor ?? null });
  state.lanes.push(lane);
  byId("lanes").append(makeLane(lane, transport, announce));
}

onChange(draw);
onPress(byId("start"), start);
onPress(byId("pause"), () => control(byId("pause").textContent === "Resume" ? "resume" : "pause"));
onPress(byId("cancel"), () => control("cancel"));
window.addEventListener("hashchange", selectFromHash);
selectFromHash();
changed();

(async function keepListing() {
  await refreshList();
  setTimeout(keepListing, LIST_EVERY);
})();
