// An EventSource for status streams with tickets, that falls back to polling the status: without EventSource, after a
// refusal, and after three failed attempts to reconnect.
//
// An EventSource reconnects by itself, but with the ticket in its URL, which is for one connection. So after an error
// there is a new one, with a new ticket and the cursor, the `lastEventId` of the last event.
//
// "progress", "complete" and "error" events always have data: a broken connection is told to onerror alone.

import { authorizedFetch, renew, takeTicket } from "./sign-in.js";
import { showErrorMessage, showTransport } from "./view.js";

const RECONNECT_ATTEMPTS = 3;
const RECONNECT_DELAY = 1000; // ms
const INTERVAL = 2000; // ms

export class PollingEventSource extends EventTarget {
  onerror = null;
  #url;
  #cursor = "";
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

  async #stream() {
    showTransport("Server-Sent Events");
    let ticket;
    try {
      ticket = await takeTicket(this.#url.split("/").at(-3));
    } catch (error) {
      this.#handleConnectionError(error);
      return;
    }
    if (this.#isClosed) return;
    this.#source = new EventSource(`${this.#url}?${new URLSearchParams({ ticket, last_event_id: this.#cursor })}`);
    this.#source.onopen = () => (this.#failures = 0);
    this.#source.addEventListener("expiring", () => renew().catch((error) => this.onerror?.(error)));
    for (const type of ["progress", "complete", "error"]) {
      this.#source.addEventListener(type, (event) => {
        if (event.data === undefined) {
          this.#handleConnectionError(event);
          return;
        }
        this.#cursor = event.lastEventId;
        this.#dispatch(type, event.data);
      });
    }
  }

  #handleConnectionError(error) {
    const isRefused = this.#source?.readyState === EventSource.CLOSED;
    this.#source?.close();
    this.onerror?.(error);
    if (error.status === 401 || error.status === 403) {
      showErrorMessage(error.message);
      return;
    }
    this.#failures += 1;
    if (isRefused || this.#failures > RECONNECT_ATTEMPTS) this.#poll();
    else this.#timer = setTimeout(() => this.#stream(), RECONNECT_DELAY);
  }

  async #poll() {
    showTransport("Polling instead of Server-Sent Events");
    try {
      const status = await (await authorizedFetch(this.#url.replace(/\/stream$/, ""))).json();
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
