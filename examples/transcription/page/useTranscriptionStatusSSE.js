// The coaching assistant's hook. It takes the same options and returns the same members; what is different:
//
// - One EventSource at a time, which reconnects by itself and resumes. The original opened another one beside it.
// - After reconnectAttempts failures in a row it polls; an open stream sets the count back.
// - A stream that ends and comes back, as the server does with idle ones, is no error.
// - While the page is hidden it neither streams nor polls.

import { apiClient, logger } from "./lib.js";
import { usePageVisibility } from "./usePageVisibility.js";
import { useTranscriptionStatus } from "./useTranscriptionStatus.js";

const { useCallback, useEffect, useRef, useState } = React;

const hasEnded = (status) => status?.status === "completed" || status?.status === "failed";

export const useTranscriptionStatusSSE = (
  sessionId,
  options = {}
) => {
  const {
    enableSSE = true,
    enablePollingFallback = true,
    reconnectAttempts = 3,
    reconnectDelay = 1000
  } = options;

  const [status, setStatus] = useState(null);
  const [connectionStatus, setConnectionStatus] = useState("disconnected");
  const [error, setError] = useState(null);

  const eventSourceRef = useRef(null);
  const timerRef = useRef(null);
  const failuresRef = useRef(0); // errors since the stream was open
  const endedRef = useRef(null); // the session that has ended
  const isVisible = usePageVisibility();
  const { startPolling, stopPolling, ...polled } = useTranscriptionStatus(sessionId, { enablePolling: false });

  const disconnect = useCallback(() => {
    clearTimeout(timerRef.current);
    eventSourceRef.current?.close();
    eventSourceRef.current = null;
    stopPolling();
    setConnectionStatus("disconnected");
  }, [stopPolling]);

  const fallBack = useCallback(() => {
    disconnect();
    if (enablePollingFallback) {
      setError(null);
      startPolling();
    } else {
      setConnectionStatus("error");
      setError("Connection lost");
    }
  }, [disconnect, enablePollingFallback, startPolling]);

  const connectSSE = useCallback(() => {
    if (!sessionId || endedRef.current === sessionId) return;
    disconnect();
    if (!enableSSE || typeof EventSource === "undefined") {
      fallBack();
      return;
    }
    setConnectionStatus("connecting");
    const url = `${apiClient.baseUrl}/api/v1/sessions/${sessionId}/status/stream`;
    const eventSource = new EventSource(url, { withCredentials: true });
    let wasOpen = false;
    eventSourceRef.current = eventSource;

    eventSource.onopen = () => {
      wasOpen = true;
      failuresRef.current = 0;
      setConnectionStatus("connected");
      setError(null);
      logger.info(`SSE connected for session ${sessionId}`);
    };

    eventSource.onmessage = (event) => {
      try {
        const statusData = JSON.parse(event.data);
        setStatus(statusData);
        if (hasEnded(statusData)) {
          endedRef.current = sessionId;
          disconnect();
        }
      } catch (err) {
        logger.error("Error parsing SSE message:", err);
      }
    };

    eventSource.onerror = () => {
      failuresRef.current += 1;
      if (failuresRef.current > reconnectAttempts) {
        logger.info(`SSE failed for session ${sessionId}; polling`);
        fallBack();
        return;
      }
      const isReconnecting = eventSource.readyState === EventSource.CONNECTING;
      if (isReconnecting && wasOpen && failuresRef.current === 1) {
        setConnectionStatus("connecting"); // perhaps the stream was idle, and comes back
        return;
      }
      setConnectionStatus("error");
      setError("Connection lost. Retrying...");
      // After a response that is no event stream, an EventSource does not reconnect by itself.
      if (!isReconnecting) timerRef.current = setTimeout(connectSSE, reconnectDelay);
    };
  }, [sessionId, enableSSE, reconnectAttempts, reconnectDelay, disconnect, fallBack]);

  useEffect(() => {
    if (!isVisible) return;
    failuresRef.current = 0;
    connectSSE();
    return disconnect;
  }, [connectSSE, disconnect, isVisible]);

  useEffect(() => {
    if (!polled.status) return;
    setStatus(polled.status);
    if (hasEnded(polled.status)) endedRef.current = sessionId;
  }, [polled.status, sessionId]);

  return {
    status,
    session: polled.session,
    connectionStatus,
    error: error || polled.error,
    isConnected: connectionStatus === "connected",
    isPolling: polled.isPolling,
    reconnect: connectSSE,
    disconnect
  };
};
