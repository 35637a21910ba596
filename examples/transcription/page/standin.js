// As much of React as one tree with hooks needs, so that this page runs without npm. Hooks are told apart
// by the order of their calls over the whole tree, so every component must be there in every rendering.

{
  const slots = [];
  let at = 0;
  let effects = [];
  let draw = () => {};
  let queued = false;

  const slot = (make) => (slots[at] ??= make()) && slots[at++];
  const differ = (before, now) => !before || !now || before.some((value, i) => !Object.is(value, now[i]));

  function schedule() {
    if (queued) return;
    queued = true;
    queueMicrotask(() => {
      queued = false;
      draw();
    });
  }

  function useState(initial) {
    const own = slot(() => {
      const made = { value: initial };
      made.set = (value) => {
        if (Object.is(made.value, value)) return;
        made.value = value;
        schedule();
      };
      return made;
    });
    return [own.value, own.set];
  }

  const useRef = (initial) => slot(() => ({ current: initial }));

  function useCallback(callback, deps) {
    const own = slot(() => ({}));
    if (differ(own.deps, deps)) Object.assign(own, { callback, deps });
    return own.callback;
  }

  function useEffect(effect, deps) {
    const own = slot(() => ({}));
    if (differ(own.deps, deps)) effects.push([own, effect]);
    own.deps = deps;
  }

  function createElement(type, props, ...children) {
    if (typeof type === "function") return () => type(props ?? {});
    return () => {
      const made = Object.assign(document.createElement(type), props);
      made.append(...children.flat().filter((c) => c != null && c !== false).map(realize));
      return made;
    };
  }

  function realize(node) {
    while (typeof node === "function") node = node();
    return node instanceof Node ? node : String(node);
  }

  const createRoot = (container) => ({
    render(element) {
      draw = () => {
        at = 0;
        container.replaceChildren(realize(element));
        const due = effects;
        effects = [];
        for (const [own, effect] of due) {
          own.cleanup?.();
          own.cleanup = effect();
        }
      };
      draw();
    },
  });

  window.React = { useState, useRef, useCallback, useEffect, createElement };
  window.ReactDOM = { createRoot };
}
