"""What HTTP/1.1 and HTTP/2 share: messages, the table of routes, admission, limits and publishing. No I/O."""
