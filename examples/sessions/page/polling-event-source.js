// An EventSource for status streams that falls back to polling the status: without EventSource, after a response that is
// no event stream, and after three failed attempts to reconnect. An EventSource reconnects and resumes by itself.
//
// "progress", "complete" and "error" events always have data: a broken connection is told to onerror alone.

import { showTransport } from "./view.js";

const RECONNECT_ATTEMPTS = 3;
const INTERVAL = 2000; // ms

export class PollingEventSource extends EventTarget {
  onerror = null;
  #url;
  #source = null;
  #timer = null;
  #failures = 0; // since the stream was open
  #isClosed = false;

  constructor(url) {
    super();
    this.#url = url;
    if (typeof EventSource === "undefined") this.#poll();
    else this.#stream();
  }

  close() {
    this.#isClosed = true;
    this.#source?.close();
    clearTimeout(this.#timer);
  }

  #stream() {
    showTransport("Server-Sent Events");
    this.#source = new EventSource(this.#url);
    this.#source.onopen = () => (this.#failures = 0);
    for (const type of ["progress", "complete", "error"]) {
      this.#source.addEventListener(type, (event) => {
        if (event.data === undefined) this.#handleConnectionError(event);
        else this.#dispatch(type, event.data);
      });
    }
  }

  #handleConnectionError(event) {
    this.onerror?.(event);
    this.#failures += 1;
    if (this.#source.readyState !== EventSource.CLOSED && this.#failures <= RECONNECT_ATTEMPTS) return;
    this.#source.close();
    this.#poll();
  }

  async #poll() {
    showTransport("Polling instead of Server-Sent Events");
    try {
      const response = await fetch(this.#url.replace(/\/stream$/, ""));
      if (!response.ok) throw new Error(`The server responded with ${response.status}`);
      const status = await response.json();
      if (this.#isClosed) return;
      const type = !status.ended_at ? "progress" : status.state === "succeeded" ? "complete" : "error";
      this.#dispatch(type, JSON.stringify(status));
    } catch (error) {
      this.onerror?.(error);
    }
    if (!this.#isClosed) this.#timer = setTimeout(() => this.#poll(), INTERVAL);
  }

  #dispatch(type, data) {
    this.dispatchEvent(new MessageEvent(type, { data }));
  }
}
