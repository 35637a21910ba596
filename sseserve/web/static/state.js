// The state of the view, all of it. Whoever changes it calls `changed`; the page is drawn from it.

export const state = {
  sessions: [], // snapshots, as the server lists them
  listTrouble: "",
  selected: null, // the id of the session that is shown
  job: null, // its newest record, whichever lane brought it
  trouble: "", // what went wrong last, in words
  starting: false,
  lanes: [],
};

const DRAW_EVERY = 33; // ms

let draw = () => {};
let drawnAt = 0;
let timer = null;

export const onChange = (callback) => {
  draw = callback;
};

/**
 * Draw soon, but not more often than anybody could see. A timer and not an animation frame, which
 * would leave the title of a hidden tab standing.
 */
export function changed() {
  if (timer !== null) return;
  timer = setTimeout(
    () => {
      timer = null;
      drawnAt = performance.now();
      draw(state);
    },
    Math.max(0, drawnAt + DRAW_EVERY - performance.now()),
  );
}
