// Starts the page's session, or finds the one in its address, and updates the page's elements.

const byId = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);

export const user = query.get("user") ?? "patient-7";

const begin = async () => (await fetch("/begin", { method: "POST" })).json();
const find = async (id) => ({ ...(await (await fetch("/config")).json()), session_id: id });
export const session = query.has("session") ? find(query.get("session")) : begin();

session.then(({ session_id: id }) => {
  byId("user").textContent = user;
  for (const link of document.querySelectorAll("[data-user]")) {
    link.href = `?${new URLSearchParams({ user: link.dataset.user, session: id })}`;
    if (link.dataset.user === user) link.setAttribute("aria-current", "page");
  }
});

export function show(transport, { progress, status, message, state }) {
  byId(transport).value = progress;
  byId(transport).dataset.state = state;
  byId(`${transport}-status`).textContent = `${status}: ${message}`;
}

export function showTransport(name) {
  byId("sse-transport").textContent = name;
  byId("sse").setAttribute("aria-label", name);
}

export const updateProgressBar = (progress) =>
  show("sse", { progress, status: "progress", message: `${progress}%`, state: "running" });

export function showSuccessMessage() {
  // The client's listener for "complete" passes no percentage: what is complete is at 100.
  show("sse", { progress: 100, status: "complete", message: "100%", state: "succeeded" });
  byId("success").hidden = false;
}

export function showErrorMessage(error) {
  byId("sse").dataset.state = "failed";
  byId("sse-status").textContent = "failed";
  byId("error").textContent = error;
}
