// The interaction's own client, but for its URL. Its "error" listener hears the connection's errors too,
// which have no data: the end of the stream shows in the console as a SyntaxError, and harms nothing.

import { handleError, showConnection, showTranscription, updateProgress } from "./view.js";

const { server, session_id } = await (await fetch("/begin", { method: "POST" })).json();

const eventSource = new EventSource(`${server}/api/interaction/events/${session_id}`);

eventSource.addEventListener('processing', (e) => {
    const data = JSON.parse(e.data);
    updateProgress(data.stage, data.progress);
});

eventSource.addEventListener('transcription', (e) => {
    const data = JSON.parse(e.data);
    showTranscription(data.text);
});

eventSource.addEventListener('error', (e) => {
    const data = JSON.parse(e.data);
    handleError(data.code, data.message);
});

// Handle connection loss
eventSource.onerror = (error) => {
    if (eventSource.readyState === EventSource.CLOSED) {
        // Attempt reconnection or notify user
        showConnection("closed");
    }
};
