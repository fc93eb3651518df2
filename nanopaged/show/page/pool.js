"use strict";
// A recording as a scene: above, requests' words cut into logical blocks; below, the pool; links between the two.

const MOST_WITH_TEXT = 512;  // blocks; beyond, the pool is drawn by density
const MOST_SELECTED = 6;  // as many as there are hues
const MOST_BOXES = 12;  // logical blocks of one request that are shown whole
const LANE = 15;  // pixels
const NARROW = 760;  // pixels; narrower windows show the links of small pools only
const TAGS = {seat: "found", take: "taken", in: "brought back", copy: "copy", keep: "no copy", publish: "full"};

// A request's label where there is little room, and block numbers stand beside it.
function inCell(label) {
  return label.includes(".") ? label : `R${label}`;
}

class PoolScene {
  constructor(scene, root, go, linkTo) {
    Object.assign(this, {scene, go, linkTo});  // go(frame) shows it, linkTo(frame) is a link to it
    this.length = scene.frames.length;
    this.replay = new Replay(scene);
    this.selected = [];  // requests by their hue
    this.pinned = null;  // the request that the reader chose
    this.focus = null;
    this.frame = 0;
    this.survey();
    this.build(root);
  }

  // Once through all frames: what the charts and the list of events need.
  survey() {
    const {scene, replay, length} = this, blocks = scene.num_blocks;
    this.lanes = new Uint8Array(length * scene.requests.length);
    this.still = new Uint8Array(length * blocks);
    this.areas = [];
    this.log = [];  // [frame, name] of what is worth a jump
    for (let i = 0; i < length; i++) {
      replay.seek(i);
      const s = replay.state, slots = [0, 0, 0, 0];
      for (let block = 0; block < blocks; block++) {
        const state = replay.blockState(block), held = state >= HELD;
        slots[0] += held ? s.filled[block] : 0;
        slots[1] += held ? replay.size - s.filled[block] : 0;
        slots[2] += state === CACHED ? replay.size : 0;
        slots[3] += state === FREE ? replay.size : 0;
        this.still[i * blocks + block] = state;
      }
      this.areas.push(slots);
      const computing = new Map();
      for (const [name, ...rows] of scene.frames[i][5])
        if (name === "fill") for (const [r, start, n] of rows) computing.set(r, n);
      for (let r = 0; r < scene.requests.length; r++) {
        let state = replay.isPending(r) ? ABSENT : s.status[r];
        if (state === RUNNING && computing.get(r) > 1) state = 5;  // prefill
        if (state === PREEMPTED && s.swapped[r]) state = 6;
        this.lanes[i * scene.requests.length + r] = state;
      }
      for (const name of scene.frames[i][3]) if (scene.rare.includes(name)) this.log.push([i, name]);
    }
  }

  build(root) {
    const {scene} = this;
    this.shown = scene.requests.map((_, r) => r).filter(r => this.everThere(r));
    this.links = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.links.setAttribute("class", "links");
    this.links.setAttribute("aria-hidden", "true");
    this.sequences = element("div", {class: "sequences", "aria-label": "requests and their block tables"});
    this.withText = scene.num_blocks <= MOST_WITH_TEXT;
    this.pool = this.withText ? this.buildCells() : this.buildDensity();
    this.figures = element("dl", {});
    this.soFar = element("dl", {});
    this.otherwise = element("dl", {});
    this.detail = element("div", {class: "detail", "aria-live": "polite"}, element("p", {class: "hint"},
      "Point at a block, tap it, or move to it with the tab key: its words, holders and parent appear here."));
    const legend = element("div", {class: "legend"});
    for (const [kind, what] of [["full", "held by a request, full"], ["half", "held, filled so far"], ["fresh", "written in this frame"],
                                ["cached", "cached: nobody holds it, its words can be found"], ["free", "free: empty"]])
      legend.append(element("span", {}, element("i", {class: kind}), what));
    legend.append("×3: three block tables name this block; R2: request 2 holds it");
    this.lanesChart = new Timeline(this.length, Math.max(1, this.shown.length) * LANE, "a lane for each request",
                                   (...all) => this.paintLanes(...all), (i, y) => this.pressed(i, y));
    this.lanesChart.left = 74;
    this.areaChart = new Timeline(this.length, 84, "what the slots of the pool hold, frame by frame",
                                  (...all) => this.paintAreas(...all), i => i !== null && this.go(i));
    this.areaChart.left = 74;
    this.stillChart = new Timeline(this.length, Math.min(240, Math.max(60, scene.num_blocks * 2)),
                                   "each block, frame by frame", (...all) => this.paintStill(...all),
                                   i => i !== null && this.go(i));
    this.stillChart.left = 74;
    const lanesLegend = element("p", {class: "hint"}, "From left to right, frame by frame; press to go there, or press a "
      + "name to select a request. Dotted: it waits. Dark: prefill, many tokens at once. Grey: decode, one token a step. "
      + "▼ and crossed: it gave way, and waits (a double line: its blocks are in CPU memory). ⚡: an eviction storm begins.");
    root.append(element("div", {class: "scene"}, this.links,
      element("section", {"aria-label": "blocks"},
        element("h2", {}, "Requests: their words, cut into logical blocks → physical block"), this.sequences,
        element("h2", {}, `The pool: ${scene.num_blocks} blocks, each with slots for ${scene.block_size} tokens`
          + (Object.values(scene.texts).length && Object.values(scene.texts).every(text => text.length === 1)
             ? " (here a token is a single byte)" : "")),
        this.pool, legend),
      element("aside", {}, element("h2", {}, "This block"), this.detail, element("h2", {}, "After this frame"),
        this.figures, element("h2", {}, "So far"),
        scene.frames[0][0] > 1 ? element("p", {class: "hint"}, `Counts are from the start of the recording, events from `
          + `step ${scene.frames[0][0]} on.`) : "", this.soFar, element("h2", {}, "The running requests would need"),
        this.otherwise),
      element("section", {"aria-label": "the whole run"}, element("h2", {}, "The whole run"), lanesLegend,
        element("div", {class: "scroll", tabindex: "0"}, this.lanesChart.root),
        element("h2", {}, "All slots of the pool: grey computed, yellow unfilled, hatched cached, blank free"), this.areaChart.root,
        element("h2", {}, "Each block (top: block 0): dark is shared, grey is held, hatched cached, blank free"),
        this.stillChart.root)));
    this.charts = [this.lanesChart, this.areaChart, this.stillChart];
    this.resized();
  }

  everThere(r) {
    const requests = this.scene.requests.length;
    for (let i = 0; i < this.length; i++) if (this.lanes[i * requests + r]) return true;
    return false;
  }

  buildCells() {
    this.cells = Array.from({length: this.scene.num_blocks}, (_, block) => {
      const head = element("span", {class: "head"}), text = element("span", {class: "text"});
      const cell = element("button", {class: "cell", "data-block": block}, head, text);
      for (const event of ["pointerenter", "focus", "click"]) cell.addEventListener(event, () => this.explain(block));
      return {cell, head, text, sign: ""};
    });
    return element("div", {class: "pool"}, ...this.cells.map(({cell}) => cell));
  }

  buildDensity() {
    const canvas = element("canvas", {tabindex: "0", role: "img", "aria-label":
      "the pool, a square for each block; arrow keys move from block to block"});
    this.density = canvas;
    this.cursorBlock = 0;
    const at = event => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / this.square), y = Math.floor((event.clientY - box.top) / this.square);
      return x < this.across ? y * this.across + x : this.scene.num_blocks;
    };
    for (const name of ["pointermove", "pointerdown"])
      canvas.addEventListener(name, event => at(event) < this.scene.num_blocks && this.explain(at(event)));
    canvas.addEventListener("keydown", event => {
      const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.across, ArrowDown: this.across}[event.key];
      const to = this.cursorBlock + by;
      if (!by || to < 0 || to >= this.scene.num_blocks) return;
      event.preventDefault();
      event.stopPropagation();
      this.explain(this.cursorBlock = to);
      this.paintDensity();
    });
    return element("div", {class: "density"}, canvas);
  }

  label(r) {
    return this.scene.requests[r].label;
  }

  hue(r) {
    const i = this.selected.indexOf(r);
    return i < 0 ? "" : `var(--hue-${i})`;
  }

  // Which requests have hues: all, if they are few; else those that the last frames were about. A request keeps its
  // hue as long as it is selected.
  choose(actors) {
    const few = this.shown.length <= MOST_SELECTED;
    if (few && !this.selected.length) this.selected = [...this.shown];
    for (const r of few ? [] : actors) this.select(r);
    const there = r => [WAITING, RUNNING, PREEMPTED].includes(this.replay.state.status[r]) && !this.replay.isPending(r);
    if (this.pinned !== null && there(this.pinned)) this.focus = this.pinned;
    else if (actors.length) this.focus = actors[0];
    else if (this.focus === null || !there(this.focus)) {
      this.focus = this.selected.find(there) ?? this.replay.withStatus(RUNNING, WAITING, PREEMPTED)[0] ?? null;
      if (this.focus !== null) this.select(this.focus);
    }
  }

  select(r) {
    this.recent = [r, ...(this.recent ?? []).filter(other => other !== r)];
    if (this.selected.includes(r)) return;
    if (this.selected.length < MOST_SELECTED) this.selected.push(r);
    else {
      const oldest = this.recent.findLast(other => other !== r && other !== this.pinned && this.selected.includes(other))
        ?? this.selected.find(other => other !== this.pinned);
      this.selected[this.selected.indexOf(oldest)] = r;
    }
  }

  pin(r) {
    this.pinned = this.pinned === r ? null : r;
    this.select(r);
    this.draw(this.frame);
  }

  pressed(i, y) {
    const r = this.shown[Math.floor(y / LANE)];
    if (i !== null) this.go(i);
    else if (r !== undefined) this.pin(r);
  }

  // The requests and blocks that a frame is about.
  about(i) {
    const actors = [], takers = [], tags = new Map();
    let ghost = null;
    const s = this.replay.state;
    for (const [name, ...rows] of this.scene.frames[i][5])
      for (const row of rows) {
        if (name === "preempt") actors.push(row[1], row[0]);  // who needs the block comes first
        if (["seat", "copy", "keep", "twin", "start", "end"].includes(name)) actors.push(row[0]);
        if (name === "take") takers.push(row[0]);
        if (name === "add") actors.push(row[0][0]);
        if (name === "seat" || name === "take") for (const block of row[1]) tags.set(block, TAGS[name]);
        if (name === "copy") {
          ghost = [row[1], row[2]];
          tags.set(row[1], `×${s.holders[row[1]] + 1} → ×${s.holders[row[1]]}`);
          tags.set(row[2], "copy");
        }
        if (name === "in") tags.set(row[2], TAGS.in);
        if (name === "keep" || name === "publish") {
          const block = s.tables[row[0]][row[1]];
          if (block !== undefined) tags.set(block, TAGS[name]);
        }
        if (name === "twin") tags.set(row[2], "the same");
      }
    return {actors: [...new Set([...actors, ...takers])], tags, ghost};
  }

  // A question about frame `i` is asked: shows whom it is about, and nothing of what happens.
  anticipate(i) {
    this.draw(this.frame, this.about(i).actors);
  }

  draw(i, about = null) {
    this.replay.seek(i - 1);
    const before = i >= 0 && this.withText ? this.replay.state.holders.slice() : null;
    const published = before && this.replay.state.published.slice();
    const wordsBefore = published && Array.from(published, (is, block) => is ? this.replay.words(block).join("") : "");
    this.isWriting = i >= 0 && this.scene.frames[i][5].some(([name]) => name === "fill");
    this.filledBefore = before && this.replay.state.filled.slice();
    this.replay.seek(i);
    this.frame = i;
    const {actors, tags, ghost} = i >= 0 ? this.about(i) : {actors: [], tags: new Map(), ghost: null};
    this.lost = new Map();
    if (before)
      for (let block = 0; block < before.length; block++) {
        if (before[block] && !this.replay.state.holders[block])
          tags.set(block, this.replay.state.published[block] ? "cached" : "freed");
        if (published[block] && !before[block] && tags.get(block) === "taken") {
          tags.set(block, "evicted, taken");
          this.lost.set(block, wordsBefore[block]);
        }
      }
    this.choose(about ?? actors);
    this.drawSequences(tags);
    if (this.withText) this.drawCells(tags);
    else this.paintDensity();
    this.drawLinks(ghost, tags);
    this.drawFigures();
    for (const chart of this.charts) chart.show(Math.max(0, i));
    const lanes = this.lanesChart.root.parentElement, y = this.shown.indexOf(this.focus) * LANE;
    if (y < lanes.scrollTop || y + LANE > lanes.scrollTop + lanes.clientHeight) lanes.scrollTop = y - 3 * LANE;
    if (this.explained !== undefined) this.explain(this.explained);
  }

  drawSequences(tags) {
    const s = this.replay.state;
    const order = [...this.selected].filter(r => s.status[r] && !this.replay.isPending(r));
    if (!order.includes(this.focus) && this.focus !== null) order.unshift(this.focus);
    const live = order.filter(r => s.status[r] !== FINISHED || r === this.focus);
    const others = this.shown.length > MOST_SELECTED ? element("p", {class: "hint"}, "Shown are those that something "
      + "happened to last, at most six. Find others by their number or words, or press the name of a lane.") : "";
    this.sequences.replaceChildren(...live.map(r => this.sequence(r, tags)), live.length ? others
      : element("p", {class: "hint"}, "No request is here."));
  }

  statusText(r) {
    const s = this.replay.state, waiting = s.known[r] - s.computed[r];
    if (s.status[r] === RUNNING) return waiting > 1 ? `runs, ${waiting} tokens to compute` : "runs";
    if (s.status[r] === PREEMPTED) return s.swapped[r] ? "gave way, in CPU memory" : "gave way, waits";
    return {[WAITING]: "waits", [FINISHED]: "is done"}[s.status[r]] ?? "";
  }

  sequence(r, tags) {
    const s = this.replay.state, table = s.tables[r], size = this.replay.size, logical = element("div", {class: "logical"});
    const head = table.length > MOST_BOXES ? 2 : table.length, tail = Math.max(head, table.length - 6);
    for (let i = 0; i < table.length; i++) {
      if (i >= head && i < tail) {
        if (i === head) logical.append(element("span", {class: "box more"}, `… ${tail - head} more blocks …`));
        continue;
      }
      const block = table[i], filled = Math.max(0, Math.min(size, s.computed[r] - i * size));
      const text = this.replay.text(r, i * size, i * size + filled) || (this.scene.text ? "" : `${filled} tokens`);
      const shared = s.holders[block] > 1 ? ` ×${s.holders[block]}` : "";
      logical.append(element("span", {class: `box${i === table.length - 1 ? " last" : ""}`, "data-box": `${r} ${i}`,
        "data-at": block, style: {"--share": `${100 * filled / size}%`}},
        element("span", {class: "text"}, text || " "),
        element("span", {class: "at"}, `${i} → block ${block}${shared}` + (filled < size ? `, ${filled} of ${size}` : ""))));
    }
    const uncomputed = this.replay.text(r, s.computed[r], s.known[r]);
    if (s.status[r] !== FINISHED && s.known[r] > s.computed[r])
      logical.append(element("span", {class: "box known last"}, element("span", {class: "text"},
        uncomputed.length > 32 ? `${uncomputed.slice(0, 14)} … ${uncomputed.slice(-14)}` : uncomputed || "…"),
        element("span", {class: "at"}, `${s.known[r] - s.computed[r]} not computed`)));
    const hue = this.hue(r) || "var(--line)";
    return element("div", {class: `sequence${r === this.focus ? " focus" : ""}`, "data-request": this.label(r),
                           style: {"--hue": hue}},
      element("button", {class: "name", "aria-pressed": String(this.pinned === r), title:
        "select this request, and keep it", onclick: () => this.pin(r)},
        element("b", {}, `${this.pinned === r ? "• " : ""}request ${this.label(r)}`), element("small", {}, this.statusText(r))),
      logical);
  }

  drawCells(tags) {
    const s = this.replay.state;
    const holders = Array.from({length: s.holders.length}, () => []);
    for (const r of this.replay.withStatus(RUNNING)) for (const block of s.tables[r]) holders[block].push(r);
    for (let block = 0; block < this.cells.length; block++) {
      const kept = this.cells[block], state = this.replay.blockState(block), words = this.replay.words(block);
      const hues = holders[block].filter(r => this.hue(r)), tag = tags.get(block) ?? "";
      const first = hues.includes(this.focus) ? this.focus : hues[0];
      const chips = [...hues].slice(0, 4).map(r => [this.label(r), this.hue(r)]);
      const old = state >= HELD && this.isWriting ? Math.min(s.filled[block], this.filledBefore[block]) : s.filled[block];
      const sign = JSON.stringify([state, old, s.filled[block], words, chips, holders[block].length, tag, first === this.focus]);
      if (sign === kept.sign) continue;
      kept.sign = sign;
      const {cell, head, text} = kept;
      cell.className = `cell ${["free", "cached", "held", "held shared"][state]}${tag ? " changed" : ""}`
        + (first !== undefined && first === this.focus ? " mine" : "");
      cell.style.setProperty("--before", `${100 * old / this.replay.size}%`);
      cell.style.setProperty("--share", state === CACHED ? "0%" : `${100 * s.filled[block] / this.replay.size}%`);
      cell.style.setProperty("--hue", first === undefined ? "" : this.hue(first));
      head.replaceChildren(element("span", {class: "number"}, String(block)));
      if (state === SHARED) head.append(element("span", {class: "badge"}, `×${s.holders[block]}`));
      for (const [label, hue] of chips) head.append(element("span", {class: "chip", style: {"--hue": hue}}, inCell(label)));
      const others = holders[block].length - chips.length;
      if (others && !(state === SHARED && this.isCompact)) head.append(element("span", {class: "others"}, chips.length ? `+${others}` : others === 1
        ? inCell(this.label(holders[block][0])) : ""));
      if (state === CACHED) head.append(element("span", {class: "state"}, "cached"));
      const plain = this.scene.text ? words : [state === FREE ? "" : `${s.filled[block]} of ${this.replay.size}`, "", ""];
      text.replaceChildren(...(this.lost.get(block) ? [element("s", {}, this.lost.get(block))] : []), plain[0], ...(plain[1] ? [element("mark", {}, plain[1])] : []), plain[2]);
      cell.querySelector(".tag")?.remove();
      if (tag) cell.append(element("span", {class: "tag"}, tag));
      cell.setAttribute("aria-label", `block ${block}, ${["free", "cached", "held", "shared"][state]}${tag ? `, ${tag}` : ""}`);
    }
  }

  paintDensity() {
    const s = this.replay.state, width = this.pool.clientWidth, blocks = this.scene.num_blocks;
    if (!width) return;
    this.square = Math.max(7, Math.min(16, Math.floor(Math.sqrt(width * 380 / blocks))));
    this.across = Math.floor(width / this.square);
    const context = sized(this.density, width, Math.ceil(blocks / this.across) * this.square);
    const [ink, line, held, paper, accent] = ["ink", "line", "full", "paper", "accent"].map(colour);
    const hatching = hatch(context, line, 4), mine = new Map(), edge = this.square - 1.5;
    for (const r of this.selected) for (const block of s.tables[r]) if (!mine.has(block)) mine.set(block, this.selected.indexOf(r));
    const hues = this.selected.map((_, i) => colour(`hue-${i}`));
    for (let block = 0; block < blocks; block++) {
      const x = block % this.across * this.square, y = Math.floor(block / this.across) * this.square;
      const state = this.replay.blockState(block);
      context.strokeStyle = line;
      context.lineWidth = 0.5;
      context.strokeRect(x + 0.5, y + 0.5, edge, edge);
      if (state === CACHED || state >= HELD) {
        context.fillStyle = state === CACHED ? hatching : state === SHARED ? ink : held;
        const share = state === CACHED ? 1 : s.filled[block] / this.replay.size;
        context.fillRect(x + 0.5, y + 0.5 + edge * (1 - share), edge, edge * share);
      }
      if (mine.has(block)) {
        context.fillStyle = hues[mine.get(block)];
        context.fillRect(x + edge * 0.3, y + edge * 0.3, edge * 0.5, edge * 0.5);
      }
      if (block === this.explained) {
        context.strokeStyle = accent;
        context.lineWidth = 2;
        context.strokeRect(x, y, edge + 1, edge + 1);
      }
    }
  }

  cellAt(block) {
    if (this.withText) return this.cells[block].cell.getBoundingClientRect();
    const box = this.density.getBoundingClientRect();
    return {left: box.left + block % this.across * this.square, top: box.top + Math.floor(block / this.across) * this.square,
            width: this.square, height: this.square};
  }

  // From each logical block of the request in focus to its cell, and from those of others to shared cells that changed
  // or are explained; and from a block to its copy.
  drawLinks(ghost, tags) {
    const home = this.links.getBoundingClientRect(), paths = [];
    if (this.isCompact && window.innerWidth < NARROW) return this.links.replaceChildren();
    for (const box of this.sequences.querySelectorAll(".box[data-at]")) {
      const block = Number(box.dataset.at), row = box.closest(".sequence"), isMine = row.classList.contains("focus");
      const isShared = this.replay.state.holders[block] > 1 && (tags.has(block) || block === this.explained);
      const from = box.getBoundingClientRect();
      if (!from.width || !(isMine || isShared)) continue;
      const to = this.cellAt(block), hue = row.style.getPropertyValue("--hue");
      const x = from.left + from.width / 2 - home.left, y = from.bottom - home.top;
      const u = to.left + to.width / 2 - home.left, v = to.top - home.top, bend = Math.max(12, (v - y) * 0.45);
      paths.push(svgPath(`M${u - 3},${v} a3,3 0 1 0 6,0 a3,3 0 1 0 -6,0`, {style: `stroke:${hue};fill:${hue}`}));
      paths.push(svgPath(`M${x},${y} C${x},${y + bend} ${u},${v - bend} ${u},${v}`, {style: `stroke:${hue}`,
        [isMine ? "data-link" : "data-other"]: block}));
    }
    if (ghost) {
      const [from, to] = ghost.map(block => this.cellAt(block));
      const x = from.left + from.width / 2 - home.left, y = from.top + from.height / 2 - home.top;
      const u = to.left + to.width / 2 - home.left, v = to.top + to.height / 2 - home.top;
      const length = Math.hypot(u - x, v - y) || 1, [a, b] = [(u - x) / length * 9, (v - y) / length * 9];
      paths.push(svgPath(`M${x},${y} L${u},${v} m${-a - b},${-b + a} L${u},${v} L${u - a + b},${v - b - a}`,
                         {class: "ghost", "data-ghost": ghost.join(" ")}));
    }
    this.links.replaceChildren(...paths);
  }

  drawFigures() {
    const f = this.replay.figures(), s = this.replay.state;
    const percent = (part, all) => all ? ` (${Math.round(100 * part / all)}%)` : "";
    const unfilled = f.reserved_slots - f.filled_slots;
    const running = this.replay.withStatus(RUNNING), blocksFor = tokens => Math.ceil(tokens / this.replay.size);
    const alone = running.reduce((sum, r) => sum + s.tables[r].length, 0);
    const full = running.reduce((sum, r) => sum + blocksFor(this.scene.requests[r].max - 1), 0);
    const limit = blocksFor(this.scene.max_model_len), fit = Math.floor(f.num_blocks / limit);
    const waiting = this.replay.withStatus(WAITING, PREEMPTED), plural = n => `${n} ${n === 1 ? "block" : "blocks"}`;
    const names = waiting.slice(0, 8).map(r => this.label(r)).join(", ") + (waiting.length > 8 ? ", …" : "");
    const fresh = [...s.holders.keys()].filter(block => s.holders[block] && !s.filled[block]).length * this.replay.size;
    const show = (list, rows) => list.replaceChildren(...Object.entries(rows).flatMap(([name, value]) =>
      [element("dt", {}, name), element("dd", {"data-figure": name}, String(value))]));
    show(this.figures, {
      "running": f.num_running, "waiting": waiting.length ? `${waiting.length}: ${names}` : 0,
      "held": `${f.referenced_blocks} of ${plural(f.num_blocks)}`, "shared": plural(f.shared_blocks),
      "cached": plural(f.cached_blocks), "free": plural(f.free_blocks),
      "unfilled": `${unfilled} of ${f.reserved_slots} held slots${percent(unfilled, f.reserved_slots)}: `
        + (fresh ? `${fresh} just taken, ${unfilled - fresh} at the ends of last blocks` : "the ends of last blocks"),
    });
    show(this.otherwise, {
      "without sharing": `${plural(alone)}; sharing saves ${alone - f.referenced_blocks}`,
      "without paging": `${plural(full)}, the full length of each reserved; paging saves ${full - alone} more`,
      "without knowing lengths": `${plural(limit)} for each, since it may reach ${this.scene.max_model_len} tokens: `
        + `${fit ? `${fit} would fit` : "not one would fit"}`,
    });
    this.drawSoFar(f);
  }

  drawSoFar(f) {
    const most = [...this.replay.state.holders.keys()].reduce((best, block) =>
      this.replay.state.holders[block] > this.replay.state.holders[best] ? block : best, 0);
    const rows = [["computed", `${f.computed_tokens} tokens` + (f.recomputed_tokens ? `, ${f.recomputed_tokens} of them again` : "")],
                  ["prefix found", `${f.prefix_hit_tokens} tokens, instead of computing them`], ["evicted", `${f.evicted_blocks} ${f.evicted_blocks === 1 ? "block" : "blocks"}`]];
    if (f.shared_blocks) rows.unshift(["most shared", `block ${most}, ×${this.replay.state.holders[most]}`]);
    const list = [];
    for (const [title, names] of [["gave way", ["gives way"]], ["had to wait", ["waits"]], ["copied", ["copies"]],
                                  ["storms", ["storm"]]]) {
      const frames = this.log.filter(([i, name]) => i <= this.frame && names.includes(name)).map(([i]) => i);
      const value = element("dd", {}, frames.length ? "" : "none yet");
      for (const i of frames.slice(-3).reverse())
        value.append(element("a", {href: this.linkTo(i), onclick: event => { event.preventDefault(); this.go(i); }},
          `${this.scene.frames[i][2].replace(/^Eviction storm.*/, "eviction storm")} (step ${this.scene.frames[i][0]})`),
          element("br"));
      if (frames.length > 3) value.append(`and ${frames.length - 3} times before`);
      list.push(element("dt", {}, title), value);
    }
    this.soFar.replaceChildren(...list, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  }

  explain(block) {
    this.explained = block;
    const s = this.replay.state, state = this.replay.blockState(block), words = this.replay.words(block);
    const place = s.placeOf[block], i = s.placeAt[block], holders = this.replay.holdersOf(block);
    const lines = [["words", words.join("") || (s.filled[block] ? "not in the recording" : "none")],
      ["filled", `${s.filled[block]} of ${this.replay.size} slots`],
      ["holders", holders.length ? holders.map(r => `request ${this.label(r)}`).join(", ") : "none"]];
    const [holder] = holders, at = holder === undefined ? i : s.tables[holder].indexOf(block);
    if (at > 0) {
      const parent = holder !== undefined ? s.tables[holder][at - 1] : -1;
      const before = this.replay.text(holder ?? place, (at - 1) * this.replay.size, at * this.replay.size);
      lines.push(["parent", `${parent >= 0 ? `block ${parent}: ` : ""}${before}`]);
    } else if (state !== FREE) lines.push(["parent", "none: it is the beginning"]);
    this.detail.replaceChildren(element("b", {}, `block ${block}: ${["free", "cached", "held by one request", "shared"][state]}`
      + (s.published[block] ? ", can be found" : "")), ...lines.map(([name, value]) =>
      element("div", {}, `${name}: `, element("span", {class: name === "words" || name === "parent" ? "words" : ""}, value))));
    if (!this.withText) this.paintDensity();
  }

  // Charts.

  paintLanes(context, width, height, x) {
    const requests = this.scene.requests.length, ink = colour("ink"), grey = colour("line"), accent = colour("accent");
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.shown.forEach((r, row) => {
      const y = row * LANE;
      context.fillStyle = ink;
      context.fillText(this.label(r).slice(0, 11), 2, y + LANE / 2);
      let from = 0;
      for (let i = 1; i <= this.length; i++) {
        const state = this.lanes[from * requests + r];
        if (i < this.length && this.lanes[i * requests + r] === state) continue;
        this.paintState(context, state, x(from), y, x(i) - x(from), ink, grey, accent);
        from = i;
      }
    });
    context.fillStyle = accent;
    for (const [i, name] of this.log) {
      if (name === "storm") {
        context.fillRect(x(i), 0, 1, height);
        context.fillText("⚡", x(i) + 2, 7);
      }
      if (name === "gives way") {
        const r = this.scene.frames[i][5].find(([kind]) => kind === "preempt")[1][0], y = this.shown.indexOf(r) * LANE;
        context.fillText("▼", x(i) - 4, y + 7);
      }
    }
  }

  paintState(context, state, x, y, width, ink, grey, accent) {
    const middle = y + LANE / 2;
    context.strokeStyle = grey;
    context.fillStyle = grey;
    context.lineWidth = 1.5;
    const line = (at, dash) => {
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(x, at);
      context.lineTo(x + width, at);
      context.stroke();
      context.setLineDash([]);
    };
    if (state === WAITING) line(middle, [2, 3]);
    if (state === RUNNING) context.fillRect(x, y + 3, width, LANE - 6);
    if (state === 5) {
      context.fillStyle = ink;
      context.fillRect(x, y + 2, width, LANE - 4);
    }
    if (state === PREEMPTED) {
      context.strokeStyle = accent;
      line(middle, []);
      for (let at = x + 2; at < x + width - 3; at += 8) {
        context.beginPath();
        context.moveTo(at, middle - 3);
        context.lineTo(at + 5, middle + 3);
        context.moveTo(at, middle + 3);
        context.lineTo(at + 5, middle - 3);
        context.stroke();
      }
    }
    if (state === 6) {
      context.strokeStyle = accent;
      line(middle - 2, []);
      line(middle + 2, []);
    }
  }

  paintAreas(context, width, height, x) {
    const slots = this.scene.num_blocks * this.replay.size, scale = height / slots;
    const fills = [colour("line"), colour("unfilled"), hatch(context, colour("line"), 5)];
    context.strokeStyle = colour("line");
    context.strokeRect(x(0), 0.5, width - x(0) - 1, height - 1);
    const step = Math.max(1, Math.floor(this.length / (width - x(0))));
    for (let i = 0; i < this.length; i += step) {
      let y = height;
      fills.forEach((fill, kind) => {
        const tall = this.areas[i][kind] * scale;
        context.fillStyle = fill;
        context.fillRect(x(i), y - tall, x(i + step) - x(i) + 0.6, tall);
        y -= tall;
      });
    }
    context.fillStyle = colour("ink");
    context.font = "11px system-ui, sans-serif";
    context.fillText(`${slots} slots`, 2, 12);
    context.fillText("0", 2, height - 3);
  }

  paintStill(context, width, height, x) {
    const blocks = this.scene.num_blocks, tall = height / blocks;
    const [ink, held, line] = ["ink", "full", "line"].map(colour), hatching = hatch(context, line, 4);
    const step = Math.max(1, Math.floor(this.length / (width - x(0))));
    const rowStep = Math.max(1, Math.floor(blocks / height));
    for (let block = 0; block < blocks; block += rowStep) {
      let from = 0;
      const at = i => this.still[i * blocks + block];
      for (let i = step; i < this.length + step; i += step) {
        if (i < this.length && at(i) === at(from)) continue;
        const state = at(from);
        if (state !== FREE) {
          context.fillStyle = state === CACHED ? hatching : state === SHARED ? ink : held;
          context.fillRect(x(from), block * tall, x(Math.min(i, this.length)) - x(from), Math.max(0.8, tall * rowStep - (tall > 3 ? 0.5 : 0)));
        }
        from = i;
      }
    }
    context.fillStyle = ink;
    context.font = "11px system-ui, sans-serif";
    context.fillText("block 0", 2, 11);
    context.fillText(`block ${blocks - 1}`, 2, height - 3);
  }

  resized() {
    if (this.withText) {
      const width = this.pool.parentElement.clientWidth || 800, blocks = this.scene.num_blocks;
      const wanted = blocks <= 48 ? 132 : blocks <= 128 ? 108 : 92;
      this.pool.style.setProperty("--columns", String(Math.max(2, Math.min(blocks, Math.floor(width / wanted)))));
      this.pool.classList.toggle("compact", this.isCompact = blocks > 64);
    }
    for (const chart of this.charts) chart.draw();
  }

  // What the player needs to know.

  name(i) {
    return `${this.scene.frames[i][0]}.${this.scene.frames[i][1]}`;
  }

  find(name) {
    const [step, part = "1"] = name.split(".");
    const exact = this.scene.frames.findIndex(frame => frame[0] === +step && frame[1] === +part);
    return exact >= 0 ? exact : this.scene.frames.findIndex(frame => frame[0] === +step);
  }

  where(i) {
    const [step] = this.scene.frames[i], last = this.scene.frames.at(-1)[0];
    const parts = this.scene.frames.filter(frame => frame[0] === step).length;
    return `step ${step} of ${last}, frame ${this.scene.frames[i][1]} of ${parts}`;
  }

  telling(i) {
    const [, , caption, names, why, , question] = this.scene.frames[i];
    return {caption, names, why, question};
  }

  kinds() {
    return this.scene.rare.filter(name => this.log.some(([, other]) => other === name));
  }

  isEvent(i, kind) {
    const names = this.scene.frames[i][3];
    return kind ? names.includes(kind) : names.some(name => this.scene.rare.includes(name));
  }

  // Selects a request by its number, or by words of it; returns what was found, in words, and the frame to go to.
  search(text) {
    const wanted = text.trim().replace(/^(request\s+|r(?=\d))/i, "").toLowerCase(), {requests} = this.scene;
    if (!wanted) return null;
    const says = q => this.replay.tokens[q] && this.replay.text(q, 0, this.replay.tokens[q].length)
      .replaceAll("↵", " ").toLowerCase().includes(wanted);
    let r = requests.findIndex(request => request.label === wanted);
    if (r < 0) {  // the next that says so, after the one that was found last
      const after = [...requests.keys()].map(q => (q + (this.pinned ?? -1) + 1) % requests.length);
      r = after.find(says) ?? -1;
    }
    if (r < 0) return null;
    this.pinned = r;
    this.select(r);
    const there = i => ![ABSENT, FINISHED].includes(this.lanes[i * requests.length + r]);
    if (there(this.frame)) return {said: `request ${this.label(r)} is selected`, to: this.frame};
    const to = Array.from({length: this.length}, (_, i) => i).find(there) ?? this.frame;
    return {said: `request ${this.label(r)} is selected; it was not here, so this is when it arrives`, to};
  }
}
