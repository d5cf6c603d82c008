// Helpers for the document's elements.

export const $ = (id) => document.getElementById(id);

export function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

/** Set text only if it differs, because screen readers announce every change. */
export function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Announce events of requests, but not every figure, to screen readers. */
export function announce(words) {
  $("says").append(make("p", words));
  while ($("says").childElementCount > 20) $("says").firstChild.remove();
}

/** The first visible button in an element, to move the focus to. */
export function firstButton(element) {
  return [...element.querySelectorAll("button")].find((button) => button.offsetParent);
}
