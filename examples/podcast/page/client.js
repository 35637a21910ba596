// The podcast generator's own client; only the URLs are changed. EventSource reconnects by itself, and stops when
// the server responds with 204 because the job has ended.

import { updateProgressBar, updateStatusMessage } from "./view.js";

const { server } = await (await fetch("/config")).json();

// 1. Client creates job
const response = await fetch(server + '/api/v1/jobs', {
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify({
    topics: ['technology'],
    sources: ['techcrunch', 'ars-technica']
  })
});

const { jobId, sseEndpoint } = await response.json();

// 2. Client connects to SSE endpoint
const eventSource = new EventSource(server + sseEndpoint);

eventSource.onmessage = (event) => {
  const statusUpdate = JSON.parse(event.data);
  console.log('Job update:', statusUpdate);

  // Update UI with progress
  updateProgressBar(statusUpdate.progress);
  updateStatusMessage(statusUpdate.message);
};

eventSource.onerror = (error) => {
  console.error('SSE connection error:', error);
  // Implement reconnection logic
};
