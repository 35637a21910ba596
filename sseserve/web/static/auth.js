// Authentication: the token that this tab sends, and whether the server asks for one.
//
// The token is kept for this tab only (memory and sessionStorage). It is sent to the API of this server, in the
// header Authorization, and never in a URL: a WebSocket, which cannot send headers, gets a single-use ticket.

import { scheduleRender } from "./store.js";

const KEY = "sseserve-token";
const API = "/api/";
const FIRST_REQUEST = "This server requires a token.";

export const auth = {
  asked: "", // why a token is asked for; empty: none is
  expiresAt: null, // ms since the epoch: when the token expires, and the streams end; null: not soon
};

let token = readToken();
let user = token && userOf(token); // whose session the page shows
let notify = () => {};

function readToken() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // The browser allows no storage: the token is kept in memory only.
  }
}

function setToken(value) {
  token = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // As above.
  }
}

/** The claims of a token, which are shown to its holder; {} if it is none that the page can read. */
function claimsOf(text) {
  try {
    const payload = text.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes)) ?? {};
  } catch {
    return {};
  }
}

function userOf(text) {
  const { iss, sub } = claimsOf(text);
  return sub === undefined ? text : JSON.stringify([iss, sub]);
}

/** Whether this tab has a token. Without one a cookie may authenticate it, or nothing need do so. */
export const hasToken = () => token !== null;

/** Who the token is for: `{ subject, role }`, each a text or undefined; null without one. */
export function account() {
  if (token === null) return null;
  const { sub, role } = claimsOf(token);
  return { subject: typeof sub === "string" ? sub : undefined, role: typeof role === "string" ? role : undefined };
}

/** Call `callback` when requests that were refused may succeed now. */
export function onSignedIn(callback) {
  notify = callback;
}

/** Whether a URL is of this server's API, and may have the token. */
export function isApi(url) {
  const { origin, pathname } = new URL(url, location.href);
  return origin === location.origin && pathname.startsWith(API);
}

/** Fetch something, with the token if it is of this server's API. After a 401 a token is asked for. */
export async function authorizedFetch(url, { headers = {}, ...options } = {}) {
  const sent = token;
  const credentials = sent !== null && isApi(url) ? { Authorization: `Bearer ${sent}` } : {};
  const response = await fetch(url, { ...options, headers: { ...headers, ...credentials }, cache: "no-store" });
  if (sent !== token || !isApi(url)) return response; // Another token has been given meanwhile.
  if (response.status === 401) {
    const body = await response.clone().json().catch(() => null);
    setToken(null);
    auth.expiresAt = null;
    if (sent !== null) auth.asked = sentence(body?.error?.message ?? "the server refused the token");
    else auth.asked ||= FIRST_REQUEST; // It may be known already why the token is gone.
    scheduleRender();
  } else if (auth.asked && response.ok) {
    signedIn(); // By a cookie, which the user's own login page has set meanwhile.
  }
  return response;
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function signedIn() {
  auth.asked = "";
  auth.expiresAt = null;
  notify();
  scheduleRender();
}

/** Note that the token expires in that many seconds. */
export function noteExpiring(seconds) {
  auth.expiresAt = Date.now() + seconds * 1000;
  scheduleRender();
}

/**
 * Use another token. The server checks it and, if it is of the same user, lets the open streams go on.
 * Resolves to why it was refused, or to "".
 */
export async function signIn(text) {
  const given = text.trim().replace(/^bearer\s+/i, "");
  if (!/^[\w.~+/-]+=*$/.test(given)) return "This is not a token: it must be one line without spaces.";
  let response;
  try {
    const headers = { Accept: "application/json", Authorization: `Bearer ${given}` };
    response = await fetch("/api/tokens/refresh", { method: "POST", headers, cache: "no-store" });
  } catch {
    return "The server cannot be reached.";
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    return sentence(body?.error?.message ?? `the server responded with status ${response.status}`);
  }
  const previous = user;
  user = userOf(given);
  setToken(given);
  // What another user may see must not stay on the page.
  if (previous !== null && previous !== user) location.reload();
  else signedIn();
  return "";
}

/** Forget the token, and what the page shows. */
export function signOut() {
  setToken(null);
  location.reload();
}

// The user may have signed in with another page, which has set a cookie.
addEventListener("focus", () => {
  if (auth.asked) authorizedFetch("/api/sessions?limit=1").catch(() => {});
});
