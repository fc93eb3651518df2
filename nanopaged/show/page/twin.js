// The contiguous twin: five servers side by side, on one clock. Data from `twin.py`; text enters by textContent only.
//
// twinScene(data, root) fills the empty element `root` and returns {length, draw(i), caption(i), timeOf(i), isEvent(i)}.
// Frames are equally far apart in simulated time, as far as the shortest step is long, so that no step is skipped.

function twinScene(data, root) {
  "use strict";
  const scene = element(root, "div", "twin");  // of its own: the page uses `root` again for other scenes
  const SVG = "http://www.w3.org/2000/svg";
  const LINE_HEIGHT = 24, LINE_GAP = 5, DIGIT_WIDTH = 8;
  const KINDS = {
    tokens: "tokens: K and V that were computed",
    reserved: "reserved: for tokens that are still to come",
    internal: "internal waste: never used (paged: the unfilled end of a last block)",
    external: "external waste: free, but useless to the first in the queue",
    free: "free, and nobody waits for it",
  };
  const numRequests = data.requests.length;
  const frameSeconds = Math.min(...data.servers.flatMap(({times}) => times.slice(1).map((time, k) => time - times[k])));
  const lastSeconds = Math.max(...data.servers.map(({times}) => times.at(-1)));
  const length = Math.ceil(lastSeconds / frameSeconds) + 1;
  const byFinish = [...data.servers].sort((a, b) => a.final.finished_s - b.final.finished_s);
  let current = 0;

  // Elements

  function element(parent, tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function shape(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function build() {
    element(scene, "style", "", twinScene.style);
    hatches(shape(scene, "svg", {width: 0, height: 0, "aria-hidden": "true", class: "twin-hatches"}));
    for (const note of data.notes) element(scene, "p", "twin-note", note);
    const legend = element(scene, "ul", "twin-legend");
    for (const [kind, meaning] of Object.entries(KINDS)) swatch(element(legend, "li"), kind, meaning);
    const views = data.servers.map((server) => row(server));
    return {views, table: finalTable()};
  }

  // Kinds of waste differ by their pattern; colour only helps.
  function hatches(svg) {
    const patterns = {
      reserved: [["circle", {cx: 3, cy: 3, r: 1.1, class: "twin-dot"}]],
      internal: [["path", {d: "M-1,7 L7,-1 M-1,1 L1,-1 M5,7 L7,5", class: "twin-stroke"}]],
      external: [["path", {d: "M0,0 L6,6 M6,0 L0,6", class: "twin-cross"}]],
    };
    for (const [kind, shapes] of Object.entries(patterns)) {
      const pattern = shape(svg, "pattern", {id: `twin-${kind}`, width: 6, height: 6, patternUnits: "userSpaceOnUse"});
      for (const [tag, attributes] of shapes) shape(pattern, tag, attributes);
    }
  }

  function swatch(parent, kind, text) {
    const svg = shape(parent, "svg", {width: 28, height: 16, "aria-hidden": "true"});
    shape(svg, "rect", {x: 0.5, y: 0.5, width: 27, height: 15, class: `twin-slots twin-${kind} twin-border`});
    element(parent, "span", "", text);
  }

  function row(server) {
    const section = element(scene, "section", "twin-row");
    section.dataset.server = server.name;
    const heading = element(section, "h3", "twin-name", server.name);
    element(heading, "span", "twin-about", server.about);
    const memory = element(section, "div", "twin-memory");
    const strip = shape(memory, "svg", {class: "twin-strip", role: "img"});
    const head = element(memory, "p", "twin-head");
    const figures = element(section, "div", "twin-figures");
    const [counts, shares] = [element(figures, "dl", "twin-counts"), element(figures, "dl", "twin-shares")];
    const cells = {};
    for (const name of ["finished", "running", "waiting", "generated"]) cells[name] = figure(counts, name);
    for (const name of data.fields) cells[name] = figure(shares, name);
    return {server, strip, head, cells, drawn: ""};
  }

  function figure(list, name) {
    const pair = element(list, "div");
    element(pair, "dt", "", name);
    const value = element(pair, "dd");
    value.dataset.figure = name;
    return value;
  }

  function finalTable() {
    const table = element(element(scene, "div", "twin-end"), "table", "twin-final");
    element(table, "caption", "", "The whole run");
    const titles = element(element(table, "thead"), "tr");
    for (const title of ["server", "all finished", "memory with tokens", "requests in a step", "gave way"]) {
      element(titles, "th", "", title).scope = "col";
    }
    const body = element(table, "tbody");
    const fastest = byFinish[0].final.finished_s;
    for (const {name, final} of data.servers) {
      const line = element(body, "tr");
      element(line, "th", "", name).scope = "row";
      const times = `${seconds(final.finished_s)} (${(final.finished_s / fastest).toFixed(2)}×)`;
      for (const text of [times, percent(final.tokens_share), final.requests.toFixed(1), `${final.preemptions}`]) {
        element(line, "td", "", text);
      }
    }
    return table;
  }

  const seconds = (value) => `${value.toFixed(2)} s`;
  const percent = (share) => `${Math.round(100 * share)}%`;
  const number = (request) => `${request}`;  // from 0 on, as in the engine

  // One moment

  const timeOf = (i) => Math.min(i * frameSeconds, lastSeconds);

  // The step that a server is in at frame i: the last that has begun. The end of the run counts as one.
  function stepAt(server, i) {
    const now = timeOf(i) + 1e-9;
    let [low, high] = [0, server.times.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (server.times[middle] <= now) low = middle; else high = middle;
    }
    return low;
  }

  function draw(i) {
    current = i;
    for (const view of views) drawServer(view, stepAt(view.server, i));
    table.style.visibility = i === length - 1 ? "visible" : "hidden";
  }

  function drawServer(view, step) {
    const width = Math.floor(view.strip.parentElement.clientWidth);
    if (view.drawn === `${step} ${width}`) return;
    view.drawn = `${step} ${width}`;
    const {server, cells} = view;
    const [running, waiting, finished, generated] = server.counts[step];
    cells.finished.textContent = `${finished} of ${numRequests} (all at ${seconds(server.final.finished_s)})`;
    cells.running.textContent = running;
    cells.waiting.textContent = waiting;
    cells.generated.textContent = `${generated} tokens`;
    data.fields.forEach((name, k) => { cells[name].textContent = percent(server.memory[step][k] / data.slots); });
    view.head.textContent = reasonToWait(server, step);
    view.strip.setAttribute("aria-label", `${server.name}: ${data.fields.map((name, k) =>
      `${name} ${server.memory[step][k]}`).join(", ")} of ${data.slots} slots`);
    if (width > 0) drawStrip(view.strip, server, step, width);  // else the scene is hidden
  }

  function reasonToWait(server, step) {
    const [, waiting, finished] = server.counts[step];
    if (finished === numRequests) return `All finished at ${seconds(server.final.finished_s)}.`;
    if (waiting === 0) return "Nobody waits.";
    if (server.heads[step] === null) return `Waiting: ${waiting}. No tokens are left in this step's budget.`;
    const [request, needed, available] = server.heads[step];
    if (server.paged) {
      const [blocks, free] = [needed / data.block_size, available / data.block_size];
      return needed > available
        ? `Request ${number(request)} waits for ${blocks} ${blocks === 1 ? "block" : "blocks"}: ${free} free.`
        : `Request ${number(request)} waits: the next free blocks are for requests that gave way.`;
    }
    const free = server.memory[step][data.fields.indexOf("external")];
    return `Request ${number(request)} waits for a range of ${needed} slots: ${free} are free, ` +
      `the longest gap has ${available}.`;
  }

  // The slots in order, in as many lines as make a slot wide enough to see.
  function drawStrip(strip, server, step, width) {
    const perLine = width >= 560 ? data.slots / 2 : data.slots / 4;
    const slotWidth = (width - 2) / perLine, lines = data.slots / perLine;
    strip.replaceChildren();
    strip.setAttribute("width", width);
    strip.setAttribute("height", lines * (LINE_HEIGHT + LINE_GAP) - LINE_GAP + 2);
    const gapKind = server.heads[step] === null ? "free" : "external";

    // Calls draws(x, y, width) for each line's part of the slots [start, end).
    function parts(start, end, draws) {
      for (let from = start; from < end; from = Math.floor(from / perLine + 1) * perLine) {
        const line = Math.floor(from / perLine), to = Math.min(end, (line + 1) * perLine);
        draws(1 + (from - line * perLine) * slotWidth, 1 + line * (LINE_HEIGHT + LINE_GAP), (to - from) * slotWidth);
      }
    }

    function fill(start, end, kind) {
      parts(start, end, (x, y, w) =>
        shape(strip, "rect", {x, y, width: w, height: LINE_HEIGHT, class: `twin-slots twin-${kind}`}));
    }

    let start = 0;
    for (const [slots, tokens, needed, ...holders] of server.segments[step]) {
      const end = start + slots;
      if (holders.length === 0) {
        fill(start, end, gapKind);
      } else {
        fill(start, start + tokens, "tokens");
        fill(start + tokens, start + needed, "reserved");
        fill(start + needed, end, "internal");
      }
      const label = holders.map(number).join("+");
      outline(start, end, label ? `request ${label}: ${tokens} tokens, ${needed - tokens} reserved, ` +
        `${slots - needed} ${server.paged ? "unfilled" : "never used"}` : `${slots} slots: ${gapKind}`);
      if (label) write(start, end, label);
      start = end;
    }

    function outline(from, to, title) {
      parts(from, to, (x, y, w) => {
        const border = shape(strip, "rect", {x, y, width: w, height: LINE_HEIGHT, class: "twin-border"});
        shape(border, "title", {}, title);
      });
    }

    function write(from, to, label) {
      parts(from, to, (x, y, w) => {
        if (w < DIGIT_WIDTH * label.length + 6) return;
        shape(strip, "text", {x: x + 4, y: y + 17, class: "twin-label"}, label);
      });
    }
  }

  // What happened

  // The most important event since the frame before; servers to which the same happened share one sentence.
  function caption(i) {
    if (i === 0) return `All arrive at once. Admitted: ${tally((server) => server.admitted[0].length)}.`;
    if (i === length - 1) return `All finished: ${tally((server) => seconds(server.final.finished_s))}.`;
    const events = data.servers.flatMap((server) => eventsBetween(server, stepAt(server, i - 1), stepAt(server, i)));
    if (events.length === 0) return `Finished: ${tally((server) => server.counts[stepAt(server, i)][2])}.`;
    const first = events.reduce((best, event) => event.rank < best.rank ? event : best);
    const names = events.filter(({text}) => text === first.text).map(({name}) => name);
    const who = names.join(" and ").replace("paged + sharing and paged", "both paged");
    return `${who[0].toUpperCase()}${who.slice(1)}: ${first.text}`;
  }

  // Whether frame i shows more than admissions and ends.
  function isEvent(i) {
    return i > 0 && data.servers.some((server) =>
      eventsBetween(server, stepAt(server, i - 1), stepAt(server, i)).some(({rank}) => rank <= 2));
  }

  function eventsBetween(server, before, now) {
    const found = [];
    const add = (rank, text) => found.push({rank, text, name: server.name});
    for (let step = before + 1; step <= now; step++) {
      const [, , finished] = server.counts[step];
      if (finished === numRequests) add(0, `all ${numRequests} have finished, at ${seconds(server.times[step])}.`);
      for (const request of server.preempted[step]) {
        add(1, `no block is free: request ${number(request)} gives way, and is computed again.`);
      }
      const [head, headBefore] = [server.heads[step], server.heads[step - 1]];
      if (head && !server.paged && (!headBefore || headBefore[0] !== head[0])) {
        add(2, `request ${number(head[0])} needs ${head[1]} slots, the longest gap has ${head[2]}.`);
      }
      if (server.admitted[step].length) add(3, `admits ${requests(server.admitted[step])}.`);
      if (server.ended[step].length) add(4, `finishes ${requests(server.ended[step])}, ${finished} of ${numRequests}.`);
    }
    return found;
  }

  const requests = (list) => list.length === 1 ? `request ${number(list[0])}`
    : list.length < 5 ? `requests ${list.slice(0, -1).map(number).join(", ")} and ${number(list.at(-1))}`
    : `${list.length} requests`;

  // "paged 14, oracle 12, ...", the fastest server first; the paged servers once if they agree.
  function tally(figureOf) {
    const figures = byFinish.map((server) => [server, figureOf(server)]);
    const [sharing, plain] = figures.filter(([server]) => server.paged);
    const alike = sharing[1] === plain[1];
    return figures.filter((entry) => entry !== sharing || !alike)
      .map((entry) => `${entry === plain && alike ? "both paged" : entry[0].name} ${entry[1]}`).join(", ");
  }

  const {views, table} = build();
  new ResizeObserver(() => draw(current)).observe(scene);
  draw(0);
  return {length, draw, caption, timeOf, isEvent};
}

twinScene.style = `
.twin { font-variant-numeric: tabular-nums; line-height: 1.4; color: var(--ink); }
.twin-hatches { position: absolute; }
.twin-note { margin: 0 0 .3rem; max-width: 110ch; font-size: .9375rem; }
.twin-legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; padding: 0; }
.twin-legend li { display: flex; list-style: none; align-items: center; gap: .4rem; font-size: .875rem; }
.twin-legend svg { flex: none; }
.twin-row { display: grid; gap: .1rem 1rem; margin: 0 0 .5rem; padding: .5rem 0 0; border-top: 1px solid var(--line); }
.twin-name { margin: 0; font-size: 1rem; }
.twin-about { margin-left: .6rem; font-size: .875rem; font-weight: normal; }
.twin-memory { min-width: 0; }
.twin-strip { display: block; }
.twin-head { margin: .15rem 0 0; min-height: 1.4em; font-size: .875rem; }
.twin-figures dl { display: grid; gap: 0 .5rem; margin: 0 0 .2rem; }
.twin-counts { grid-template-columns: 1.7fr 1fr 1fr 1.4fr; }
.twin-shares { grid-template-columns: repeat(5, 1fr); }
.twin-figures dt { font-size: .75rem; color: var(--muted); }
.twin-figures dd { margin: 0; font-size: .875rem; }
.twin-slots { fill: var(--paper); stroke: none; }
.twin-tokens { fill: var(--held); }
.twin-reserved { fill: url(#twin-reserved); }
.twin-internal { fill: url(#twin-internal); }
.twin-external { fill: url(#twin-external); }
.twin-border { stroke: var(--ink); stroke-width: 1; }
rect.twin-border:not(.twin-slots) { fill: transparent; }
.twin-dot { fill: var(--ink); }
.twin-stroke { fill: none; stroke: var(--ink); stroke-width: 1; }
.twin-cross { fill: none; stroke: var(--accent); stroke-width: 1.2; }
.twin-label { fill: var(--ink); stroke: var(--paper); stroke-width: 3px; stroke-opacity: .7; paint-order: stroke;
  font-size: 13px; }
.twin-end { overflow-x: auto; }
.twin-final { border-collapse: collapse; margin: .8rem 0; font-size: .875rem; }
.twin-final caption { text-align: left; font-weight: bold; }
.twin-final :is(th, td) { padding: .2rem 0 .2rem .6rem; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
.twin-final th:first-child { padding-left: 0; text-align: left; }
@media (min-width: 800px) {
  .twin-row { grid-template-columns: minmax(0, 1fr) 19rem; }
  .twin-name { grid-column: 1 / -1; }
}
`;
