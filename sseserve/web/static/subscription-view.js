// The card of a subscription.

import { onClick, setAttribute, setHidden, setText } from "./dom.js";
import { capitalize, formatBytes, formatCount, formatMilliseconds, formatNumber } from "./format.js";
import { renderBar } from "./session-view.js";
import { CONNECTIONS, describeSession, percentText } from "./state.js";

const views = new WeakMap(); // subscription -> the elements of its card

export function createSubscriptionCard(subscription, { title, bytesTooltip }, announce) {
  const fragment = document.getElementById("subscription").content.cloneNode(true);
  const card = fragment.firstElementChild;
  const parts = Object.fromEntries([...card.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));
  views.set(subscription, { ...parts, announced: null, announce });
  parts.title.textContent = title;
  parts.title.id = `subscription-${subscription.name.replaceAll(" ", "-")}`; // an ID must not contain spaces
  parts.bytes.parentElement.title = bytesTooltip;
  card.setAttribute("aria-labelledby", parts.title.id);
  parts.progress.setAttribute("aria-label", `Progress over ${subscription.name}`);
  onClick(parts.toggle, () => (subscription.canDisconnect ? subscription.disconnect() : subscription.reconnect()));
  return card;
}

function resumeText({ status, missed, backlog }) {
  if (status === "ok" && backlog) return `Resumed: caught up on ${formatCount(backlog, "event")}, none lost.`;
  if (status === "ok") return "Resumed: no events lost.";
  if (status === "gap")
    return `Resumed with a gap: ${formatCount(missed, "event")} missed. Continuing from the current state.`;
  const lost = missed ? `${formatCount(missed, "event")} of the old log missed` : "nothing of the old log missed";
  return `The session’s log is another one now: ${lost}. Reading the new one from its beginning.`;
}

/** Render a subscription. `session` is what the page knows of the session, whose existence its own record lacks. */
export function renderSubscription(subscription, session) {
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
  setText(view.latency, subscription.latency === null ? "–" : formatMilliseconds(subscription.latency));
  setText(view.reconnects, formatNumber(subscription.reconnects));
  setText(view.skipped, formatNumber(subscription.skipped));
  setAttribute(view.skipped, "data-warning", subscription.skipped > 0 ? "true" : null);
  setText(view.cursor, subscription.cursor ?? "–");
  const note = capitalize(session?.existence === "deleted" ? "the session was deleted" : subscription.note);
  setText(view.note, note ? `${note}.` : resumeResult ? resumeText(resumeResult) : "");
  setText(view.toggle, subscription.canReconnect ? "Reconnect" : "Disconnect");
  setAttribute(view.toggle, "aria-label", `${view.toggle.textContent} ${subscription.name}`);
  setHidden(view.toggle, !subscription.canDisconnect && !subscription.canReconnect);
  setHidden(view.toggle.parentElement, view.toggle.hidden && view.note.textContent === "");
  if (resumeResult !== view.announced) {
    view.announced = resumeResult;
    if (resumeResult) view.announce(`${subscription.name}: ${resumeText(resumeResult)}`);
  }
}
