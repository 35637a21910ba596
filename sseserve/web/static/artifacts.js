// A job's artifacts: previews of images and audio, and a link to every file.

import { createElement, onClick, setHidden, setText } from "./dom.js";
import { formatBytes } from "./format.js";

const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
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

function createImagePreview(artifact, url) {
  const image = createElement("img", { alt: `Image ${artifact.name}`, class: "preview-image" });
  image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth <= 320));
  // The image may be animated, so the user must be able to hide it (WCAG 2.2.2).
  const toggle = createElement("button", { type: "button" });
  const setVisible = (visible) => {
    if (visible) image.src = url;
    setHidden(image, !visible);
    setText(toggle, `${visible ? "Hide" : "Show"} ${artifact.name}`);
  };
  onClick(toggle, () => setVisible(image.hidden));
  setVisible(!reducedMotion.matches);
  return createElement("figure", {}, image, createElement("figcaption", {}, toggle));
}

function createAudioPreview(artifact, url) {
  const player = createElement("audio", { controls: "", preload: "metadata", src: url, "aria-label": artifact.name });
  return createElement("figure", {}, player, createElement("figcaption", { text: artifact.name }));
}

function createFileItem(artifact, url) {
  const name = url
    ? createElement("a", { href: url, download: artifact.name, rel: "noopener", text: artifact.name })
    : createElement("span", { text: artifact.name });
  const size = artifact.size_bytes === undefined ? "" : formatBytes(artifact.size_bytes);
  const details = [artifact.type?.split(";")[0], size].filter(Boolean).join(", ");
  return createElement("li", {}, name, createElement("span", { class: "file-details", text: details }));
}

export function renderArtifacts(section, previews, files, artifacts) {
  setHidden(section, artifacts.length === 0);
  const json = JSON.stringify(artifacts);
  if (json === renderedJson) return;
  renderedJson = json;
  const entries = artifacts.map((artifact) => [artifact, artifactUrl(artifact)]);
  files.replaceChildren(...entries.map((entry) => createFileItem(...entry)));
  const sameOrigin = entries.filter(([, url]) => url?.origin === location.origin);
  previews.replaceChildren(
    ...sameOrigin.filter(([{ type }]) => type?.startsWith("image/")).map((entry) => createImagePreview(...entry)),
    ...sameOrigin.filter(([{ type }]) => type?.startsWith("audio/")).map((entry) => createAudioPreview(...entry)),
  );
}
