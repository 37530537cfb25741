// Calls of the service, and the token of this tab. Text from outside is only ever set as textContent.

const KEY = "fastalign-token";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

export async function call(path, body, signal) {
  const headers = {};
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service cannot be reached. Check your connection and try again.");
  }
  if (reply.ok) return reply;
  let message = `The service answered ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch { /* not JSON: a proxy answered */ }
  const wait = reply.headers.get("retry-after");
  throw new Refused(reply.status, wait ? `${message} (try again in ${wait} s)` : message);
}

// The objects of a stream of server-sent events; throws what the service says went wrong.
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "The connection ended before the answer did.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new Refused(0, content.error.message);
      yield content;
    }
  }
}

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const find = (id) => document.getElementById(id);

// Shows the sign-in form until a token opens `path`, then calls `ready`.
export async function signIn(path, ready, show) {
  const form = find("login");
  const health = await (await call("/healthz")).json();
  find("leave").addEventListener("click", () => { token.clear(); location.reload(); });
  const enter = async () => {
    const reply = await call(path);
    form.hidden = true;
    find("leave").hidden = health.open;
    show(true);
    ready(await reply.json(), health);
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    token.set(find("token").value.trim());
    find("login-error").textContent = "";
    try {
      await enter();
    } catch (error) {
      find("login-error").textContent = error.message;
      token.clear();
    }
  });
  try {
    if (!health.open && !token.get()) throw new Refused(401, "");
    await enter();
  } catch (error) {
    if (error.status === 401 || error.status === 403) token.clear();
    show(false);
    form.hidden = false;
    find("login-error").textContent = error.message;
    find("leave").hidden = true;
    find("token").focus();
  }
}
