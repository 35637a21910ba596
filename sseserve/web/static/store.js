// What a page knows. Code that changes it calls `scheduleRender`; everything on the page is rendered from it.

export const store = {
  reachable: true, // whether the last request or stream reached the server
  unreachableSince: null, // ms since the epoch
  clockOffset: 0, // ms by which the server's clock is ahead of this one
};

const RENDER_INTERVAL = 33; // ms
const TICK = 1000; // ms

let render = () => {};
let lastRender = 0;
let timer = null;

/** Call `callback` after each change, and every second for the clocks on the page. */
export function setRenderer(callback) {
  render = callback;
  setInterval(scheduleRender, TICK);
  scheduleRender();
}

/**
 * Render soon, at most every RENDER_INTERVAL. A timer rather than an animation frame, because those are
 * not called for a hidden tab and its title would become stale.
 */
export function scheduleRender() {
  if (timer !== null) return;
  timer = setTimeout(
    () => {
      timer = null;
      lastRender = performance.now();
      render();
    },
    Math.max(0, lastRender + RENDER_INTERVAL - performance.now()),
  );
}

let notifyReachable = () => {};

/** Call `callback` when the server can be reached again. */
export function onReachableAgain(callback) {
  notifyReachable = callback;
}

/** Note that the server was reached, or not. */
export function setReachable(reachable) {
  if (store.reachable === reachable) return;
  if (reachable) setTimeout(notifyReachable);
  store.reachable = reachable;
  store.unreachableSince = reachable ? null : Date.now();
  scheduleRender();
}

/** Note the server's time, from the `Date` header of a response. It counts whole seconds. */
export function setServerTime(date) {
  const offset = Date.parse(date) - Date.now();
  if (!Number.isNaN(offset)) store.clockOffset = Math.abs(offset) > 2000 ? offset : 0;
}

/** The server's time, in ms since the epoch. */
export const serverNow = () => Date.now() + store.clockOffset;

const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** The text of the banner: empty while all is well. `problem` is why the server can store nothing now. */
export function bannerText(problem) {
  if (!store.reachable) {
    const since = time.format(store.unreachableSince);
    return `The server cannot be reached since ${since}. Trying again; what is shown may be out of date.`;
  }
  return problem && `The server cannot store new events: ${problem}. What is shown may be out of date.`;
}
