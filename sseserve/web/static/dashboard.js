// The dashboard: all sessions and the server's figures, asked for again and again.

import { ask } from "./api.js";
import { byId, element, onPress, reconcile, setAttribute, setHidden, setText } from "./dom.js";
import { errorText, formatDuration, formatNumber, formatPercent, isActive } from "./model.js";

const EVERY = 2000; // ms
const ROWS = 200;

const view = { sessions: [], health: {}, trouble: "", at: null, held: false };

const SHOWN = { all: () => true, active: isActive, ended: (state) => !isActive(state) };
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

const cell = (label, ...children) => element("td", { "data-label": label }, ...children);

function makeRow(session) {
  return element(
    "tr", {},
    element("th", { scope: "row", "data-label": "Session" },
      element("a", { href: `/#${encodeURIComponent(session.session_id)}`, text: session.session_id })),
    cell("State", element("span", { class: "badge" })),
    cell("Progress", element("span", { class: "amounts" }, element("progress", { max: "100", "aria-label": "Progress" }), element("span"))),
    element("td", { "data-label": "Message", class: "message" }, element("span")),
    cell("Last update", element("span")),
  );
}

function fillRow(row, session) {
  const [, state, progress, message, age] = row.children;
  setText(state.firstChild, session.status);
  setAttribute(state.firstChild, "data-state", session.state);
  const [bar, percent] = progress.firstChild.children;
  bar.value = session.progress;
  setText(percent, formatPercent(session.progress));
  setText(message.firstChild, [session.message, errorText(session.error)].filter(Boolean).join(": "));
  setText(age.firstChild, `${formatDuration((view.at - Date.parse(session.updated_at)) / 1000)} ago`);
  setAttribute(age.firstChild, "title", session.updated_at);
}

function draw() {
  setHidden(byId("trouble"), view.trouble === "");
  setText(byId("trouble"), view.trouble);
  setText(byId("hold"), view.held ? "Go on" : "Hold still");
  if (view.at === null) return;
  const every = view.held ? "held still" : `refreshed every ${EVERY / 1000} s`;
  setText(byId("freshness"), `As of ${clock.format(view.at)}, ${every}`);
  for (const figure of byId("server").querySelectorAll("[data-figure]")) {
    const value = view.health[figure.dataset.figure];
    const words = figure.dataset.figure === "uptime" && value !== undefined ? formatDuration(value) : value;
    setText(figure, words === undefined ? "–" : typeof words === "number" ? formatNumber(words) : String(words));
  }
  const shown = view.sessions
    .filter((session) => SHOWN[byId("filter").value](session.state))
    .sort((a, b) => Date.parse(b.updated_at) - Date.parse(a.updated_at));
  const more = view.health.sessions > ROWS ? ` of the newest ${ROWS} sessions` : "";
  setText(byId("count"), shown.length === 0 ? `None${more}.` : `${formatNumber(shown.length)}${more}, the last updated first.`);
  reconcile(byId("rows"), shown, { key: (session) => session.session_id, make: makeRow, fill: fillRow });
}

async function refresh() {
  try {
    const [list, health] = await Promise.all([ask(`/api/sessions?limit=${ROWS}`), ask("/health")]);
    Object.assign(view, { sessions: list.body.sessions, health: health.body, trouble: "", at: Date.now() });
  } catch (error) {
    view.trouble = error.message;
  }
  draw();
}

onPress(byId("hold"), () => {
  view.held = !view.held;
  draw();
});
byId("filter").addEventListener("change", draw);

(async function keepRefreshing() {
  if (!view.held) await refresh();
  setTimeout(keepRefreshing, EVERY);
})();
