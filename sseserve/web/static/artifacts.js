// What a job made: pictures and sound on the page, everything as a link.

import { element, onPress, setHidden, setText } from "./dom.js";
import { formatBytes } from "./model.js";

const still = matchMedia("(prefers-reduced-motion: reduce)");
let drawn = "[]";

/** A publisher names the address: only http and https may become a link. */
function addressOf(artifact) {
  if (!artifact.url) return null;
  try {
    const url = new URL(artifact.url, location.href);
    return ["http:", "https:"].includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}

function picture(artifact, url) {
  const image = element("img", { alt: `Picture ${artifact.name}`, class: "picture" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 320));
  // A picture may move, and one that moves must be able to stop.
  const toggle = element("button", { type: "button" });
  const show = (shown) => {
    if (shown) image.src = url;
    setHidden(image, !shown);
    setText(toggle, `${shown ? "Hide" : "Show"} ${artifact.name}`);
  };
  onPress(toggle, () => show(image.hidden));
  show(!still.matches);
  return element("figure", {}, image, element("figcaption", {}, toggle));
}

function sound(artifact, url) {
  const player = element("audio", { controls: "", preload: "metadata", src: url, "aria-label": artifact.name });
  return element("figure", {}, player, element("figcaption", { text: artifact.name }));
}

function fileLine(artifact, url) {
  const name = url
    ? element("a", { href: url, download: artifact.name, rel: "noopener", text: artifact.name })
    : element("span", { text: artifact.name });
  const size = artifact.size_bytes === undefined ? "" : formatBytes(artifact.size_bytes);
  const about = [artifact.type?.split(";")[0], size].filter(Boolean).join(", ");
  return element("li", {}, name, element("span", { class: "about", text: about }));
}

export function drawResults(section, previews, files, artifacts) {
  setHidden(section, artifacts.length === 0);
  const now = JSON.stringify(artifacts);
  if (now === drawn) return;
  drawn = now;
  const found = artifacts.map((artifact) => [artifact, addressOf(artifact)]);
  files.replaceChildren(...found.map(([artifact, url]) => fileLine(artifact, url)));
  const shown = found.filter(([, url]) => url?.origin === location.origin);
  previews.replaceChildren(
    ...shown.filter(([artifact]) => artifact.type?.startsWith("image/")).map((pair) => picture(...pair)),
    ...shown.filter(([artifact]) => artifact.type?.startsWith("audio/")).map((pair) => sound(...pair)),
  );
}
