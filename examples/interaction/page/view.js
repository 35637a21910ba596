// Updates the page's elements.

const setText = (id, text) => (document.getElementById(id).textContent = text);

function appendToLog(text) {
  const item = document.createElement("li");
  item.textContent = text;
  document.getElementById("log").append(item);
}

export function updateProgress(stage, progress) {
  document.getElementById("progress").value = progress;
  setText("stage", stage);
  appendToLog(`processing ${progress}`);
}

export function showTranscription(text) {
  setText("text", text);
  appendToLog("transcription");
}

export function handleError(code, message) {
  setText("error", `${code}: ${message}`);
  appendToLog("error");
}

export const showConnection = (text) => setText("connection", text);
