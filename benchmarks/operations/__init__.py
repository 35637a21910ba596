"""How sseserve behaves in operation: its engines, several processes, restarts, outages, hostile clients."""
