// The session's page: the coaching assistant's component, in plain JavaScript instead of TypeScript and JSX.

import { apiClient } from "./lib.js";
import { useTranscriptionStatusSSE } from "./useTranscriptionStatusSSE.js";

const { createElement } = React;

const session = await (await fetch("/begin", { method: "POST" })).json();
apiClient.baseUrl = session.server;

const STATES = { completed: "succeeded", failed: "failed", queued: "queued" };
const CONNECTIONS = {
  connecting: "Connecting",
  connected: "Live",
  disconnected: "Not connected",
  error: "Connection lost",
};

// After the end there is nothing to be connected to.
const ConnectionStatusIndicator = ({ status, isPolling, hasEnded }) =>
  createElement("span", { id: "connection", className: "muted end" },
    hasEnded ? "" : isPolling ? "Polling" : CONNECTIONS[status]);

const TranscriptionProgress = ({ status, state }) =>
  createElement("progress", {
    id: "progress", max: 100, value: status?.progress ?? 0, "data-state": state, "aria-label": "Progress",
  });

const SessionDetailPage = ({ id }) => {
  const sessionId = id;

  // Use SSE hook with polling fallback
  const {
    status,
    connectionStatus,
    isPolling,
    error
  } = useTranscriptionStatusSSE(sessionId, {
    enableSSE: true,
    enablePollingFallback: true,
    reconnectAttempts: 3,
    ...session.options
  });
  const state = status ? STATES[status.status] ?? "running" : "queued";
  const hasEnded = state === "succeeded" || state === "failed";

  return createElement("div", { className: "card" },
    createElement("p", { className: "row" },
      createElement("span", { id: "status", className: "badge", "data-state": state }, status?.status ?? "waiting"),
      createElement(ConnectionStatusIndicator, { status: connectionStatus, isPolling, hasEnded })),
    createElement(TranscriptionProgress, { status, state }),
    createElement("p", { id: "message" }, status?.message ?? ""),
    createElement("p", { id: "error", role: "alert" }, (!hasEnded && error) || ""));
};

ReactDOM.createRoot(document.getElementById("root")).render(createElement(SessionDetailPage, { id: session.session_id }));
