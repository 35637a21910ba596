// The coaching assistant's own hook, unchanged except that its TypeScript types are removed.

import { apiClient, logger } from "./lib.js";
import { useTranscriptionStatus } from "./useTranscriptionStatus.js";

const { useCallback, useEffect, useRef, useState } = React;

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
  const [connectionStatus, setConnectionStatus] = useState('disconnected');
  const [error, setError] = useState(null);

  const eventSourceRef = useRef(null);
  const fallbackHook = useTranscriptionStatus(sessionId, { enablePolling: false });

  const connectSSE = useCallback(() => {
    if (!sessionId || !enableSSE) return;

    try {
      setConnectionStatus('connecting');

      const url = `${apiClient.baseUrl}/api/v1/sessions/${sessionId}/status/stream`;
      const eventSource = new EventSource(url, {
        withCredentials: true
      });

      eventSource.onopen = () => {
        setConnectionStatus('connected');
        setError(null);
        logger.info(`SSE connected for session ${sessionId}`);
      };

      eventSource.onmessage = (event) => {
        try {
          const statusData = JSON.parse(event.data);
          setStatus(statusData);

          // Close connection when transcription completes
          if (statusData.status === 'completed' || statusData.status === 'failed') {
            eventSource.close();
            setConnectionStatus('disconnected');
          }
        } catch (err) {
          logger.error('Error parsing SSE message:', err);
        }
      };

      eventSource.onerror = (error) => {
        logger.error('SSE connection error:', error);
        setConnectionStatus('error');
        setError('Connection lost. Retrying...');

        // Auto-reconnect logic
        if (reconnectAttempts > 0) {
          setTimeout(() => {
            connectSSE();
          }, reconnectDelay);
        } else if (enablePollingFallback) {
          // Fall back to polling
          fallbackHook.startPolling();
        }
      };

      eventSourceRef.current = eventSource;

    } catch (err) {
      logger.error('Failed to establish SSE connection:', err);
      setConnectionStatus('error');

      if (enablePollingFallback) {
        fallbackHook.startPolling();
      }
    }
  }, [sessionId, enableSSE, reconnectAttempts, reconnectDelay]);

  const disconnect = useCallback(() => {
    if (eventSourceRef.current) {
      eventSourceRef.current.close();
      eventSourceRef.current = null;
      setConnectionStatus('disconnected');
    }
  }, []);

  useEffect(() => {
    connectSSE();
    return disconnect;
  }, [connectSSE, disconnect]);

  return {
    status: status || fallbackHook.status,
    connectionStatus,
    error: error || fallbackHook.error,
    isConnected: connectionStatus === 'connected',
    reconnect: connectSSE,
    disconnect
  };
};
