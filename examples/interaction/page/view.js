// What the page shows.

const show = (id, text) => (document.getElementById(id).textContent = text);

function note(text) {
  const item = document.createElement("li");
  item.textContent = text;
  document.getElementById("log").append(item);
}

export function updateProgress(stage, progress) {
  document.getElementById("progress").value = progress;
  show("stage", stage);
  note(`processing ${progress}`);
}

export function showTranscription(text) {
  show("text", text);
  note("transcription");
}

export function handleError(code, message) {
  show("error", `${code}: ${message}`);
  note("error");
}

export const showConnection = (text) => show("connection", text);
