// The watch page: user actions, the selected session, and rendering.

import { requestJson, sessionPath } from "./api.js";
import { renderArtifacts } from "./artifacts.js";
import { byId, createElement, onClick, reconcile, setAttribute, setDisabled, setHidden, setText } from "./dom.js";
import { formatDuration, formatNumber, formatPercent } from "./format.js";
import * as longpoll from "./longpoll.js";
import { errorText, isActive, isEnded, parseCursor } from "./session.js";
import * as sse from "./sse.js";
import { scheduleRender, setRenderer, state } from "./state.js";
import { createSubscriptionCard, renderSubscription } from "./subscription-view.js";
import { Subscription } from "./subscription.js";
import * as websocket from "./websocket.js";

const LIST_INTERVAL = 3000; // ms
const MAX_LISTED = 8;

// --- Actions ------------------------------------------------------------------------------------

/** Store a record from a subscription, unless another one has already delivered a newer record. */
function updateJob(record, cursor) {
  const next = parseCursor(cursor);
  const current = state.job?.cursor ? parseCursor(state.job.cursor) : null;
  if (current?.epoch === next.epoch && next.seq <= current.seq) return;
  const previous = state.job;
  state.job = { control: previous?.control, title: previous?.title, ...record, cursor };
  announceProgress(previous, state.job);
}

function onMessage({ id, event, data }) {
  if (event === "control" && state.job) state.job.control = data.control;
  else if (event === "deleted" && state.job) state.job.deleted = true;
  else if (id !== null && typeof data?.progress === "number") updateJob(data, id);
}

/** Send a POST request. Returns the response body, or null after an error, which is shown. */
async function post(path) {
  state.error = "";
  try {
    return (await requestJson(path, { method: "POST" })).body;
  } catch (error) {
    state.error = error.message;
    return null;
  } finally {
    scheduleRender();
  }
}

async function startDemoJob() {
  state.starting = true;
  scheduleRender();
  const job = await post("/api/quick/demo");
  state.starting = false;
  if (job) {
    announce(`Started job ${job.session_id}`);
    location.hash = encodeURIComponent(job.session_id);
    refreshSessions();
  }
  scheduleRender();
}

/** Send `pause`, `resume` or `cancel` for the selected session. */
async function sendCommand(command) {
  const id = state.selectedId;
  const response = await post(sessionPath(id, `/${command}`));
  if (response && state.selectedId === id && state.job) {
    state.job.control = { pause: "pause", resume: "continue", cancel: "cancel" }[command];
    scheduleRender();
  }
}

async function selectSession(id) {
  if (state.selectedId === id) return;
  state.selectedId = id;
  state.job = null;
  state.error = "";
  for (const subscription of state.subscriptions) subscription.stop();
  scheduleRender();
  try {
    const { body } = await requestJson(sessionPath(id, "/status"));
    if (state.selectedId !== id) return;
    if (state.job === null) state.job = { ...body, cursor: body.id };
  } catch (error) {
    if (state.selectedId !== id) return;
    state.error = error.message;
    if (error.status) {
      scheduleRender();
      return; // The server refuses this session; the three subscriptions would get the same error.
    }
  }
  for (const subscription of state.subscriptions) subscription.start(id);
  scheduleRender();
}

function selectSessionFromHash() {
  try {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id) selectSession(id);
  } catch {
    state.error = "Invalid link: the session ID after # is not correctly encoded.";
    scheduleRender();
  }
}

async function refreshSessions() {
  try {
    const { body } = await requestJson("/api/sessions");
    state.sessions = body.sessions;
    state.listError = "";
    const newest = state.sessions.filter((session) => isActive(session.state)).sort(newestFirst)[0];
    if (state.selectedId === null && newest) selectSession(newest.session_id);
  } catch (error) {
    state.listError = error.message;
  }
  scheduleRender();
}

const newestFirst = (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at);

// --- Screen reader announcements: changes of state and stage, not every percent -----------------

function announce(text) {
  byId("announcements").textContent = text;
}

function announceProgress(previous, job) {
  if (previous === null || previous.session_id !== job.session_id) return;
  if (previous.state !== job.state) announce(`Job ${job.session_id} ${job.state}`);
  else if (previous.stage !== job.stage && job.stage) announce(`Stage ${job.stage}, ${formatPercent(job.progress)}`);
}

// --- Rendering ----------------------------------------------------------------------------------

const PHASE_ITEMS = [...byId("phases").children];
const PHASES = PHASE_ITEMS.map((item) => item.dataset.phase);

function renderPhases(job) {
  const current = PHASES.indexOf(job.phase);
  const currentStatus = isEnded(job.state) ? "stopped" : "active";
  setHidden(byId("phases"), current < 0);
  PHASE_ITEMS.forEach((item, index) => {
    const done = index < current || (index === current && job.state === "succeeded");
    setAttribute(item, "data-status", done ? "done" : index === current ? currentStatus : "pending");
    setAttribute(item, "aria-current", index === current && !isEnded(job.state) ? "step" : null);
  });
}

function jobMessage(job) {
  if (job.deleted) return "This session was deleted.";
  if (!isEnded(job.state) && job.control === "cancel") return "Cancelling: waiting for the worker’s next update.";
  if (job.state === "running" && job.control === "pause") return "Pausing: waiting for the worker’s next update.";
  return [job.message, errorText(job.error)].filter(Boolean).join(": ");
}

function renderConnectionSummary() {
  const { subscriptions } = state;
  const connected = subscriptions.filter((subscription) => subscription.state === "connected").length;
  const complete = subscriptions.every((subscription) => subscription.state === "complete");
  const summary = byId("connection-summary");
  setHidden(summary, state.selectedId === null || state.job === null);
  setAttribute(summary, "data-state", complete ? "complete" : connected ? "connected" : "reconnecting");
  const connectedText = connected ? `${connected} of ${subscriptions.length} connected` : "not connected";
  setText(summary, complete ? "complete" : connectedText);
}

const NO_JOB_TEXT = byId("job-empty").textContent;

function renderJob() {
  const { job } = state;
  setHidden(byId("job-empty"), job !== null);
  setText(byId("job-empty"), state.selectedId === null ? NO_JOB_TEXT : "No data for this session.");
  setHidden(byId("job-body"), job === null);
  setText(byId("job-title"), [job?.title, state.selectedId].filter(Boolean).join(" ") || "No job yet");
  const badge = byId("job-state");
  setHidden(badge, job === null);
  document.title = job === null ? "sseserve" : `${formatPercent(job.progress)} ${state.selectedId} – sseserve`;
  if (job === null) return;
  setText(badge, job.status);
  setAttribute(badge, "data-state", job.state);
  setText(byId("job-percent"), formatPercent(job.progress));
  byId("job-progress").value = job.progress;
  renderPhases(job);
  setText(byId("job-message"), jobMessage(job));
  const ended = isEnded(job.state);
  setText(byId("job-eta"), job.eta !== undefined && !ended ? `about ${formatDuration(job.eta)}` : "–");
  const end = Date.parse(job.ended_at ?? job.updated_at);
  const elapsed = job.started_at ? (end - Date.parse(job.started_at)) / 1000 : null;
  setText(byId("job-elapsed-label"), ended ? "Ran for" : "Running for");
  setText(byId("job-elapsed"), elapsed === null ? "–" : formatDuration(elapsed));
  setText(byId("job-rate"), job.rate !== undefined && !ended ? `${formatNumber(job.rate)} %/s` : "–");
  const paused = job.state === "paused" || job.control === "pause";
  const uncontrollable = ended || job.deleted || job.control === "cancel";
  setText(byId("pause"), paused ? "Resume" : "Pause");
  setDisabled(byId("pause"), uncontrollable);
  setDisabled(byId("cancel"), uncontrollable);
}

function createSessionItem(session) {
  const link = createElement("a", { href: `#${encodeURIComponent(session.session_id)}` },
    createElement("span", { class: "session-id", text: session.session_id }), " ",
    createElement("span"), " ",
    createElement("span", { class: "badge" }));
  return createElement("li", {}, link);
}

function updateSessionItem(item, session) {
  const [link] = item.children;
  const [, percent, badge] = link.children;
  // For the selected session the page has a record at least as new as the list's.
  const selected = session.session_id === state.selectedId;
  const record = selected && state.job !== null ? state.job : session;
  setText(percent, formatPercent(record.progress));
  setText(badge, record.status);
  setAttribute(badge, "data-state", record.state);
  setAttribute(link, "aria-current", selected ? "true" : null);
}

function renderSessions() {
  const listed = [
    ...state.sessions.filter((session) => isActive(session.state)).sort(newestFirst),
    ...state.sessions.filter((session) => isEnded(session.state)).sort(newestFirst),
  ].slice(0, MAX_LISTED);
  setHidden(byId("sessions-empty"), listed.length > 0 || state.listError !== "");
  setHidden(byId("sessions-error"), state.listError === "");
  setText(byId("sessions-error"), state.listError);
  reconcile(byId("sessions"), listed, {
    key: (session) => session.session_id,
    create: createSessionItem,
    update: updateSessionItem,
  });
}

function render() {
  const startButton = byId("start");
  setText(startButton, state.starting ? "Starting…" : "Start demo job");
  setDisabled(startButton, state.starting);
  setHidden(byId("error"), state.error === "");
  setText(byId("error"), state.error);
  renderJob();
  renderConnectionSummary();
  renderSessions();
  renderArtifacts(byId("artifacts"), byId("previews"), byId("files"), state.job?.artifacts ?? []);
  for (const subscription of state.subscriptions) renderSubscription(subscription);
}

// --- Initialization -----------------------------------------------------------------------------

for (const [name, transport] of Object.entries({ SSE: sse, WebSocket: websocket, "Long polling": longpoll })) {
  const latestCursor = () => state.job?.cursor ?? null;
  const subscription = new Subscription({ name, connect: transport.connect, onMessage, latestCursor });
  state.subscriptions.push(subscription);
  byId("subscriptions").append(createSubscriptionCard(subscription, transport, announce));
}

setRenderer(render);
onClick(byId("start"), startDemoJob);
onClick(byId("pause"), () => sendCommand(byId("pause").textContent === "Resume" ? "resume" : "pause"));
onClick(byId("cancel"), () => sendCommand("cancel"));
window.addEventListener("hashchange", selectSessionFromHash);
selectSessionFromHash();
scheduleRender();

(async function pollSessions() {
  await refreshSessions();
  setTimeout(pollSessions, LIST_INTERVAL);
})();
