// The hook that useTranscriptionStatusSSE falls back to: it polls every two seconds until the transcription has ended.

import { apiClient } from "./lib.js";

const { useCallback, useEffect, useRef, useState } = React;

const INTERVAL = 2000; // ms

export const useTranscriptionStatus = (sessionId, { enablePolling = true } = {}) => {
  const [status, setStatus] = useState(null);
  const [error, setError] = useState(null);
  const [isPolling, setIsPolling] = useState(false);
  const pollRef = useRef(null); // the poll that runs now

  const stopPolling = useCallback(() => {
    clearTimeout(pollRef.current?.timer);
    pollRef.current = null;
    setIsPolling(false);
    setError(null);
  }, []);

  const startPolling = useCallback(() => {
    if (pollRef.current !== null) return;
    const poll = (pollRef.current = { timer: null });
    setIsPolling(true);
    const next = async () => {
      try {
        const response = await fetch(`${apiClient.baseUrl}/api/v1/sessions/${sessionId}/status`);
        if (!response.ok) throw new Error(`The server responded with ${response.status}`);
        const statusData = await response.json();
        if (pollRef.current !== poll) return;
        setStatus(statusData);
        setError(null);
        if (statusData.status === "completed" || statusData.status === "failed") return;
      } catch (err) {
        if (pollRef.current !== poll) return;
        setError(`${err.message}. Retrying...`);
      }
      poll.timer = setTimeout(next, INTERVAL);
    };
    next();
  }, [sessionId]);

  useEffect(() => {
    if (enablePolling) startPolling();
    return stopPolling;
  }, [enablePolling, startPolling, stopPolling]);

  return { status, session: null, error, isPolling, startPolling, stopPolling };
};
