// The page's state. Code that changes it calls `scheduleRender`; everything on the page is rendered from it.

export const state = {
  sessions: [], // records, as the server lists them
  listError: "",
  selectedId: null, // the ID of the session on the page
  job: null, // its newest record, from whichever subscription delivered it first
  error: "", // the message of the last failed request
  starting: false,
  subscriptions: [],
};

const RENDER_INTERVAL = 33; // ms

let render = () => {};
let lastRender = 0;
let timer = null;

export const setRenderer = (callback) => {
  render = callback;
};

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
      render(state);
    },
    Math.max(0, lastRender + RENDER_INTERVAL - performance.now()),
  );
}
