/** A store that may be forbidden, or full: then the page remembers nothing, and works all the same. */
export const kept = (store, key, ...value) => {
  try {
    if (!value.length) return window[store].getItem(`relayd.${key}`);
    if (value[0] === null) window[store].removeItem(`relayd.${key}`);
    else window[store].setItem(`relayd.${key}`, value[0]);
  } catch { /* as said */ }
  return null;
};
