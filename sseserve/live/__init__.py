"""The live side: topics and fan-out, one bounded buffer for each client, and resuming from a cursor."""
