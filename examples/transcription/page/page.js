// The session's page: the coaching assistant's component, in plain JavaScript instead of TypeScript and JSX.

import { apiClient } from "./lib.js";
import { useTranscriptionStatusSSE } from "./useTranscriptionStatusSSE.js";

const { createElement } = React;

const session = await (await fetch("/begin", { method: "POST" })).json();
apiClient.baseUrl = session.server;

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
    ...session.options
  });

  return createElement("div", null,
    createElement(ConnectionStatusIndicator, { status: connectionStatus, isConnected }),
    createElement(TranscriptionProgress, { status }),
    createElement("p", { id: "error" }, error ?? ""));
};

ReactDOM.createRoot(document.getElementById("root")).render(createElement(SessionDetailPage, { id: session.session_id }));
