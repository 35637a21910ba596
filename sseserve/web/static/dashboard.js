// The dashboard: all sessions and what the server is doing, from one stream.

import { auth, onSignedIn } from "./auth.js";
import { byId, createElement, onClick, reconcile, setAttribute, setDisabled, setHidden, setText } from "./dom.js";
import { formatCount, formatDuration, formatNumber } from "./format.js";
import { SessionListStream } from "./list-stream.js";
import { renderBar } from "./session-view.js";
import { createSignIn, renderSignIn } from "./sign-in.js";
import { CONNECTIONS, describeSession, isActive, isEnded, percentText } from "./state.js";
import { bannerText, scheduleRender, serverNow, setRenderer } from "./store.js";

const narrow = matchMedia("(max-width: 44rem)"); // each row is a block then, as in the style sheet
const pageLength = () => (narrow.matches ? 10 : 25); // rows

const stream = new SessionListStream(scheduleRender);
const view = { paused: false, page: 0 };

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const STATE_ORDER = ["running", "paused", "queued", "failed", "lost", "cancelled", "succeeded"];
const name = (session) => session.title ?? session.session_id;

const ORDERS = {
  // Of those of the same millisecond the one with the higher number first.
  newest: (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at) || collator.compare(b.session_id, a.session_id),
  updated: (a, b) => Date.parse(b.updated_at) - Date.parse(a.updated_at),
  title: (a, b) => collator.compare(name(a), name(b)),
  state: (a, b) => STATE_ORDER.indexOf(a.state) - STATE_ORDER.indexOf(b.state),
  progress: (a, b) => b.progress - a.progress,
};

function matchesFilter({ state }, filter) {
  if (filter === "all") return true;
  if (filter === "active") return isActive(state);
  return filter === "ended" ? isEnded(state) : state === filter;
}

function matchesSearch(session, words) {
  const text = [session.session_id, session.title, session.status, session.stage, session.message, session.error]
    .filter(Boolean)
    .join(" ")
    .toLowerCase();
  return words.every((word) => text.includes(word));
}

const createCell = (label, ...children) => createElement("td", { "data-label": label }, ...children);

function createRow(session) {
  const link = createElement("a", { href: `/#${encodeURIComponent(session.session_id)}` });
  const bar = createElement("progress", { max: "100", "aria-label": "Progress" });
  return createElement(
    "tr",
    {},
    createElement(
      "th",
      { scope: "row", "data-label": "Session" },
      createElement("div", {}, link, createElement("span", { class: "session-id", text: session.session_id })),
    ),
    createCell("State", createElement("span", { class: "badge" })),
    createCell("Progress", createElement("span", { class: "progress-cell" }, bar, createElement("span"))),
    createCell("Stage", createElement("span", { class: "clip" })),
    createElement("td", { "data-label": "Message", class: "message" }, createElement("span", { class: "clip" })),
    createCell("Last update", createElement("span", { class: "nowrap" })),
  );
}

function updateRow(row, session) {
  const [title, badge, progress, stage, message, updated] = [...row.children].map((cell) => cell.firstChild);
  const description = describeSession({ record: session });
  setText(title.firstChild, name(session));
  setHidden(title.lastChild, name(session) === session.session_id);
  setText(badge, description.label);
  setAttribute(badge, "data-tone", description.tone);
  setAttribute(badge, "title", description.status || null);
  const [bar, percent] = progress.children;
  renderBar(bar, description);
  setText(percent, percentText(description));
  setText(stage, session.stage ?? "");
  setHidden(stage.parentElement, false);
  setAttribute(stage.parentElement, "data-empty", session.stage ? null : "true");
  setText(message, description.message);
  setAttribute(message, "title", description.message);
  setAttribute(message.parentElement, "data-empty", description.message ? null : "true");
  setText(updated, `${formatDuration((serverNow() - Date.parse(session.updated_at)) / 1000)} ago`);
  setAttribute(updated, "title", session.updated_at);
}

function renderServer() {
  const { server } = stream;
  if (server === null) return;
  for (const element of byId("metrics").querySelectorAll("[data-metric]")) {
    const metric = element.dataset.metric;
    const live = stream.state === "connected";
    let text = typeof server[metric] === "number" ? formatNumber(server[metric]) : String(server[metric] ?? "–");
    if (metric === "uptime") {
      // It goes on while the server can be reached.
      text = live ? formatDuration(server.uptime + (performance.now() - server.at) / 1000) : "–";
    }
    setText(element, text);
  }
}

function captionText(count, isFiltered) {
  if (!stream.isComplete) return stream.error ? "" : "Loading…";
  if (stream.total === 0) return "No sessions yet.";
  const known = stream.sessions.size;
  const scope =
    known < stream.total
      ? `the ${formatNumber(known)} latest of ${formatCount(stream.total, "session")}`
      : formatCount(known, "session");
  return isFiltered ? `${formatNumber(count)} of ${scope}` : scope[0].toUpperCase() + scope.slice(1);
}

function renderRows() {
  const filter = byId("filter").value;
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...stream.sessions.values()]
    .filter((session) => matchesFilter(session, filter) && matchesSearch(session, words))
    .sort((a, b) => ORDERS[byId("sort").value](a, b) || ORDERS.newest(a, b));
  const length = pageLength();
  const pages = Math.max(1, Math.ceil(rows.length / length));
  view.page = Math.min(view.page, pages - 1);
  setText(byId("caption"), captionText(rows.length, filter !== "all" || words.length > 0));
  reconcile(byId("rows"), rows.slice(view.page * length, (view.page + 1) * length), {
    key: (session) => session.session_id,
    create: createRow,
    update: updateRow,
  });
  setHidden(byId("pager"), pages === 1);
  setText(byId("page"), `Page ${view.page + 1} of ${pages}`);
  setDisabled(byId("previous"), view.page === 0);
  setDisabled(byId("next"), view.page === pages - 1);
}

function render() {
  renderSignIn();
  // Without a token there is nothing to see yet.
  for (const element of document.querySelectorAll("[data-content]")) {
    setHidden(element, auth.asked !== "" && !stream.isComplete);
  }
  const banner = bannerText(stream.problem);
  setHidden(byId("offline"), banner === "");
  setText(byId("offline"), banner);
  setHidden(byId("error"), stream.error === "");
  setText(byId("error"), stream.error);
  const connection = CONNECTIONS[stream.state];
  setText(byId("connection"), view.paused ? "paused" : connection.label);
  setAttribute(byId("connection"), "data-tone", connection.tone);
  setText(byId("pause"), view.paused ? "Resume" : "Pause");
  renderServer();
  renderRows();
}

/** Watch unless the user has paused or nobody sees the page. */
function watch() {
  if (view.paused || document.hidden) stream.stop();
  else stream.start();
}

onClick(byId("pause"), () => {
  view.paused = !view.paused;
  watch();
});
document.addEventListener("visibilitychange", watch);
narrow.addEventListener("change", scheduleRender);
for (const id of ["search", "filter", "sort"]) {
  byId(id).addEventListener("input", () => {
    view.page = 0;
    scheduleRender();
  });
}
onClick(byId("previous"), () => {
  view.page -= 1;
  scheduleRender();
});
onClick(byId("next"), () => {
  view.page += 1;
  scheduleRender();
});
createSignIn();
onSignedIn(watch);
setRenderer(render);
watch();
