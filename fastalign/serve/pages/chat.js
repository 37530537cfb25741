import { call, events, find, make, signIn, token } from "/pages/service.js";

const talk = find("talk"), message = find("message"), compare = find("compare");
let model = "", conversation = [], running = null, pair = null;

const problem = (error) => {
  if (error?.status === 401) { token.clear(); location.reload(); }
  find("error").textContent = error?.message ?? "";
};

// Keeps the end in view, unless the reader has scrolled away from it.
let following = true;
talk.addEventListener("scroll", () => { following = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80; });
function follow(always) {
  if (always || following) talk.scrollTop = talk.scrollHeight;
}

async function judge(answer, body, said) {
  try {
    await call("/v1/feedback", { answer: answer.id, ...body });
    said.textContent = "Thank you, noted.";
    return true;
  } catch (error) {
    problem(error);
    return false;
  }
}

function card(title) {
  const text = make("div", { className: "text waiting" });
  const box = make("article", { className: "answer" }, text);
  if (title) box.prepend(make("h3", { textContent: title }));
  return { box, text, id: "", content: "" };
}

function thumbs(answer) {
  const said = make("span", { className: "said", role: "status" });
  const press = (button, others) => { for (const one of others) one.setAttribute("aria-pressed", String(one === button)); };
  const both = ["up", "down"].map((way) => make("button", { type: "button", textContent: way === "up" ? "Good" : "Bad",
    title: way === "up" ? "A good answer" : "A bad answer", "aria-pressed": "false" }));
  const reason = make("input", { placeholder: "Why? (optional, Enter keeps it)", maxLength: 4000, "aria-label": "Reason" });
  const why = make("form", { className: "reason", hidden: true }, reason);
  let last = "";
  both.forEach((button, i) => button.addEventListener("click", async () => {
    last = i ? "down" : "up";
    if (await judge(answer, { thumb: last }, said)) { press(button, both); why.hidden = false; }
  }));
  why.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (reason.value.trim() && await judge(answer, { thumb: last, reason: reason.value.trim() }, said)) why.hidden = true;
  });
  const edit = make("button", { type: "button", textContent: "Edit", title: "Write the answer as it should be" });
  edit.addEventListener("click", () => editor(answer, actions, said));
  const actions = make("div", { className: "actions" }, ...both, edit, why, said);
  answer.box.append(actions);
}

function editor(answer, actions, said) {
  const area = make("textarea", { value: answer.content, "aria-label": "The answer as it should be" });
  const keep = make("button", { type: "button", className: "primary", textContent: "Keep" });
  const drop = make("button", { type: "button", textContent: "Cancel" });
  const row = make("div", { className: "actions" }, keep, drop);
  const close = () => { area.replaceWith(answer.text); row.remove(); actions.hidden = false; message.focus(); };
  drop.addEventListener("click", close);
  area.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  keep.addEventListener("click", async () => {
    if (area.value === answer.content) return close();
    if (!await judge(answer, { edit: area.value }, said)) return;
    answer.content = area.value;
    answer.text.textContent = area.value;
    answer.turn.content = area.value;
    close();
  });
  answer.text.replaceWith(area);
  actions.hidden = true;
  answer.box.append(row);
  area.focus();
}

function vote(answers, turn) {
  const said = make("span", { className: "said", role: "status" });
  const choose = async (i) => {
    const [chosen, other] = [answers[i], answers[1 - i]];
    if (!await judge(chosen, { chosen_over: [other.id] }, said)) return;
    pair = null;
    chosen.box.classList.add("chosen");
    other.box.classList.add("lost");
    row.replaceChildren(said);
    turn.content = chosen.content;
    answers.forEach((answer) => { answer.turn = turn; });
    thumbs(chosen);
    ready();
  };
  const buttons = answers.map((_, i) => make("button", { type: "button", textContent: `${i + 1} is better` }));
  buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
  const skip = make("button", { type: "button", textContent: "Neither" });
  skip.addEventListener("click", () => { pair = null; row.remove(); turn.content = answers[0].content; ready(); });
  const row = make("div", { className: "actions votes" }, ...buttons, skip, said);
  answers[0].box.parentElement.after(row);
  pair = choose;
  buttons[0].focus({ preventScroll: true });
}

function ready() {
  const busy = Boolean(running || pair);
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  find("send").disabled = busy;
  message.disabled = Boolean(pair);
  message.placeholder = pair ? "First choose the better answer" : "Your message";
  if (!busy) message.focus();
  follow();
}

async function send(text) {
  problem(null);
  find("welcome")?.remove();
  const two = compare.checked;
  const mine = make("div", { className: "turn user" }, make("div", { className: "text", textContent: text }));
  const answers = two ? [card("Answer 1"), card("Answer 2")] : [card("")];
  const theirs = make("div", { className: two ? "turn pair" : "turn" }, ...answers.map((answer) => answer.box));
  talk.append(mine, theirs);
  const asked = [...conversation, { role: "user", content: text }];
  running = new AbortController();
  ready();
  follow(true);
  try {
    const reply = await call("/v1/chat/completions", { model, messages: asked, n: answers.length, stream: true }, running.signal);
    for await (const chunk of events(reply)) {
      find("version").textContent = chunk.system_fingerprint;
      for (const choice of chunk.choices) {
        const answer = answers[choice.index];
        answer.id = choice.answer_id;
        if (choice.delta.content) {
          answer.content += choice.delta.content;
          answer.text.append(choice.delta.content);
        }
        if (choice.finish_reason) answer.text.classList.remove("waiting");
        if (choice.finish_reason === "length") answer.box.append(make("p", { className: "note", textContent: "The answer was cut at its longest length." }));
      }
      follow();
    }
    const turn = { role: "assistant", content: answers[0].content };
    conversation = [...asked, turn];
    running = null;
    if (two) vote(answers, turn);
    else { answers[0].turn = turn; thumbs(answers[0]); }
  } catch (error) {
    running = null;
    answers.forEach((answer) => answer.text.classList.remove("waiting"));
    theirs.remove();
    mine.remove();
    message.value = text;
    if (error.name !== "AbortError") problem(error);
  }
  ready();
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || running || pair) return;
  message.value = "";
  grow();
  send(text);
});
const grow = () => { message.style.height = "auto"; message.style.height = `${message.scrollHeight + 2}px`; };
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  const typing = ["TEXTAREA", "INPUT"].includes(event.target.tagName) && event.target.type !== "checkbox";
  if (pair && !typing && ["1", "2"].includes(event.key)) {
    event.preventDefault();
    pair(Number(event.key) - 1);
  }
});
find("stop").addEventListener("click", () => running?.abort());
find("fresh").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  pair = null;
  talk.replaceChildren();
  problem(null);
  ready();
});

signIn("/v1/models", (list) => {
  model = list.data[0].id;
  find("name").textContent = model;
  find("version").textContent = list.data[0].version;
  document.title = `${model} · fastalign`;
  ready();
}, (shown) => { for (const id of ["talk", "ask", "fresh"]) find(id).hidden = !shown; });
