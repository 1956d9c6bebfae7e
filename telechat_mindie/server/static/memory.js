// What the browser remembers of small things. Private windows may refuse: then it is for this visit only.

export const memory = {
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(key, value); } catch { /* as said above */ } },
};
