// Long-poll: ask for what comes after the cursor; the server answers when there is something.

import { ask, sessionPath } from "./api.js";
import { eventName, isEnded } from "./model.js";

export const title = "Long-poll";
export const unit = "The JSON of each answer, without the headers";

const WAIT = 25; // seconds
const PAUSE = 1000; // ms; should a server not wait at all, do not ask it without end

export function connect(id, cursor, sink) {
  const abort = new AbortController();
  const { signal } = abort;

  async function run() {
    let after = cursor;
    if (after === null) {
      const { body, size } = await ask(sessionPath(id, "/status"), { signal });
      sink.open();
      sink.received(size);
      sink.message({ id: body.id, event: eventName(body.state), data: body });
      if (isEnded(body.state)) return;
      after = body.id;
    }
    // The first answer comes at once: it says how the resumption went.
    for (let first = cursor !== null; !signal.aborted; first = false) {
      const asked = performance.now();
      const path = sessionPath(id, "/events", { after, wait: first ? 0 : WAIT });
      const { body, size } = await ask(path, { signal });
      if (first) sink.open();
      sink.received(size);
      if (body.resume && (first || body.resume.status !== "ok")) {
        sink.message({ id: null, event: "resume", data: body.resume });
      }
      body.events.forEach(sink.message);
      if (body.end) return;
      after = body.next;
      if (!first && body.events.length === 0 && performance.now() - asked < PAUSE) {
        await new Promise((done) => setTimeout(done, PAUSE));
      }
    }
  }

  run().then(
    () => sink.closed("the server says that this is the end"),
    (error) => sink.closed(error.message),
  );
  return () => abort.abort();
}
