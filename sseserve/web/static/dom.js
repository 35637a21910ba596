// Small helpers that touch the page only where something is new, so that neither a selection nor a
// screen reader is disturbed by a redraw.

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/** Switch a button off without taking the focus from it, as `disabled` would. */
export function setOff(button, off) {
  setAttribute(button, "aria-disabled", off ? "true" : null);
}

/** Call `action` when a button is pressed that is not switched off. */
export function onPress(button, action) {
  button.addEventListener("click", () => {
    if (button.getAttribute("aria-disabled") !== "true") action();
  });
}

/** Make `list`'s children match `items`: one element a key, in order, kept while its key stays. */
export function reconcile(list, items, { key, make, fill }) {
  const old = new Map([...list.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const name = key(item);
    let child = old.get(name);
    old.delete(name);
    if (!child) {
      child = make(item);
      child.dataset.key = name;
    }
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
    fill(child, item);
  });
  for (const child of old.values()) child.remove();
}

/** Make an element. Text is text: nothing that a publisher writes is ever read as HTML. */
export function element(name, { text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}
