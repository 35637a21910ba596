// How a lane looks.

import { onPress, setAttribute, setOff, setText } from "./dom.js";
import { formatBytes, formatDelay, formatNumber, formatPercent } from "./model.js";

const STATES = {
  idle: "idle",
  connecting: "connecting",
  open: "connected",
  lost: "reconnecting",
  off: "disconnected",
  ended: "complete",
  failed: "refused",
};

const parts = new WeakMap();

export function makeLane(lane, { title, unit }, announce) {
  const copy = document.getElementById("lane").content.cloneNode(true);
  const card = copy.firstElementChild;
  const part = Object.fromEntries([...card.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));
  parts.set(lane, { ...part, announced: null, announce });
  part.title.textContent = title;
  part.unit.parentElement.title = unit;
  part.title.id = `lane-${lane.name}`;
  card.setAttribute("aria-labelledby", part.title.id);
  part.progress.setAttribute("aria-label", `Progress over ${lane.name}`);
  onPress(part.toggle, () => (lane.on ? lane.disconnect() : lane.reconnect()));
  return card;
}

/** What the server said about a resumption, in words. */
function verdictText({ status, missed, behind }) {
  const events = (count) => (count === 1 ? "1 event" : `${formatNumber(count)} events`);
  if (status === "ok") return behind ? `Resumed: ${events(behind)} caught up, nothing lost.` : "Resumed: nothing lost.";
  if (status === "gap") return `Resumed with a gap of ${events(missed)}; it goes on from the current state.`;
  return "Resumed: the session has begun anew; it goes on from the current state.";
}

export function drawLane(lane) {
  const part = parts.get(lane);
  setText(part.state, STATES[lane.state]);
  setAttribute(part.state, "data-state", lane.state);
  setText(part.percent, formatPercent(lane.percent));
  part.progress.value = lane.percent;
  setText(part.events, formatNumber(lane.events));
  setText(part.bytes, formatBytes(lane.bytes));
  setText(part.delay, lane.delay === null ? "–" : formatDelay(lane.delay));
  setText(part.reconnects, formatNumber(lane.reconnects));
  setText(part.skipped, formatNumber(lane.skipped));
  setAttribute(part.skipped, "data-bad", lane.skipped > 0 ? "true" : null);
  setText(part.cursor, lane.cursor ?? "–");
  const words = lane.note || (lane.verdict ? verdictText(lane.verdict) : "");
  setText(part.note, words ? words[0].toUpperCase() + words.slice(1) : "");
  setText(part.toggle, lane.on || lane.state === "ended" || lane.state === "idle" ? "Disconnect" : "Reconnect");
  setAttribute(part.toggle, "aria-label", `${part.toggle.textContent} ${lane.name}`);
  setOff(part.toggle, lane.state === "ended" || lane.state === "idle");
  if (lane.verdict !== part.announced) {
    part.announced = lane.verdict;
    if (lane.verdict) part.announce(`${lane.name}: ${verdictText(lane.verdict)}`);
  }
}
