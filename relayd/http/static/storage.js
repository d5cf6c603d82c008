/** Reads or writes browser storage. If it is forbidden or full, the page works, but remembers nothing. */
export const kept = (store, key, ...value) => {
  try {
    if (!value.length) return window[store].getItem(`relayd.${key}`);
    if (value[0] === null) window[store].removeItem(`relayd.${key}`);
    else window[store].setItem(`relayd.${key}`, value[0]);
  } catch { /* see above */ }
  return null;
};
