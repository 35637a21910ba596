// The session's page, with the component of the coaching assistant in plain JavaScript.

import { apiClient } from "./lib.js";
import { useTranscriptionStatusSSE } from "./useTranscriptionStatusSSE.js";

const { createElement } = React;

const begun = await (await fetch("/begin", { method: "POST" })).json();
apiClient.baseUrl = begun.server;

const ConnectionStatusIndicator = ({ status, isConnected }) =>
  createElement("p", { id: "connection", className: isConnected ? "connected" : "" }, status);

const TranscriptionProgress = ({ status }) =>
  createElement("p", null,
    createElement("progress", { id: "progress", max: 100, value: status?.progress ?? 0 }),
    " ",
    createElement("span", { id: "status" }, status ? `${status.status}: ${status.message}` : "waiting"));

const SessionDetailPage = ({ id }) => {
  const sessionId = id;

  // Use SSE hook with polling fallback
  const {
    status,
    connectionStatus,
    isConnected,
    error
  } = useTranscriptionStatusSSE(sessionId, {
    enableSSE: true,
    enablePollingFallback: true,
    reconnectAttempts: 3,
    ...begun.options
  });

  return createElement("div", null,
    createElement(ConnectionStatusIndicator, { status: connectionStatus, isConnected }),
    createElement(TranscriptionProgress, { status }),
    createElement("p", { id: "error" }, error ?? ""));
};

ReactDOM.createRoot(document.getElementById("root")).render(createElement(SessionDetailPage, { id: begun.session_id }));
