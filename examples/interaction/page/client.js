// The interaction service's own client; only the URL is changed. Its "error" listener also receives connection
// errors, which have no data, so the end of the stream logs a harmless SyntaxError to the console.

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
