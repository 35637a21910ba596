// Cloudflare Worker in front of sseserve: everything below /api/ goes to the server, as it is, and all else to the site.
//
// Change ORIGIN and the route in wrangler.toml. Try it: npx wrangler deploy
//   curl -N https://app.example.com/api/v1/sessions/ID/status/stream -H "Authorization: Bearer $TOKEN"
// ../README.md says which settings the server needs.

export default {
  async fetch(request, env) {
    const url = new URL(request.url);
    if (!url.pathname.startsWith("/api/")) return fetch(request);

    // All fields, such as Authorization, Cookie and Last-Event-ID: a copy by Headers has them. One by spread,
    // { ...request.headers }, has none, as they are no properties of the object.
    const headers = new Headers(request.headers);
    // Cloudflare sets CF-Connecting-IP; what a client sends as X-Forwarded-For is its own invention.
    headers.set("X-Forwarded-For", request.headers.get("CF-Connecting-IP"));

    const target = new URL(url.pathname + url.search, env.ORIGIN);
    // Returned as it is: the body is passed on as it comes, the response that accepts a WebSocket as well. Nothing is
    // cached, and a redirect is the client's.
    const { method, body } = request;
    try {
      return await fetch(target, { method, headers, body, redirect: "manual", cache: "no-store" });
    } catch {
      // Publishers repeat a request with this status.
      return new Response("The server cannot be reached.\n", { status: 502, headers: { "Retry-After": "2" } });
    }
  },
};
