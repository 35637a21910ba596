// The hook that useTranscriptionStatusSSE falls back to: it polls every two seconds until the transcription has ended.

import { apiClient } from "./lib.js";

const { useCallback, useEffect, useRef, useState } = React;

export const useTranscriptionStatus = (sessionId, { enablePolling = true } = {}) => {
  const [status, setStatus] = useState(null);
  const [error, setError] = useState(null);
  const timer = useRef(null);

  const poll = useCallback(async () => {
    try {
      const response = await fetch(`${apiClient.baseUrl}/api/v1/sessions/${sessionId}/status`);
      const statusData = await response.json();
      setStatus(statusData);
      setError(null);
      if (statusData.status === "completed" || statusData.status === "failed") return;
    } catch (err) {
      setError(err.message);
    }
    timer.current = setTimeout(poll, 2000);
  }, [sessionId]);

  const startPolling = useCallback(() => {
    if (timer.current !== null) return;
    timer.current = 0;
    poll();
  }, [poll]);

  useEffect(() => {
    if (enablePolling) startPolling();
    return () => clearTimeout(timer.current);
  }, [enablePolling, startPolling]);

  return { status, session: null, error, startPolling };
};
