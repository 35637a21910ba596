// A minimal implementation of React with hooks, so that this page runs without npm. It renders one tree, and
// identifies a hook by the order of calls over the whole tree: every render must call the same components.

{
  const hooks = []; // the state of each hook, in the order of their calls
  let nextHook = 0;
  let pendingEffects = [];
  let renderRoot = () => {};
  let renderScheduled = false;

  const useHook = (create) => (hooks[nextHook] ??= create()) && hooks[nextHook++];
  const depsChanged = (previous, next) =>
    !previous || !next || previous.some((value, i) => !Object.is(value, next[i]));

  function scheduleRender() {
    if (renderScheduled) return;
    renderScheduled = true;
    queueMicrotask(() => {
      renderScheduled = false;
      renderRoot();
    });
  }

  function useState(initial) {
    const hook = useHook(() => {
      const created = { value: initial };
      created.setValue = (value) => {
        if (Object.is(created.value, value)) return;
        created.value = value;
        scheduleRender();
      };
      return created;
    });
    return [hook.value, hook.setValue];
  }

  const useRef = (initial) => useHook(() => ({ current: initial }));

  function useCallback(callback, deps) {
    const hook = useHook(() => ({}));
    if (depsChanged(hook.deps, deps)) Object.assign(hook, { callback, deps });
    return hook.callback;
  }

  function useEffect(effect, deps) {
    const hook = useHook(() => ({}));
    if (depsChanged(hook.deps, deps)) pendingEffects.push([hook, effect]);
    hook.deps = deps;
  }

  function createElement(type, props, ...children) {
    if (typeof type === "function") return () => type(props ?? {});
    return () => {
      const node = document.createElement(type);
      for (const [name, value] of Object.entries(props ?? {})) {
        if (name in node) node[name] = value;
        else node.setAttribute(name, value);
      }
      node.append(...children.flat().filter((child) => child != null && child !== false).map(toNode));
      return node;
    };
  }

  function toNode(element) {
    while (typeof element === "function") element = element();
    return element instanceof Node ? element : String(element);
  }

  const createRoot = (container) => ({
    render(element) {
      renderRoot = () => {
        nextHook = 0;
        container.replaceChildren(toNode(element));
        const effects = pendingEffects;
        pendingEffects = [];
        for (const [hook, effect] of effects) {
          hook.cleanup?.();
          hook.cleanup = effect();
        }
      };
      renderRoot();
    },
  });

  window.React = { useState, useRef, useCallback, useEffect, createElement };
  window.ReactDOM = { createRoot };
}
