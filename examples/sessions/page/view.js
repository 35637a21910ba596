// What the page shows, and the session that it is about.

const at = (id) => document.getElementById(id);

export const begun = fetch("/begin", { method: "POST" }).then((answer) => answer.json());

export function show(way, data) {
  at(way).value = data.progress;
  at(`${way}-status`).textContent = `${data.status}: ${data.message}`;
}

export const updateProgressBar = (progress) => show("sse", { progress, status: "progress", message: `${progress}%` });

export function showSuccessMessage() {
  at("success").hidden = false;
}

export function showErrorMessage(error) {
  at("error").textContent = error;
}
