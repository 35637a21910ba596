# Varnish in front of sseserve: SSE streams, WebSockets, long polling and publishers on one port.
#
# Varnish 6 or later: cp varnish.vcl /etc/varnish/default.vcl. Start it with -p pipe_timeout=3600, or systemctl edit
# varnish. The server limits each client by its own address with SSESERVE_TRUSTED_PROXIES=127.0.0.1

vcl 4.1;

backend sseserve {
    .host = "127.0.0.1";
    .port = "8000";
    .connect_timeout = 5s;
    .first_byte_timeout = 3600s;   # a long-poll is responded to when there is something new
    .between_bytes_timeout = 3600s;
}

sub vcl_recv {
    # Nothing of the server's may be stored. A pipe passes every byte on at once, and either side learns at once
    # that the other one has left: streams, WebSockets and publishers' batches need that.
    return (pipe);
}

sub vcl_pipe {
    # Pass upgrade requests (WebSocket) on; any other connection is for one request, as a pipe passes on unseen
    # whatever follows it.
    if (req.http.Upgrade) {
        set bereq.http.Upgrade = req.http.Upgrade;
        set bereq.http.Connection = req.http.Connection;
    } else {
        set bereq.http.Connection = "close";
    }
}
