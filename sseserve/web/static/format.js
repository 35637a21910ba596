// Numbers, sizes and durations as text.

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const formatNumber = (value) => number.format(value);

export const formatCount = (count, singular) => `${number.format(count)} ${singular}${count === 1 ? "" : "s"}`;

export const capitalize = (text) => (text === "" ? "" : text[0].toUpperCase() + text.slice(1));

export function formatBytes(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${number.format(bytes / 1e3)} kB` : `${number.format(bytes / 1e6)} MB`;
}

export function formatDuration(seconds) {
  const rounded = Math.max(0, Math.round(seconds));
  if (rounded < 90) return `${rounded} s`;
  if (rounded < 5400) return `${Math.round(rounded / 60)} min`;
  if (rounded < 129600) return `${Math.round(rounded / 3600)} h`;
  return `${Math.round(rounded / 86400)} days`;
}

/** A delay in ms, with two digits or more. */
export function formatDelay(milliseconds) {
  if (milliseconds < 10) return `${number.format(milliseconds)} ms`;
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${number.format(milliseconds / 1000)} s`;
}

/** JSON on one line, cut to `length` characters. */
export function formatJson(value, length) {
  const text = JSON.stringify(value) ?? "";
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}
