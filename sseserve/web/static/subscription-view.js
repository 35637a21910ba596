// The card of a subscription.

import { createElement, onClick, setAttribute, setHidden, setText } from "./dom.js";
import { MODES, describeMode } from "./degradation.js";
import { figures } from "./delays.js";
import { capitalize, formatBytes, formatCount, formatDelay, formatNumber } from "./format.js";
import { renderBar } from "./session-view.js";
import { drawDelays } from "./sparkline.js";
import { CONNECTIONS, describeSession, percentText } from "./state.js";
import { scheduleRender } from "./store.js";

const DRAW_INTERVAL = 250; // ms between two sparklines: figures that change faster cannot be read
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const views = new WeakMap(); // subscription -> the elements of its card

export function createSubscriptionCard(subscription, { transport, degradation, announce }) {
  const fragment = document.getElementById("subscription").content.cloneNode(true);
  const card = fragment.firstElementChild;
  const parts = Object.fromEntries([...card.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));
  views.set(subscription, { ...parts, card, transport, degradation, announce, announced: null, drawnAt: 0 });
  card.dataset.transport = subscription.name;
  parts.title.textContent = transport.title;
  parts.title.id = `subscription-${subscription.name.replaceAll(" ", "-")}`; // an ID must not contain spaces
  parts.bytes.parentElement.title = transport.bytesTooltip;
  card.setAttribute("aria-labelledby", parts.title.id);
  parts.progress.setAttribute("aria-label", `Progress over ${subscription.name}`);
  for (const [mode, text] of Object.entries(MODES)) parts.mode.append(createElement("option", { text, value: mode }));
  parts.mode.setAttribute("aria-label", `Degrade ${subscription.name}`);
  parts.mode.addEventListener("change", () => {
    degradation.mode = parts.mode.value;
    scheduleRender();
  });
  onClick(parts.toggle, () => (subscription.canDisconnect ? subscription.disconnect() : subscription.reconnect()));
  return card;
}

function resumeText({ status, missed, backlog }) {
  if (status === "ok" && backlog) return `Resumed: caught up on ${formatCount(backlog, "event")}, none lost.`;
  if (status === "ok") return "Resumed: no events lost.";
  if (status === "current")
    return `Reconnected: ${missed ? formatCount(missed, "event") : "nothing"} missed. Only the current state is read.`;
  if (status === "gap")
    return `Resumed with a gap: ${formatCount(missed, "event")} missed. Continuing from the current state.`;
  const lost = missed ? `${formatCount(missed, "event")} of the old log missed` : "nothing of the old log missed";
  return `The session’s log is another one now: ${lost}. Reading the new one from its beginning.`;
}

/** Draw the delays of the events until `newest`, which moves in steps: a second, or ten with reduced motion. */
function renderDelays(view, delays, newest) {
  if (performance.now() - view.drawnAt < DRAW_INTERVAL) return; // The next second is soon enough.
  view.drawnAt = performance.now();
  const step = calm.matches ? 10_000 : 1000; // ms
  const end = Math.ceil(newest / step) * step;
  const samples = delays.recent(end);
  const { curve, dots } = drawDelays(samples, end);
  setAttribute(view.curve, "d", curve);
  setAttribute(view.dots, "d", dots);
  const known = figures(samples);
  for (const name of ["last", "median", "worst"]) setText(view[name], known ? formatDelay(known[name]) : "–");
  const text = known
    ? `last ${formatDelay(known.last)}, median ${formatDelay(known.median)}, worst ${formatDelay(known.worst)}`
    : "no events";
  setAttribute(view.sparkline, "aria-label", `Delay of the events of the last 30 seconds: ${text}`);
}

/**
 * Render a subscription. `session` is what the page knows of the session, whose existence its own record lacks;
 * `newest` is the time of the newest event of all subscriptions, in ms by the server's clock.
 */
export function renderSubscription(subscription, session, newest) {
  const view = views.get(subscription);
  const { state, resumeResult, record } = subscription;
  const connection = CONNECTIONS[state];
  setText(view.state, connection.label);
  setAttribute(view.state, "data-tone", connection.tone);
  setAttribute(view.state, "data-state", state);
  const description = record
    ? describeSession({ record, existence: session.existence, stalled: session.stalled })
    : null;
  setText(view.percent, description ? percentText(description) : "–");
  renderBar(view.progress, description ?? { bar: 0, tone: "neutral", busy: false });
  setText(view.events, formatNumber(subscription.events));
  setText(view.bytes, formatBytes(subscription.bytes));
  renderDelays(view, subscription.delays, newest);
  setText(view.late, formatNumber(subscription.delays.late));
  setText(view.reconnects, formatNumber(subscription.reconnects));
  setText(view.missed, formatNumber(subscription.missed));
  setAttribute(view.missed, "data-warning", subscription.missed > 0 ? "true" : null);
  setText(view.cursor, subscription.cursor ?? "–");
  const note = capitalize(session?.existence === "deleted" ? "the session was deleted" : subscription.note);
  setText(view.note, note ? `${note}.` : resumeResult ? resumeText(resumeResult) : "");
  setText(view.toggle, subscription.canReconnect ? "Reconnect" : "Disconnect");
  setAttribute(view.toggle, "aria-label", `${view.toggle.textContent} ${subscription.name}`);
  setHidden(view.toggle, !subscription.canDisconnect && !subscription.canReconnect);
  const { mode } = view.degradation;
  setAttribute(view.card, "data-mode", mode);
  setText(view.description, describeMode(mode, view.transport) || view.transport.description);
  if (resumeResult !== view.announced) {
    view.announced = resumeResult;
    // Not every few seconds.
    if (resumeResult && mode !== "cut") view.announce(`${subscription.name}: ${resumeText(resumeResult)}`);
  }
}
