// Conversations in the browser's own database, where it has one for the page; else in this page alone.

const NAME = "telechat-mindie";
const STORE = "conversations";

const asPromise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return asPromise(request);
}

/** {kept, put(conversation), remove(id)}: `kept` are those of earlier visits, null where the browser keeps none. The
    others give a promise, which holds once the browser has done it. */
export async function openStore() {
  try {
    const database = await open();
    const within = (mode, use) => new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = use(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error); // with no space left perhaps only here, at its end
      transaction.commit(); // now: of a page that is left meanwhile the browser would undo it
    });
    return {
      kept: await within("readonly", (store) => store.getAll()),
      put: (conversation) => within("readwrite", (store) => store.put(conversation)),
      remove: (id) => within("readwrite", (store) => store.delete(id)),
    };
  } catch { // a private window
    return { kept: null, put: async () => {}, remove: async () => {} };
  }
}
