// Updates the page's elements.

const byId = (id) => document.getElementById(id);

export function updateProgressBar(progress) {
  byId("progress").value = progress;
  byId("progress").dataset.state = progress === 100 ? "succeeded" : "running";
  byId("percent").textContent = `${Math.round(progress)} %`;
}

/** Show a message; a job that no service has begun has none. */
export function updateStatusMessage(message) {
  byId("message").textContent = message || "Waiting for a service to begin";
  if (!message) return;
  const item = document.createElement("li");
  item.textContent = message;
  byId("log").append(item);
}
