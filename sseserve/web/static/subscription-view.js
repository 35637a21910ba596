// The card of a subscription.

import { onClick, setAttribute, setDisabled, setText } from "./dom.js";
import { capitalize, formatBytes, formatMilliseconds, formatNumber, formatPercent } from "./format.js";

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
  const events = (count) => (count === 1 ? "1 event" : `${formatNumber(count)} events`);
  if (status === "ok" && backlog) return `Resumed: caught up on ${events(backlog)}, none lost.`;
  if (status === "ok") return "Resumed: no events lost.";
  if (status === "gap") return `Resumed with a gap: ${events(missed)} missed. Continuing from the current state.`;
  return "Could not resume: the session’s log was recreated. Continuing from the current state.";
}

export function renderSubscription(subscription) {
  const view = views.get(subscription);
  const { state, resumeResult } = subscription;
  setText(view.state, state);
  setAttribute(view.state, "data-state", state);
  setText(view.percent, formatPercent(subscription.percent));
  view.progress.value = subscription.percent;
  setText(view.events, formatNumber(subscription.events));
  setText(view.bytes, formatBytes(subscription.bytes));
  setText(view.latency, subscription.latency === null ? "–" : formatMilliseconds(subscription.latency));
  setText(view.reconnects, formatNumber(subscription.reconnects));
  setText(view.skipped, formatNumber(subscription.skipped));
  setAttribute(view.skipped, "data-warning", subscription.skipped > 0 ? "true" : null);
  setText(view.cursor, subscription.cursor ?? "–");
  setText(view.note, capitalize(subscription.note) || (resumeResult ? resumeText(resumeResult) : ""));
  const inactive = state === "complete" || state === "idle";
  setText(view.toggle, subscription.canDisconnect || inactive ? "Disconnect" : "Reconnect");
  setAttribute(view.toggle, "aria-label", `${view.toggle.textContent} ${subscription.name}`);
  setDisabled(view.toggle, inactive);
  if (resumeResult !== view.announced) {
    view.announced = resumeResult;
    if (resumeResult) view.announce(`${subscription.name}: ${resumeText(resumeResult)}`);
  }
}
