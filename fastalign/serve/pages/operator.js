import { call, find, make, signIn, token } from "/pages/service.js";

const KINDS = ["thumb", "choice", "rating", "edit"];
const SVG = "http://www.w3.org/2000/svg";
const get = async (path) => (await (await call(path)).json()).data;
const percent = (value) => (typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–");
const moment = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function plot(label, height = 220) {
  const width = Math.max(320, Math.min(1040, document.documentElement.clientWidth - 70));
  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const box = { left: 44, right: width - 12, top: 14, bottom: height - 30 };
  return { svg, box };
}

const tag = (x, y, text, anchor = "middle") => draw("text", { x, y, "text-anchor": anchor }, text);
const short = (text, room) => (text.length > room ? `${text.slice(0, room - 1)}…` : text);

function curve(versions) {
  const points = versions.filter(({ metrics }) => [metrics.win_rate, metrics.win_rate_first].some((rate) => typeof rate === "number"));
  if (!points.length) return make("p", { className: "soft", textContent: "No version has a win rate yet." });
  const { svg, box } = plot(`Win rates: ${points.map((one) => `${one.name} ${percent(one.metrics.win_rate)}`).join(", ")}`);
  const x = (i) => (points.length === 1 ? (box.left + box.right) / 2 : box.left + 36 + (i * (box.right - box.left - 72)) / (points.length - 1));
  const y = (rate) => box.bottom - rate * (box.bottom - box.top);
  for (const rate of [0, 0.5, 1]) {
    svg.append(draw("line", { x1: box.left, x2: box.right, y1: y(rate), y2: y(rate), class: rate === 0.5 ? "even" : "axis" }));
    svg.append(tag(box.left - 6, y(rate) + 4, `${100 * rate} %`, "end"));
  }
  const line = (name, style) => {
    const places = points.flatMap((one, i) => (typeof one.metrics[name] === "number" ? [`${x(i)},${y(one.metrics[name])}`] : []));
    svg.append(draw("polyline", { class: style, points: places.join(" ") }));
    return places.length;
  };
  line("win_rate", "line");
  const against = line("win_rate_first", "line first");
  const every = Math.ceil(points.length / Math.max(1, Math.floor((box.right - box.left) / 90)));
  points.forEach((one, i) => {
    if (i % every === 0) svg.append(tag(x(i), box.bottom + 20, short(one.name, 12)));
    if (typeof one.metrics.win_rate !== "number") return;
    const { win_rate_low: low, win_rate_high: high } = one.metrics;
    if (typeof low === "number" && typeof high === "number") svg.append(draw("line", { x1: x(i), x2: x(i), y1: y(low), y2: y(high), class: "bar" }));
    const dot = draw("circle", { cx: x(i), cy: y(one.metrics.win_rate), r: 5, class: one.state === "live" ? "dot live" : "dot" });
    dot.append(draw("title", {}, `${one.name}: ${percent(one.metrics.win_rate)} (${one.state})`));
    svg.append(dot);
  });
  const note = "Share of comparisons won against the version it came from; above 50 % it is better. Bars: 95 % intervals.";
  return make("div", {}, svg, make("p", { className: "note", textContent: against ? `${note} Green: against the first version.` : note }));
}

function days(counts) {
  if (!counts.length) return make("p", { className: "soft", textContent: "No feedback yet." });
  const totals = new Map();
  for (const one of counts) {
    const day = totals.get(one.day) ?? Object.fromEntries(KINDS.map((kind) => [kind, 0]));
    day[one.kind] += one.count;
    totals.set(one.day, day);
  }
  const shown = [...totals].slice(-30);
  const most = Math.max(...shown.map(([, day]) => KINDS.reduce((sum, kind) => sum + day[kind], 0)));
  const { svg, box } = plot("Feedback per day and kind");
  const step = (box.right - box.left) / shown.length, bar = Math.min(48, step * 0.7);
  for (const part of [...new Set([0, Math.round(most / 2), most])]) {
    const y = box.bottom - (part / most) * (box.bottom - box.top);
    svg.append(draw("line", { x1: box.left, x2: box.right, y1: y, y2: y, class: "axis" }), tag(box.left - 6, y + 4, part, "end"));
  }
  const every = Math.ceil(shown.length / Math.max(1, Math.floor((box.right - box.left) / 60)));
  shown.forEach(([date, day], i) => {
    const middle = box.left + (i + 0.5) * step;
    let y = box.bottom;
    for (const kind of KINDS) {
      const height = (day[kind] / most) * (box.bottom - box.top);
      y -= height;
      const rect = draw("rect", { x: middle - bar / 2, y, width: bar, height, class: `kind-${kind}` });
      rect.append(draw("title", {}, `${date}: ${day[kind]} ${kind}`));
      svg.append(rect);
    }
    if (i % every === 0) svg.append(tag(middle, box.bottom + 20, date.slice(5)));
  });
  const legend = make("div", { className: "legend" }, ...KINDS.map((kind) => make("span", {}, make("i", { className: `kind-${kind}` }), kind)));
  return make("div", {}, svg, legend);
}

async function act(button, path, body, done) {
  button.disabled = true;
  find("error").textContent = find("said").textContent = "";
  try {
    const version = await (await call(path, body)).json();
    find("said").textContent = done(version);
  } catch (error) {
    find("error").textContent = error.message;
  }
  button.disabled = false;
  await refresh();
}

function row(version) {
  const promote = make("button", { type: "button", textContent: "Promote", disabled: version.state === "live", "aria-label": `Promote ${version.name}` });
  promote.addEventListener("click", () => {
    if (confirm(`Answer with version ${version.name} from now on?`)) {
      act(promote, `/admin/versions/${encodeURIComponent(version.name)}/promote`, {}, (now) => `Version ${now.name} answers now.`);
    }
  });
  return make("tr", {},
    make("td", { textContent: version.name, title: version.folder }),
    make("td", {}, make("span", { className: `state ${version.state}`, textContent: version.state.replace("_", " ") })),
    make("td", { className: "number roomy", textContent: version.answers.toLocaleString("en") }),
    make("td", { className: "number", textContent: percent(version.metrics.win_rate) }),
    make("td", { className: "number roomy", textContent: typeof version.metrics.kl === "number" ? version.metrics.kl.toFixed(3) : "–" }),
    make("td", { className: "roomy", textContent: version.parent ?? "–" }),
    make("td", { className: "roomy", textContent: moment(version.created) }),
    make("td", {}, promote));
}

async function refresh() {
  const [versions, counts, events] = await Promise.all(["versions", "feedback", "events"].map((name) => get(`/admin/${name}`)));
  const live = versions.find((version) => version.state === "live");
  const thumbs = counts.filter((one) => one.kind === "thumb"), sum = (list, key) => list.reduce((total, one) => total + one[key], 0);
  const tiles = [
    [live?.name ?? "–", "answers now"],
    [sum(versions, "answers").toLocaleString("en"), "answers given"],
    [sum(counts, "count").toLocaleString("en"), "judgements"],
    [thumbs.length ? percent(sum(thumbs, "positive") / sum(thumbs, "count")) : "–", "of thumbs are up"],
  ];
  find("tiles").replaceChildren(...tiles.map(([value, label]) => make("div", {}, make("b", { textContent: value }), make("span", { textContent: label }))));
  find("curve").replaceChildren(curve(versions));
  find("days").replaceChildren(days(counts));
  find("versions").replaceChildren(...versions.slice().reverse().map(row));
  find("back").disabled = !live?.replaced;
  find("back").textContent = live?.replaced ? `Roll back to ${live.replaced}` : "Nothing to roll back to";
  find("back").onclick = () => {
    if (confirm(`Take version ${live.name} back and answer with ${live.replaced} again?`)) {
      act(find("back"), "/admin/rollback", { to: live.replaced, reason: "by hand" }, (now) => `Version ${now.name} answers again.`);
    }
  };
  find("events").replaceChildren(...events.slice(-20).reverse().map((event) => make("tr", {},
    make("td", { textContent: moment(event.created) }),
    make("td", { textContent: event.kind }),
    make("td", { className: "wrap", textContent: Object.entries(event.detail).filter(([, value]) => value).map(([name, value]) => `${name}: ${value}`).join(" · ") }))));
}

const later = async () => {
  try {
    if (!document.hidden) await refresh();
  } catch (error) {
    if (error.status === 401) { token.clear(); location.reload(); }
    find("error").textContent = error.message;
  }
  setTimeout(later, 15000);
};

signIn("/admin/versions", async (_, health) => {
  find("name").textContent = health.model;
  await later();
}, (shown) => { find("board").hidden = !shown; });
