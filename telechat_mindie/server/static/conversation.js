// A conversation is a tree of questions and answers: an edited question and an answer asked for again are further
// branches.
//
// {id, title, changed, shown, nodes}: `nodes` only grows, a node's id is its place in it, and `parent` is what it
// follows. `shown` is the last node of the branch that the page shows. A node of either role has {id, parent, role,
// content, isRaw}; an answer also has what `service.answer` says of it and the `request` that it was asked with.

const TITLE_LENGTH = 80;

export function create() {
  const id = crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID is not for pages that came by HTTP
  return { id, title: "", changed: 0, shown: null, nodes: [] };
}

/** Whether what the browser kept is a conversation: who had the page's address before may have left something else. */
export function isSound({ title, changed, shown, nodes }) {
  const follows = ({ id, parent, role, content }, place) => id === place && typeof content === "string"
    && (role === "user" || role === "assistant")
    && (parent === null || (Number.isInteger(parent) && parent >= 0 && parent < place));
  return typeof title === "string" && Number.isFinite(changed)
    && Array.isArray(nodes) && nodes.every((node, place) => follows(node ?? {}, place))
    && (shown === null || Object.hasOwn(nodes, shown));
}

/** A new node at the end of the branch that `parent` ends, which is shown from then on. */
export function add(conversation, parent, fields) {
  const node = { id: conversation.nodes.length, parent, ...fields };
  conversation.nodes.push(node);
  conversation.shown = node.id;
  conversation.title ||= [...node.content.trim().split("\n", 1)[0]].slice(0, TITLE_LENGTH).join("");
  return node;
}

/** The nodes from the first one to `end`. */
export function branch(conversation, end = conversation.shown) {
  const nodes = [];
  for (let id = end; id !== null; id = conversation.nodes[id].parent) nodes.unshift(conversation.nodes[id]);
  return nodes;
}

/** The versions of a node, itself among them, oldest first. */
export const versions = (conversation, node) => conversation.nodes.filter((other) => other.parent === node.parent);

/** Show the branch of `node`, down to what came last in it. */
export function show(conversation, node) {
  const within = new Set();
  for (const { id, parent } of conversation.nodes) { // a node stands behind what it follows
    if (id === node.id || within.has(parent)) {
      within.add(id);
      conversation.shown = id;
    }
  }
}

/** The messages up to the question `end`, as the service takes them. A question without any answer is not repeated, nor
    is what was no chat. */
export function messages(conversation, end) {
  const nodes = branch(conversation, end).filter((node) => !node.isRaw);
  const isSaid = (node, index) => node.id === end || (node.role === "user" ? nodes[index + 1]?.content : node.content);
  return nodes.filter(isSaid).map(({ role, content }) => ({ role, content }));
}

/** The branch that is shown, as Markdown. `name` gives a role's name. */
export function toMarkdown(conversation, name) {
  const parts = branch(conversation).map((node) => {
    const thought = node.thought ? `<think>\n${node.thought}\n</think>\n\n` : "";
    return `## ${name(node.role)}\n\n${thought}${node.content}\n`;
  });
  return [`# ${conversation.title}\n`, ...parts].join("\n");
}

/** All of the conversation, its other branches included. */
export function toJson({ title, changed, shown, nodes }) {
  return JSON.stringify({ title, changed: new Date(changed).toISOString(), shown, nodes }, null, 2);
}
