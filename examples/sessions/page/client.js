// The therapy service's own client. The URL is changed, the headers are removed, since EventSource cannot send any,
// and its EventSource is one that has tickets instead, and polls where streams do not arrive.

import { PollingEventSource } from "./polling-event-source.js";
import { session, showErrorMessage, showSuccessMessage, updateProgressBar } from "./view.js";

const { server, session_id: sessionId } = await session;

const eventSource = new PollingEventSource(
    `${server}/api/sessions/${sessionId}/status/stream`
);

// Listen for progress updates
eventSource.addEventListener('progress', (e) => {
    const data = JSON.parse(e.data);
    console.log(`Progress: ${data.progress}% - ${data.message}`);
    updateProgressBar(data.progress);
});

// Listen for completion
eventSource.addEventListener('complete', (e) => {
    const data = JSON.parse(e.data);
    console.log('Processing complete!');
    showSuccessMessage();
    eventSource.close();
});

// Listen for errors
eventSource.addEventListener('error', (e) => {
    const data = JSON.parse(e.data);
    console.error('Processing failed:', data.error);
    showErrorMessage(data.error);
    eventSource.close();
});

// Handle connection errors
eventSource.onerror = (error) => {
    console.error('SSE connection error:', error);
    // EventSource will automatically attempt to reconnect
};

// Close connection manually if needed
function cleanup() {
    eventSource.close();
}

addEventListener("pagehide", cleanup);
