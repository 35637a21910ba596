// Starts the page's session, and updates the page's elements.

const byId = (id) => document.getElementById(id);

export const session = fetch("/begin", { method: "POST" }).then((response) => response.json());

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
