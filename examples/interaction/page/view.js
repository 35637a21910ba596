// Updates the page's elements.

const byId = (id) => document.getElementById(id);

function setStage(text, state) {
  byId("stage").textContent = text;
  byId("stage").dataset.state = byId("progress").dataset.state = state;
}

function appendToLog(text) {
  const item = document.createElement("li");
  item.textContent = text;
  byId("log").append(item);
  byId("log").scrollTop = byId("log").scrollHeight;
}

export function updateProgress(stage, progress) {
  // Processing that goes on has recovered from its error.
  byId("error").textContent = "";
  byId("progress").value = progress;
  byId("percent").textContent = `${Math.round(100 * progress)} %`;
  setStage(stage, "running");
  appendToLog(`processing ${progress}`);
}

export function showTranscription(text) {
  byId("text").textContent = text;
  setStage("transcribed", "succeeded");
  appendToLog("transcription");
}

export function handleError(code, message) {
  byId("error").textContent = `${code}: ${message}`;
  setStage("failed", "failed");
  appendToLog(`error ${code}`);
}

export function showConnection(text) {
  // The server closes the stream of an interaction that has ended.
  const hasEnded = byId("stage").dataset.state === "succeeded";
  byId("connection").textContent = hasEnded ? "The interaction has ended." : `Connection ${text}`;
}
