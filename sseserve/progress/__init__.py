"""What an update may do: the rules (pure), the tracker over an engine, and the queue of jobs."""
