// Degrades the connections of a subscription, to show what a bad network does to its transport.
//
// A browser cannot degrade its own connections. So delay and loss are simulated here: what has arrived is held
// back for as long as it would have taken. A cut is real: the connection is closed, and the subscription
// reconnects with its cursor, as after any other failure.

import { requestJson } from "./api.js";

const DELAY = 500; // ms, in each direction
const LOSS = 0.2; // of all packets
// TCP sends a lost packet again after a timeout, which it doubles each time (RFC 6298, section 5). This is the
// shortest of Linux. Until then what has come behind the packet waits: TCP loses no bytes.
const RETRANSMISSION_TIMEOUT = 200; // ms
const MAX_TIMEOUT = 1600; // ms
const CUT_AFTER = 5000; // ms for which a connection is open
const CUT_FOR = 3000; // ms until the next one

export const MODES = { none: "None", delay: "Delay 500 ms", loss: "Packet loss 20%", cut: "Cut every 5 s" };

/** Say in a sentence or two what a mode does to a transport; nothing for `none`. */
export function describeMode(mode, { isStream, hasLog }) {
  switch (mode) {
    case "delay":
      return `Simulated: everything takes 500 ms longer in each direction. ${
        isStream ? "Every event is late by that." : "Each request pays it twice."
      }`;
    case "loss":
      return `Simulated: one packet in five is lost, and sent again after 200 ms or more. ${
        isStream ? "The events behind it wait." : "A lost request or response holds up the next one."
      }`;
    case "cut":
      return `The page closes the connection after 5 s, and opens another 3 s later. ${
        hasLog ? "The cursor brings what came meanwhile." : "What changes meanwhile is missed."
      }`;
    default:
      return "";
  }
}

/** For how long one packet is held, in ms. */
function holdTime(mode) {
  if (mode === "delay") return DELAY;
  let held = 0;
  if (mode === "loss") {
    for (let timeout = RETRANSMISSION_TIMEOUT; timeout <= MAX_TIMEOUT && Math.random() < LOSS; timeout *= 2)
      held += timeout;
  }
  return held;
}

export class Degradation {
  #mode = "none";
  #last = Promise.resolve(); // resolves when all that is held back has been passed on
  #cut = () => {}; // close the connection, if there is one

  get mode() {
    return this.#mode;
  }

  /** Change the mode at once, also for the connection that is open. */
  set mode(mode) {
    this.#mode = mode;
    if (mode === "cut") this.#cut();
  }

  /** Call `deliver` after all that is held back already, and not before `hold` ms have passed. */
  #pass(deliver, hold) {
    const arrival = performance.now() + hold;
    this.#last = this.#last
      .then(() => {
        const rest = arrival - performance.now();
        return rest > 0 ? new Promise((resolve) => setTimeout(resolve, rest)) : undefined;
      })
      .then(deliver)
      .catch(reportError);
    return this.#last;
  }

  /** Request JSON as `requestJson` does, degraded. */
  #request = async (path, options) => {
    await this.#pass(() => {}, holdTime(this.#mode));
    const response = await requestJson(path, options);
    await this.#pass(() => {}, holdTime(this.#mode));
    return response;
  };

  /** Return the `connect` of a transport, degraded. */
  wrap({ connect, isStream }) {
    return (id, cursor, handlers) => {
      let closeTransport = () => {};
      let ended = false;
      const close = () => {
        ended = true;
        closeTransport();
      };
      this.#cut = () => {
        if (ended) return;
        close();
        handlers.closed("the page has cut the connection, and reconnects after 3 seconds", CUT_FOR);
      };
      // A connection that was closed from here says no more.
      const unlessEnded = (handler) => (...args) => ended || handler(...args);
      const open = unlessEnded(() => {
        handlers.open();
        if (this.#mode === "cut") setTimeout(this.#cut, CUT_AFTER);
      });
      const closed = unlessEnded(handlers.closed);
      if (isStream) {
        const passOn = (handler, hold) => (...args) => this.#pass(() => handler(...args), hold());
        const hold = () => holdTime(this.#mode);
        const follow = () => 0; // it came in the packet that `received` has counted
        const held = {
          open: passOn(open, hold),
          received: passOn(handlers.received, hold),
          message: passOn(handlers.message, follow),
          closed: passOn(closed, follow),
        };
        this.#pass(() => {
          if (!ended) closeTransport = connect(id, cursor, held);
        }, hold());
      } else {
        closeTransport = connect(id, cursor, { ...handlers, open, closed }, this.#request);
      }
      return close;
    };
  }
}
