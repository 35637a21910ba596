// Reads event streams in a page until they have ended for good: start(CLIENT, SOURCES, URLS), where SOURCES are
// the client's files. Calls window.received(url, event, id, data) for each message; at the end window.result is
// "ended", or an error.

const EVENTS = [
  "message", "progress", "complete", "note", "resume", "processing", "warning",
  "job-status", "step-status", "step-progress", "job-completed",
];
const FINAL_EVENTS = ["complete", "job-completed"];

function requireModule(sources, name) {
  const exports = {};
  new Function("exports", "require", sources[name])(exports, (other) => requireModule(sources, other));
  return exports;
}

function watchSource(source, url, { closesItself }) {
  return new Promise((resolve) => {
    for (const event of EVENTS) {
      source.addEventListener(event, ({ data, lastEventId }) => {
        window.received(url, event, lastEventId, data);
        const isFinal = FINAL_EVENTS.includes(event) ||
          (event === "message" && JSON.parse(data).status === "completed");
        if (!closesItself && isFinal) {
          source.close();
          resolve();
        }
      });
    }
    source.onerror = () => {
      if (closesItself && source.readyState === 2) resolve(); // CLOSED: it was told so by 204
    };
  });
}

const CLIENTS = {
  "EventSource": (sources, url) => watchSource(new EventSource(url), url, { closesItself: true }),

  "event-source-polyfill": (sources, url) =>
    watchSource(new window.EventSourcePolyfill(url), url, { closesItself: true }),

  // By design it also reconnects after 204, so its user closes it at the final event.
  "reconnecting-eventsource": (sources, url) =>
    watchSource(new window.ReconnectingEventSource(url, { max_retry_time: 10 }), url, { closesItself: false }),

  // By design it takes the end of a response for the end of the stream, and retries after every error that its
  // user does not throw again.
  "fetch-event-source": async (sources, url) => {
    const { fetchEventSource } = requireModule(sources, "./fetch");
    class Ended extends Error {}
    await fetchEventSource(url, {
      async onopen(response) {
        if (response.status === 204) throw new Ended();
        if (!response.ok) throw new Error(response.status);
      },
      onmessage({ event, id, data }) {
        window.received(url, event || "message", id, data);
      },
      onerror(error) {
        if (error instanceof Ended) throw error;
      },
    }).catch((error) => {
      if (!(error instanceof Ended)) throw error;
    });
  },
};

async function watch(client, sources, urls) {
  if (client === "event-source-polyfill") {
    // The shortest delay before it reconnects is a second.
    const { setTimeout } = window;
    window.setTimeout = (f, delay) => setTimeout(f, delay < 20_000 ? delay / 100 : delay);
  }
  if (client !== "fetch-event-source") for (const source of Object.values(sources)) (0, eval)(source);
  await Promise.all(urls.map((url) => CLIENTS[client](sources, url)));
}

function start(client, sources, urls) {
  watch(client, sources, urls).then(
    () => { window.result = "ended"; },
    (error) => { window.result = String(error.stack || error); },
  );
}
