// A session's artifacts: players and previews of what the browser can show, and a link to every file.

import { authorizedFetch, hasToken, isApi } from "./auth.js";
import { byId, createElement, onClick, setHidden, setText } from "./dom.js";
import { formatBytes } from "./format.js";

const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const CAPTION_TYPES = ["application/x-subrip", "text/vtt"];
let renderedJson = "[]";

/** Return the artifact's URL, or null: publishers set it, so only http and https may become a link. */
function artifactUrl(artifact) {
  if (!artifact.url) return null;
  try {
    const url = new URL(artifact.url, location.href);
    return ["http:", "https:"].includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}

/**
 * Return what an element can load a file of this server from: its URL, or a blob, since an element cannot send
 * the token. A blob is of this origin, so only pictures, sound and films keep their type.
 */
async function loadableUrl(url) {
  if (!hasToken() || !isApi(url)) return url.href;
  const response = await authorizedFetch(url);
  if (!response.ok) throw new Error(`status ${response.status}`);
  const blob = await response.blob();
  const type = /^(image|audio|video)\//.test(blob.type) ? blob.type : "application/octet-stream";
  return URL.createObjectURL(blob.slice(0, blob.size, type));
}

/** Load a file into an element. One that cannot be loaded is still listed. */
const load = (element, url) => loadableUrl(url).then((source) => (element.src = source)).catch(() => {});

const mediaType = (artifact) => (artifact.type ?? "").split(";")[0].trim().toLowerCase();

function createImagePreview(artifact, url) {
  const image = createElement("img", { alt: `Image ${artifact.name}`, class: "preview-image" });
  image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth <= 320));
  // The image may be animated, so the user must be able to hide it (WCAG 2.2.2).
  const toggle = createElement("button", { type: "button" });
  const setVisible = (visible) => {
    if (visible && !image.src) load(image, url);
    setHidden(image, !visible);
    setText(toggle, `${visible ? "Hide" : "Show"} ${artifact.name}`);
  };
  onClick(toggle, () => setVisible(image.hidden));
  setVisible(!reducedMotion.matches);
  return createElement("figure", {}, image, createElement("figcaption", {}, toggle));
}

/** Parse SubRip or WebVTT captions into `{ start, end, text }`, with times in seconds. */
export function parseCaptions(text) {
  const time = "(?:(\\d+):)?(\\d{1,2}):(\\d{1,2})[.,](\\d{3})";
  const pattern = new RegExp(`${time}\\s*-->\\s*${time}`);
  const seconds = (hours, minutes, rest, fraction) =>
    Number(hours ?? 0) * 3600 + Number(minutes) * 60 + Number(rest) + Number(fraction) / 1000;
  return text
    .replace(/\r\n?/g, "\n")
    .split(/\n{2,}/)
    .flatMap((block) => {
      const lines = block.split("\n");
      const index = lines.findIndex((line) => pattern.test(line));
      if (index < 0) return [];
      const parts = pattern.exec(lines[index]).slice(1);
      return [
        {
          start: seconds(...parts.slice(0, 4)),
          end: seconds(...parts.slice(4)),
          text: lines.slice(index + 1).join(" "),
        },
      ];
    });
}

/** Show captions as a list; the one that is being spoken is marked. */
async function addCaptions(list, url, player) {
  try {
    const response = await authorizedFetch(url);
    if (!response.ok) throw new Error(`status ${response.status}`);
    const captions = parseCaptions(await response.text());
    const items = captions.map(({ start, text }) =>
      createElement("li", {}, createElement("span", { class: "caption-time", text: `${start.toFixed(1)} s` }), text),
    );
    list.replaceChildren(...items);
    player?.addEventListener("timeupdate", () => {
      captions.forEach(({ start, end }, index) => {
        const spoken = player.currentTime >= start && player.currentTime < end;
        if (spoken) items[index].setAttribute("aria-current", "true");
        else items[index].removeAttribute("aria-current");
      });
    });
  } catch {
    list.replaceChildren(createElement("li", { text: "The captions could not be loaded." }));
  }
}

function createPlayer(name, artifact, url) {
  const player = createElement(name, { controls: "", preload: "metadata", "aria-label": artifact.name });
  load(player, url);
  return [player, createElement("figure", {}, player, createElement("figcaption", { text: artifact.name }))];
}

/** Save a file, which the browser itself cannot get with the token. */
async function download(event, name, url) {
  if (!hasToken()) return;
  event.preventDefault();
  try {
    const source = await loadableUrl(url);
    createElement("a", { href: source, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(source), 60_000);
  } catch {
    event.target.title = "The file could not be loaded.";
  }
}

function createFileItem(artifact, url) {
  const name = url
    ? createElement("a", { href: url, download: artifact.name, rel: "noopener", text: artifact.name })
    : createElement("span", { text: artifact.name });
  if (url !== null && isApi(url)) name.addEventListener("click", (event) => download(event, artifact.name, url));
  const size = artifact.size_bytes === undefined ? "" : formatBytes(artifact.size_bytes);
  const details = [mediaType(artifact), size, url ? "" : artifact.path].filter(Boolean).join(", ");
  return createElement("li", {}, name, createElement("span", { class: "file-details", text: details }));
}

function createPreviews(entries) {
  // Only what this server has: the policy of the page forbids to load anything else.
  const local = entries.filter(([, url]) => url?.origin === location.origin);
  const ofType = (prefix) => local.filter(([artifact]) => mediaType(artifact).startsWith(prefix));
  const images = ofType("image/").map((entry) => createImagePreview(...entry));
  const players = [
    ...ofType("video/").map((entry) => createPlayer("video", ...entry)),
    ...ofType("audio/").map((entry) => createPlayer("audio", ...entry)),
  ];
  const captions = local.filter(([artifact]) => CAPTION_TYPES.includes(mediaType(artifact)));
  const sound = createElement("div", { class: "preview-sound" }, ...players.map(([, figure]) => figure));
  for (const [artifact, url] of captions) {
    const list = createElement("ol", { class: "captions", "aria-label": `Captions ${artifact.name}` });
    sound.append(list);
    addCaptions(list, url, players[0]?.[0]);
  }
  return sound.childElementCount ? [...images, sound] : images;
}

export function renderArtifacts(section, artifacts) {
  setHidden(section, artifacts.length === 0);
  const json = JSON.stringify(artifacts);
  if (json === renderedJson) return;
  renderedJson = json;
  const entries = artifacts.map((artifact) => [artifact, artifactUrl(artifact)]);
  byId("files").replaceChildren(...entries.map((entry) => createFileItem(...entry)));
  byId("previews").replaceChildren(...createPreviews(entries));
}
