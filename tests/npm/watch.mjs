// Reads event streams to their ends with a client from npm, and writes each message as a line of JSON:
// node watch.mjs CLIENT TERMINAL URL...   (TERMINAL: a JavaScript expression over event, data)

import { EventSource } from "eventsource";
import launchdarkly from "launchdarkly-eventsource";

const [client, terminal, ...urls] = process.argv.slice(2);
const isLast = new Function("event", "data", `return ${terminal}`);
const make = {
  eventsource: (url) => new EventSource(url),
  launchdarkly: (url) => new launchdarkly.EventSource(url, { initialRetryDelayMillis: 50 }),
}[client];
const EVENTS = [
  "message", "progress", "complete", "note", "resume", "processing", "warning",
  "job-status", "step-status", "step-progress", "job-completed",
];

for (const url of urls) {
  const source = make(url);
  for (const event of EVENTS) {
    source.addEventListener(event, ({ data, lastEventId }) => {
      const value = JSON.parse(data);
      console.log(JSON.stringify({ url, event, id: lastEventId, data: value }));
      if (isLast(event, value)) source.close();
    });
  }
}
