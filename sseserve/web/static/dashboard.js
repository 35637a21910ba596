// The dashboard: all sessions and the server's metrics, refreshed periodically.

import { requestJson } from "./api.js";
import { byId, createElement, onClick, reconcile, setAttribute, setHidden, setText } from "./dom.js";
import { formatDuration, formatNumber, formatPercent } from "./format.js";
import { errorText, isActive } from "./session.js";

const REFRESH_INTERVAL = 2000; // ms
const MAX_ROWS = 200;

const state = { sessions: [], health: {}, error: "", refreshedAt: null, paused: false };

const FILTERS = { all: () => true, active: isActive, ended: (sessionState) => !isActive(sessionState) };
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

const createCell = (label, ...children) => createElement("td", { "data-label": label }, ...children);

function createRow(session) {
  const link = createElement("a", { href: `/#${encodeURIComponent(session.session_id)}`, text: session.session_id });
  const bar = createElement("progress", { max: "100", "aria-label": "Progress" });
  return createElement(
    "tr", {},
    createElement("th", { scope: "row", "data-label": "Session" }, link),
    createCell("State", createElement("span", { class: "badge" })),
    createCell("Progress", createElement("span", { class: "progress-cell" }, bar, createElement("span"))),
    createElement("td", { "data-label": "Message", class: "message" }, createElement("span")),
    createCell("Last update", createElement("span")),
  );
}

function updateRow(row, session) {
  const [, badge, progress, message, updated] = [...row.children].map((cell) => cell.firstChild);
  setText(badge, session.status);
  setAttribute(badge, "data-state", session.state);
  const [bar, percent] = progress.children;
  bar.value = session.progress;
  setText(percent, formatPercent(session.progress));
  setText(message, [session.message, errorText(session.error)].filter(Boolean).join(": "));
  setText(updated, `${formatDuration((state.refreshedAt - Date.parse(session.updated_at)) / 1000)} ago`);
  setAttribute(updated, "title", session.updated_at);
}

function metricText(name, value) {
  if (value === undefined) return "–";
  if (name === "uptime") return formatDuration(value);
  return typeof value === "number" ? formatNumber(value) : String(value);
}

function captionText(count) {
  if (state.sessions.length === 0) return "No sessions yet.";
  const truncated = state.health.sessions > MAX_ROWS;
  if (count === 0) return truncated ? `No matching sessions among the newest ${MAX_ROWS}.` : "No matching sessions.";
  const sessions = count === 1 && !truncated ? "session" : "sessions";
  const scope = truncated ? ` of the newest ${MAX_ROWS}` : "";
  return `${formatNumber(count)}${scope} ${sessions}, most recently updated first`;
}

function render() {
  setHidden(byId("error"), state.error === "");
  setText(byId("error"), state.error);
  setText(byId("pause-refresh"), state.paused ? "Resume" : "Pause");
  if (state.refreshedAt === null) return;
  const schedule = state.paused ? "refresh paused" : `refreshes every ${REFRESH_INTERVAL / 1000} s`;
  setText(byId("last-refresh"), `Updated at ${clock.format(state.refreshedAt)}, ${schedule}`);
  for (const element of byId("metrics").querySelectorAll("[data-metric]")) {
    const name = element.dataset.metric;
    setText(element, metricText(name, state.health[name]));
  }
  const rows = state.sessions
    .filter((session) => FILTERS[byId("filter").value](session.state))
    .sort((a, b) => Date.parse(b.updated_at) - Date.parse(a.updated_at));
  setText(byId("caption"), captionText(rows.length));
  reconcile(byId("rows"), rows, { key: (session) => session.session_id, create: createRow, update: updateRow });
}

async function refresh() {
  try {
    const [list, health] = await Promise.all([
      requestJson(`/api/sessions?limit=${MAX_ROWS}`),
      requestJson("/health"),
    ]);
    Object.assign(state, { sessions: list.body.sessions, health: health.body, error: "", refreshedAt: Date.now() });
  } catch (error) {
    state.error = error.message;
  }
  render();
}

onClick(byId("pause-refresh"), () => {
  state.paused = !state.paused;
  render();
});
byId("filter").addEventListener("change", render);

(async function refreshPeriodically() {
  if (!state.paused) await refresh();
  setTimeout(refreshPeriodically, REFRESH_INTERVAL);
})();
