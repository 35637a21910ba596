// The form that asks for a token, and who is signed in.

import { account, auth, signIn, signOut } from "./auth.js";
import { byId, createElement, onClick, setAttribute, setDisabled, setHidden, setText } from "./dom.js";
import { formatCount } from "./format.js";

const COMMAND = "sseserve token --subject NAME --role admin --ttl 1h";
const EXPLANATION =
  "Paste the token that your application or the operator of this server gave you. The operator makes one with:";
const STORAGE = "It is kept in this tab only, until you close it or sign out, and sent to this server alone.";

const EXPIRING = "Your token is about to expire";

let pending = false;
let wasAsked = false;

async function submit(event) {
  event.preventDefault();
  const input = byId("token");
  if (pending) return;
  pending = true;
  renderSignIn();
  const refusal = await signIn(input.value);
  pending = false;
  setText(byId("token-error"), refusal);
  setAttribute(input, "aria-invalid", refusal ? "true" : null);
  if (refusal) input.select();
  else input.value = "";
  renderSignIn();
}

/** Create the form, which is hidden at first, and put it before the content of the page. */
export function createSignIn() {
  // The field has no name: a form that is sent without this script does not put the token into the URL.
  const form = createElement(
    "form",
    { id: "sign-in-form", autocomplete: "off" },
    createElement("label", { for: "token", text: "Token" }),
    createElement("input", {
      type: "password",
      id: "token",
      autocomplete: "off",
      spellcheck: "false",
      autocapitalize: "off",
      required: "",
      "aria-describedby": "token-error token-storage",
    }),
    createElement("button", { type: "submit", id: "sign-in-submit", class: "primary", text: "Continue" }),
  );
  form.addEventListener("submit", submit);
  const header = document.querySelector("main > .page-header");
  const section = createElement(
    "section",
    { id: "sign-in", class: "card sign-in", "aria-labelledby": "sign-in-title", hidden: "" },
    createElement(header === null ? "h1" : "h2", { id: "sign-in-title" }),
    createElement("p", { id: "sign-in-reason" }),
    form,
    createElement("p", { id: "token-error", class: "field-error", role: "alert" }),
    createElement("p", { text: EXPLANATION }),
    createElement("div", { class: "command" }, createElement("pre", {}, createElement("code", { text: COMMAND }))),
    createElement("p", { id: "token-storage", class: "hint", text: STORAGE }),
  );
  // Announced once, unlike the seconds that are left.
  const announcement = createElement("p", { id: "sign-in-announcement", class: "visually-hidden", role: "status" });
  if (header === null) byId("main").prepend(announcement, section);
  else header.after(announcement, section);
  const button = createElement("button", { type: "button", text: "Sign out" });
  onClick(button, signOut);
  const who = createElement("span", { id: "account-name" });
  document.querySelector(".site-header").append(
    createElement("div", { id: "account", class: "account", hidden: "" }, who, button),
  );
}

function reasonText() {
  if (auth.asked) return auth.asked;
  const seconds = Math.max(0, Math.ceil((auth.expiresAt - Date.now()) / 1000));
  const when = seconds === 0 ? "Your token has expired." : `Your token expires in ${formatCount(seconds, "second")}.`;
  return `${when} With a new one nothing is interrupted.`;
}

export function renderSignIn() {
  const isShown = auth.asked !== "" || auth.expiresAt !== null;
  setHidden(byId("sign-in"), !isShown);
  setText(byId("sign-in-announcement"), auth.asked || (isShown ? EXPIRING : ""));
  if (isShown) {
    setText(byId("sign-in-title"), auth.asked ? "Sign in with a token" : EXPIRING);
    setText(byId("sign-in-reason"), reasonText());
    setText(byId("sign-in-submit"), pending ? "Checking…" : "Continue");
    setDisabled(byId("sign-in-submit"), pending);
  }
  // A form that appears while the user does something else must not take the focus.
  if (auth.asked && !wasAsked && document.activeElement === document.body) byId("token").focus();
  wasAsked = auth.asked !== "";
  const who = account();
  setHidden(byId("account"), who === null);
  if (who !== null) {
    const role = who.role === undefined ? "" : ` (${who.role})`;
    setText(byId("account-name"), who.subject === undefined ? "Signed in" : `Signed in as ${who.subject}${role}`);
  }
}
