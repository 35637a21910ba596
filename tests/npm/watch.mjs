// Reads event streams with a client from npm until the server ends them for good, and writes each message
// as a line of JSON: node watch.mjs CLIENT URL...

import { EventSource } from "eventsource";
import launchdarkly from "launchdarkly-eventsource";

const [client, ...urls] = process.argv.slice(2);
const make = {
  eventsource: (url) => new EventSource(url),
  launchdarkly: (url) => new launchdarkly.EventSource(url, { initialRetryDelayMillis: 10 }),
}[client];
const EVENTS = [
  "message", "progress", "complete", "note", "resume", "processing", "warning",
  "job-status", "step-status", "step-progress", "job-completed",
];

for (const url of urls) {
  const source = make(url);
  for (const event of EVENTS) {
    source.addEventListener(event, ({ data, lastEventId }) => {
      console.log(JSON.stringify({ url, event, id: lastEventId, data }));
    });
  }
  source.addEventListener("error", () => {}); // without a listener, Node would throw it
}
