// The card of the session on the page.

import { byId, createElement, reconcile, setAttribute, setDisabled, setHidden, setText } from "./dom.js";
import { formatDuration, formatJson, formatNumber } from "./format.js";
import { isRecord } from "./record.js";
import { describeConnections, describeSession, percentText, remainingTime } from "./state.js";
import { serverNow, store } from "./store.js";

const DEMO_TITLE = "Demonstration"; // the server gives it to demonstration jobs
const DEMO_PHASES = ["plan", "tts", "visuals", "compose", "render"];
const MAX_STAGES = 8; // that are shown
const MAX_JSON = 240; // characters of an event's data

export const isDemo = (record) => record.title === DEMO_TITLE;

const describe = (session) => describeSession(session);

/** Set a progress bar; without a value it is indeterminate, and moves while `busy`. */
export function renderBar(progress, { bar, tone, busy }) {
  setAttribute(progress, "value", bar);
  setAttribute(progress, "data-tone", tone);
  setAttribute(progress, "data-busy", busy ? "true" : null);
}

/** The stages with what became of each: the demonstration's are known before they begin. */
function stageItems(session, description) {
  const { record } = session;
  const demo = isDemo(record) && (record.stage === undefined || DEMO_PHASES.includes(record.stage));
  const names = demo ? DEMO_PHASES : session.stages;
  const current = names.indexOf(record.stage);
  const { active, label } = description;
  const stopped = active
    ? "current"
    : label === "succeeded"
      ? "done"
      : session.existence === "present"
        ? "stopped"
        : "last";
  const items = names.map((name, index) => {
    const past = demo ? index < current : index !== current;
    return { name, status: index === current ? stopped : past && current >= 0 ? "done" : "pending" };
  });
  const start = Math.max(0, Math.min(items.length - MAX_STAGES, current - MAX_STAGES + 1));
  return { items: items.slice(start, start + MAX_STAGES), earlier: start };
}

const STAGE_WORDS = { done: "done", current: "now", stopped: "stopped here", last: "last seen", pending: "" };

function renderStages(session, description) {
  const { items, earlier } = stageItems(session, description);
  setHidden(byId("stages"), items.length === 0);
  reconcile(byId("stages"), items, {
    key: ({ name }) => name,
    create: ({ name }) =>
      createElement("li", {}, createElement("span", { text: name, title: name }), createElement("small")),
    update: (item, { status }) => {
      setAttribute(item, "data-status", status);
      setAttribute(item, "data-tone", description.tone);
      setAttribute(item, "aria-current", status === "current" ? "step" : null);
      setText(item.lastChild, STAGE_WORDS[status]);
    },
  });
  setHidden(byId("stages-earlier"), earlier === 0);
  setText(byId("stages-earlier"), `${earlier} earlier ${earlier === 1 ? "stage is" : "stages are"} not shown.`);
}

function elapsedSeconds({ record }, description) {
  if (!record.started_at) return null;
  const end = record.ended_at ?? (description.active ? null : record.updated_at);
  return ((end === null ? serverNow() : Date.parse(end)) - Date.parse(record.started_at)) / 1000;
}

/** The figures below the bar; those that say nothing in this state are left out. */
function sessionStats(session, description, live) {
  const { record } = session;
  const remaining = remainingTime(record, description, session.age, live);
  const elapsed = elapsedSeconds(session, description);
  const running = description.active && record.state === "running";
  const sources = {
    Status: description.status,
    "Time left":
      running && !description.busy ? (remaining === null ? "unknown" : `about ${formatDuration(remaining)}`) : "",
    [record.ended_at ? "Took" : "Elapsed"]: elapsed === null ? "" : formatDuration(elapsed),
    Rate: running && live && record.rate !== undefined ? `${formatNumber(record.rate)} %/s` : "",
    "Last update": `${formatDuration(session.age)} ago`,
  };
  return Object.entries(sources).filter(([, text]) => text);
}

function renderStats(entries) {
  reconcile(byId("job-stats"), entries, {
    key: ([name]) => name,
    create: ([name]) => createElement("div", {}, createElement("dt", { text: name }), createElement("dd")),
    update: (element, [, text]) => setText(element.lastChild, text),
  });
}

function renderData({ record }) {
  setHidden(byId("job-data"), record.data === undefined);
  if (record.data !== undefined) setText(byId("job-data-text"), JSON.stringify(record.data, null, 2));
}

function eventText({ type, data }) {
  if (!isRecord(type)) return data === null || data === undefined ? "" : formatJson(data, MAX_JSON);
  return [describeSession({ record: data }).label, data.stage && `stage ${data.stage}`, data.message]
    .filter(Boolean)
    .join(", ");
}

/** The latest events: the publisher's own, and those records that change more than the amount. */
function renderEvents(session) {
  setHidden(byId("events"), session === null || session.latest.length === 0);
  if (session === null) return;
  reconcile(byId("event-rows"), session.latest, {
    key: ({ seq }) => `${session.cursor.split("-")[0]}-${seq}`,
    create: (entry) =>
      createElement(
        "li",
        {},
        createElement("span", { class: "event-seq", text: `#${entry.seq}` }),
        createElement("span", {
          class: "event-type",
          text: entry.type,
          "data-own": isRecord(entry.type) ? "false" : "true",
        }),
        createElement("span", { class: "event-text", text: eventText(entry) }),
      ),
    update: () => {},
  });
}

/** Render the session; `pending` is the command that was just sent, `states` those of its connections. */
export function renderSession(session, states, pending) {
  const known = session !== null && session.record !== null;
  setHidden(byId("job"), session === null);
  setHidden(byId("job-body"), !known);
  renderEvents(known ? session : null);
  if (session === null) return null;
  const title = session.record?.title ?? session.id;
  setText(byId("job-title"), title);
  setHidden(byId("job-id"), title === session.id);
  setText(byId("job-id"), session.id);
  setHidden(byId("job-state"), !known);
  setHidden(byId("connection-summary"), !known);
  setHidden(byId("job-empty"), known || store.error !== ""); // It is loading unless the server has refused it.
  if (!known) return null;

  const description = describe(session);
  const summary = describeConnections(states, description, store.reachable);
  const live = store.reachable && states.includes("connected");
  setText(byId("job-state"), description.label);
  setAttribute(byId("job-state"), "data-tone", description.tone);
  setHidden(byId("connection-summary"), summary.label === "");
  setText(byId("connection-summary"), summary.label);
  setAttribute(byId("connection-summary"), "data-tone", summary.tone);
  setText(byId("job-percent"), percentText(description));
  renderBar(byId("job-progress"), description);
  renderStages(session, description);
  setText(byId("job-message"), description.message);
  setAttribute(byId("job-message"), "data-tone", description.tone === "danger" ? "danger" : null);
  renderStats(sessionStats(session, description, live));
  renderData(session);

  const { controls } = description;
  setHidden(byId("controls"), controls === null);
  if (controls !== null) {
    const disabled = controls.asked || pending !== null || !store.reachable;
    setText(byId("pause"), controls.resumes ? "Resume" : "Pause");
    setDisabled(byId("pause"), disabled);
    setText(byId("cancel"), controls.asked ? "Cancelling…" : "Cancel");
    setDisabled(byId("cancel"), disabled);
  }
  setHidden(byId("again"), controls !== null || !isDemo(session.record));
  document.title = `${description.value === null ? description.label : percentText(description)} ${title} – sseserve`;
  return description;
}
