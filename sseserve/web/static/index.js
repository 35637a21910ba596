// The watch page: user actions, the selected session, and the list of sessions.

import { requestJson, sessionPath } from "./api.js";
import { renderArtifacts } from "./artifacts.js";
import { auth, hasToken, onSignedIn } from "./auth.js";
import { Degradation } from "./degradation.js";
import { byId, createElement, onClick, reconcile, setAttribute, setDisabled, setHidden, setText } from "./dom.js";
import { formatCount } from "./format.js";
import * as longpoll from "./longpoll.js";
import * as polling from "./polling.js";
import { renderSession } from "./session-view.js";
import { createSignIn, renderSignIn } from "./sign-in.js";
import * as sse from "./sse.js";
import { describeSession, isActive, isEnded, percentText } from "./state.js";
import { bannerText, onReachableAgain, scheduleRender, setRenderer, store } from "./store.js";
import { createSubscriptionCard, renderSubscription } from "./subscription-view.js";
import { Subscription } from "./subscription.js";
import { WatchedSession } from "./watched-session.js";
import * as websocket from "./websocket.js";

const LIST_INTERVAL = 3000; // ms
const MAX_LISTED = 8;
const EXAMPLE = '{"progress": 40, "message": "12 of 30 files"}';

Object.assign(store, {
  sessions: null, // the records of the newest sessions; null: not known yet
  total: 0, // how many sessions there are
  session: null, // the selected one
  error: "", // the message of the last failed action
  starting: false,
  pending: null, // the command that is being sent
});

const subscriptions = [];

// Whether the form that asks for a token says what is wrong.
const isAsked = (error) => error.status === 401 && auth.asked !== "";

// --- Actions ------------------------------------------------------------------------------------

/** Send a POST request. Returns the response body, or null after an error, which is shown. */
async function post(path) {
  store.error = "";
  try {
    return (await requestJson(path, { method: "POST" })).body;
  } catch (error) {
    if (!isAsked(error)) store.error = error.message;
    return null;
  } finally {
    scheduleRender();
  }
}

async function startDemoJob() {
  store.starting = true;
  scheduleRender();
  const job = await post("/api/quick/demo");
  store.starting = false;
  if (job) {
    announce("Started a demo job");
    location.hash = encodeURIComponent(job.session_id);
    refreshSessions();
  }
  scheduleRender();
}

/** Send `pause`, `resume` or `cancel` for the selected session. The response is its record. */
async function sendCommand(command) {
  const { session } = store;
  store.pending = command;
  const record = await post(sessionPath(session.id, `/${command}`));
  store.pending = null;
  if (record) session.onStatus(record);
  scheduleRender();
}

async function selectSession(id) {
  if (store.session?.id === id) return;
  const session = new WatchedSession(id, announce);
  store.session = session;
  store.error = "";
  store.pending = null;
  for (const subscription of subscriptions) subscription.stop();
  scheduleRender();
  for (;;) {
    try {
      await session.load();
      break;
    } catch (error) {
      if (store.session !== session) return;
      if (isAsked(error)) return;
      if (error.status) {
        store.error = error.status === 404 ? `There is no session “${id}” on this server.` : error.message;
        scheduleRender();
        if (error.status !== 503) return; // The subscriptions would get the same error.
      }
      await new Promise((resolve) => setTimeout(resolve, LIST_INTERVAL));
      if (store.session !== session) return;
    }
  }
  if (store.session !== session) return;
  store.error = "";
  for (const subscription of subscriptions) subscription.start(id, session.record);
  scheduleRender();
}

function selectSessionFromHash() {
  try {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id) selectSession(id);
  } catch {
    store.error = "Invalid link: the session ID after # is not correctly encoded.";
    scheduleRender();
  }
}

async function refreshSessions() {
  try {
    const { body, response } = await requestJson("/api/sessions");
    store.sessions = body.sessions;
    store.total = Number(response.headers.get("X-Total-Count") ?? body.sessions.length);
    store.listError = "";
    const [first] = listedSessions();
    if (store.session === null && first) selectSession(first.session_id);
    watchAgain();
  } catch (error) {
    store.listError = error.status && !isAsked(error) ? error.message : "";
  }
  scheduleRender();
}

/** Go on with what was refused. */
function resumeSignedIn() {
  const id = store.session?.record === null ? store.session.id : null;
  if (id !== null) {
    store.session = null;
    selectSession(id);
  }
  for (const subscription of subscriptions) subscription.retryRefused();
  refreshSessions();
}

/**
 * Watch the selected session again if it was gone and has come back, as after a restart of the server. One
 * transport may have found it gone, and the next one that it is there again.
 */
function watchAgain() {
  const { session } = store;
  const record = session && store.sessions.find(({ session_id }) => session_id === session.id);
  if (!record) return;
  if (session.existence !== "present") session.onStatus(record);
  else if (isEnded(record.state) || isEnded(session.record?.state)) return;
  for (const subscription of subscriptions) if (subscription.state === "finished") subscription.reconnect();
}

const newestFirst = (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at);

function listedSessions() {
  const sessions = store.sessions ?? [];
  return [
    ...sessions.filter((session) => isActive(session.state)).sort(newestFirst),
    ...sessions.filter((session) => !isActive(session.state)).sort(newestFirst),
  ].slice(0, MAX_LISTED);
}

// Screen reader announcements: changes of state and stage, not every percent.
function announce(text) {
  byId("announcements").textContent = text;
}

// --- Rendering ----------------------------------------------------------------------------------

function createSessionItem(session) {
  const link = createElement(
    "a",
    { href: `#${encodeURIComponent(session.session_id)}` },
    createElement("span", { class: "session-name" }),
    " ",
    createElement("span"),
    " ",
    createElement("span", { class: "badge" }),
  );
  return createElement("li", {}, link);
}

function updateSessionItem(item, listed) {
  const [link] = item.children;
  const [name, percent, badge] = link.children;
  // For the selected session the page has a record at least as new as the list's.
  const selected = store.session?.id === listed.session_id;
  const known = selected && store.session.record !== null;
  const description = known ? describeSession(store.session) : describeSession({ record: listed });
  setText(name, listed.title ?? listed.session_id);
  setAttribute(name, "title", listed.title ? `${listed.title} (${listed.session_id})` : listed.session_id);
  setText(percent, percentText(description));
  setText(badge, description.label);
  setAttribute(badge, "data-tone", description.tone);
  setAttribute(link, "aria-current", selected ? "true" : null);
}

function renderSessions() {
  const listed = listedSessions();
  const more = Math.max(0, store.total - listed.length);
  setHidden(byId("sessions-card"), store.sessions === null && !store.listError);
  setHidden(byId("sessions-empty"), listed.length > 0 || !store.sessions);
  setHidden(byId("sessions-error"), !store.listError);
  setText(byId("sessions-error"), store.listError ?? "");
  setHidden(byId("sessions-more"), more === 0);
  setText(byId("sessions-more-link"), `${formatCount(more, "more session")} on the dashboard`);
  reconcile(byId("sessions"), listed, {
    key: (session) => session.session_id,
    create: createSessionItem,
    update: updateSessionItem,
  });
}

function render() {
  renderSignIn();
  const empty = store.session === null && store.sessions?.length === 0;
  const unknown = store.session === null && store.sessions === null && !store.listError && !store.error;
  const refused = auth.asked !== "" && !store.session?.record; // There is nothing to see without a token.
  const credentials = hasToken() ? ' -H "Authorization: Bearer $TOKEN"' : "";
  setText(byId("curl"), `curl ${location.origin}/api/sessions/my-session/progress${credentials} -d '${EXAMPLE}'`);
  setHidden(byId("welcome"), !empty);
  setHidden(byId("watch"), empty || unknown || refused);
  for (const button of document.querySelectorAll("[data-start]")) {
    setText(button, store.starting ? "Starting…" : button.dataset.start);
    setDisabled(button, store.starting || !store.reachable);
  }
  const banner = bannerText(subscriptions.map(({ problem }) => problem).find(Boolean) ?? "");
  setHidden(byId("offline"), banner === "");
  setText(byId("offline"), banner);
  setHidden(byId("error"), store.error === "");
  setText(byId("error"), store.error);
  const { session } = store;
  renderSession(
    session,
    subscriptions.map(({ state }) => state),
    store.pending,
  );
  if (session === null || session.record === null) document.title = "sseserve";
  renderSessions();
  const artifacts = session?.record?.artifacts;
  renderArtifacts(byId("artifacts"), Array.isArray(artifacts) ? artifacts : []);
  setHidden(byId("transports"), session === null || session.record === null);
  const newest = Math.max(...subscriptions.map(({ delays }) => delays.newest));
  for (const subscription of subscriptions) renderSubscription(subscription, session, newest);
}

async function copyCommand() {
  const command = byId("curl");
  try {
    await navigator.clipboard.writeText(command.textContent);
    announce("Copied");
    byId("copy").textContent = "Copied";
  } catch {
    // Without a secure context there is no clipboard: select the command instead.
    getSelection().selectAllChildren(command);
    byId("copy").textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (byId("copy").textContent = "Copy"), 3000);
}

// --- Initialization -----------------------------------------------------------------------------

const session = {
  onMessage: (message) => store.session?.onMessage(message),
  onStatus: (record) => store.session?.onStatus(record),
  onPolled: (record) => store.session?.onPolled(record),
  onGone: () => {
    store.session?.onGone();
    for (const subscription of subscriptions) subscription.noteGone();
  },
  timesBetween: (first, last) => store.session.timesBetween(first, last),
  get newest() {
    return store.session.newest;
  },
};

const transports = { SSE: sse, WebSocket: websocket, "Long polling": longpoll, Polling: polling };
for (const [name, transport] of Object.entries(transports)) {
  const degradation = new Degradation();
  const subscription = new Subscription({
    name,
    connect: degradation.wrap(transport),
    hasLog: transport.hasLog,
    session,
  });
  subscriptions.push(subscription);
  byId("subscriptions").append(createSubscriptionCard(subscription, { transport, degradation, announce }));
}

// A browser uses one protocol for all requests to a server, except WebSocket.
const [{ nextHopProtocol }] = performance.getEntriesByType("navigation");
byId("protocol").textContent = `This page and its event stream use ${nextHopProtocol === "h2" ? "HTTP/2" : "HTTP/1.1"}.`;

createSignIn();
onClick(byId("copy"), copyCommand);
for (const button of document.querySelectorAll("[data-start]")) onClick(button, startDemoJob);
onClick(byId("pause"), () => sendCommand(describeSession(store.session).controls.resumes ? "resume" : "pause"));
onClick(byId("cancel"), () => sendCommand("cancel"));
window.addEventListener("hashchange", selectSessionFromHash);
onReachableAgain(() => subscriptions.forEach((subscription) => subscription.retryNow()));
onSignedIn(resumeSignedIn);
setRenderer(render);
selectSessionFromHash();

(async function pollSessions() {
  if (!auth.asked) await refreshSessions();
  setTimeout(pollSessions, LIST_INTERVAL);
})();
