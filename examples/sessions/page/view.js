// Starts the page's session, and updates the page's elements.

const byId = (id) => document.getElementById(id);

export const session = fetch("/begin", { method: "POST" }).then((response) => response.json());

export function show(transport, data) {
  byId(transport).value = data.progress;
  byId(`${transport}-status`).textContent = `${data.status}: ${data.message}`;
}

export const updateProgressBar = (progress) => show("sse", { progress, status: "progress", message: `${progress}%` });

export function showSuccessMessage() {
  byId("success").hidden = false;
}

export function showErrorMessage(error) {
  byId("error").textContent = error;
}
