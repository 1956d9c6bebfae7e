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

/** {isKept, all(), put(conversation), remove(id)}, all of them asynchronous. */
export async function openStore() {
  let database;
  try {
    database = await open();
  } catch { // a private window
    const map = new Map();
    return {
      isKept: false,
      all: async () => [...map.values()],
      put: async (conversation) => { map.set(conversation.id, conversation); },
      remove: async (id) => { map.delete(id); },
    };
  }
  const within = async (mode, use) => asPromise(use(database.transaction(STORE, mode).objectStore(STORE)));
  return {
    isKept: true,
    all: () => within("readonly", (store) => store.getAll()),
    put: (conversation) => within("readwrite", (store) => store.put(conversation)),
    remove: (id) => within("readwrite", (store) => store.delete(id)),
  };
}
