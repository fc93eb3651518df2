"use strict";
// The state of a scene after each of its frames: show/replay.py's State once more, for numbers instead of names.

const STATUSES = ["", "waiting", "running", "preempted", "finished"];  // "": it has not arrived
const [ABSENT, WAITING, RUNNING, PREEMPTED, FINISHED] = STATUSES.keys();
const FREE = 0, CACHED = 1, HELD = 2, SHARED = 3;  // states of a block
const SNAPSHOT_EVERY = 64;  // frames; going back replays less than that

class Replay {
  constructor(scene) {
    this.scene = scene;
    this.size = scene.block_size;
    const blocks = scene.num_blocks, requests = scene.requests.length;
    this.state = {
      holders: new Int32Array(blocks), filled: new Int32Array(blocks), published: new Uint8Array(blocks),
      placeOf: new Int32Array(blocks).fill(-1), placeAt: new Int32Array(blocks),
      tables: Array.from({length: requests}, () => []), status: new Uint8Array(requests),
      computed: new Int32Array(requests), known: new Int32Array(requests), most: new Int32Array(requests),
      swapped: new Int32Array(requests), copies: {},  // of each copy: its source
      counts: {...scene.counts}, pending: {preempted: 0, again: 0},
    };
    for (const [name, ...rows] of scene.start) this.begin(name, rows);
    this.tokens = this.allTokens();
    this.at = -1;
    this.snapshots = [this.copied()];
  }

  // All tokens that each request ever has; what it has in common with an earlier one is stored there.
  allTokens() {
    const all = [];
    for (const request of this.scene.requests) {
      const [like, common] = request.like ?? [0, 0];
      all.push(request.tokens ? [...(all[like] ?? []).slice(0, common), ...request.tokens] : null);
    }
    return all;
  }

  begin(name, row) {
    const s = this.state;
    if (name === "published") for (const block of row[0]) s.published[block] = 1;
    if (name === "counts") s.counts = {...row[0]};
    if (name === "pending") s.pending = {preempted: row[0], again: row[1]};
    if (name === "place") [s.filled[row[0]], s.placeOf[row[0]], s.placeAt[row[0]]] = [row[1], row[2], row[3]];
    if (name === "be") {
      const [r, status, table, computed, known, most, swapped] = row;
      s.status[r] = STATUSES.indexOf(status);
      this.hold(r, table);
      [s.computed[r], s.known[r], s.most[r], s.swapped[r]] = [computed, known, most, swapped];
    }
  }

  copied() {
    const s = this.state, copy = {};
    for (const [name, value] of Object.entries(s))
      copy[name] = name === "tables" ? value.map(table => table.slice())
        : ArrayBuffer.isView(value) ? value.slice() : {...value};
    return copy;
  }

  // Makes `state` that after frame `i`; -1 is before the first.
  seek(i) {
    const near = Math.min(Math.floor((i + 1) / SNAPSHOT_EVERY), this.snapshots.length - 1);
    if (i < this.at || near * SNAPSHOT_EVERY - 1 > this.at) {
      this.state = this.snapshots[near];
      this.state = this.copied();
      this.at = near * SNAPSHOT_EVERY - 1;
    }
    while (this.at < i) {
      this.at++;
      for (const [name, ...rows] of this.scene.frames[this.at][5]) for (const row of rows) this.apply(name, row);
      if ((this.at + 1) % SNAPSHOT_EVERY === 0 && this.snapshots.length === (this.at + 1) / SNAPSHOT_EVERY)
        this.snapshots.push(this.copied());
    }
  }

  apply(name, row) {
    const s = this.state, [r] = row;
    switch (name) {
      case "add":
        for (const member of row[0]) [s.status[member], s.known[member]] = [WAITING, row[1]];
        if (row.length > 2) {  // it was there when the recording began
          this.begin("be", [row[0][0], ...row.slice(2)]);
          this.fill(row[0][0], 0, s.computed[row[0][0]]);
        }
        break;
      case "seat":
        s.status[r] = RUNNING;
        this.hold(r, row[1]);
        s.computed[r] = row[1].length * this.size + row[2];
        s.swapped[r] = 0;
        s.counts.prefix_hit_tokens += row[1].length * this.size;
        break;
      case "take":
        this.empty(row[1]);
        this.hold(r, row[1]);
        break;
      case "in": {
        this.empty([row[2]]);
        this.hold(r, [row[2]]);
        const i = s.tables[r].length - 1;
        s.filled[row[2]] = Math.min(this.size, s.computed[r] - i * this.size);
        [s.placeOf[row[2]], s.placeAt[row[2]]] = [r, i];
        break;
      }
      case "copy": {
        const [, source, target] = row, i = s.tables[r].indexOf(source);
        this.empty([target]);
        [s.holders[target], s.filled[target], s.placeOf[target], s.placeAt[target]] = [1, s.filled[source], r, i];
        s.tables[r][i] = target;
        s.copies[target] = source;
        this.release(source);
        if (s.placeOf[source] === r) s.placeOf[source] = s.tables.findIndex(table => table[i] === source);
        break;
      }
      case "preempt":
        s.status[r] = PREEMPTED;
        s.most[r] = Math.max(s.most[r], s.computed[r]);
        s.computed[r] = 0;
        s.pending.preempted++;
        break;
      case "out": s.swapped[r]++; break;
      case "back":
        while (s.tables[r].length) this.release(s.tables[r].pop());
        break;
      case "fill": {
        const [, start, n] = row, end = start + n;
        s.pending.again += Math.max(0, Math.min(end, s.most[r]) - start);
        s.computed[r] = end;
        s.counts.computed_tokens += n;
        this.fill(r, start, end);
        break;
      }
      case "token":
        s.known[r]++;
        s.counts.output_tokens++;
        break;
      case "publish": s.published[s.tables[r][row[1]]] = 1; break;
      case "twin": {
        const own = s.tables[r][row[1]];
        s.tables[r][row[1]] = row[2];
        s.holders[row[2]]++;
        this.release(own);
        break;
      }
      case "start":
        s.status[r] = RUNNING;
        s.computed[r] = s.computed[row[1]];
        this.hold(r, s.tables[row[1]]);
        break;
      case "end":
        s.status[r] = FINISHED;
        s.swapped[r] = 0;
        s.counts.num_finished++;
        break;
      case "recorded":
        s.counts.num_steps++;
        s.counts.computed_tokens += row[0];  // of requests that failed
        s.counts.num_preemptions += s.pending.preempted;
        s.counts.recomputed_tokens += s.pending.again;
        s.pending = {preempted: 0, again: 0};
        break;
    }
  }

  hold(r, blocks) {
    for (const block of blocks) {
      this.state.holders[block]++;
      this.state.tables[r].push(block);
    }
  }

  fill(r, start, end) {
    const s = this.state;
    for (let i = Math.floor(start / this.size); i * this.size < end; i++) {
      const block = s.tables[r][i];
      s.filled[block] = Math.min(this.size, end - i * this.size);
      [s.placeOf[block], s.placeAt[block]] = [r, i];
    }
  }

  // Blocks that are taken are empty; one that was cached is evicted with it.
  empty(blocks) {
    const s = this.state;
    for (const block of blocks) {
      if (s.published[block]) s.counts.evicted_blocks++;
      s.published[block] = s.filled[block] = 0;
      s.placeOf[block] = -1;
      delete s.copies[block];
      for (const [copy, source] of Object.entries(s.copies)) if (source === block) delete s.copies[copy];
    }
  }

  release(block) {
    const s = this.state;
    s.holders[block]--;
    if (s.holders[block] === 0 && !s.published[block]) s.filled[block] = 0;
  }

  blockState(block) {
    const s = this.state, holders = s.holders[block];
    return holders > 1 ? SHARED : holders ? HELD : s.published[block] ? CACHED : FREE;
  }

  // A follower that has not started is part of its leader.
  isPending(r) {
    const leader = this.scene.requests[r].leader;
    return leader !== r && this.state.status[r] === WAITING;
  }

  withStatus(...statuses) {
    return [...this.state.status.keys()].filter(r => statuses.includes(this.state.status[r]) && !this.isPending(r));
  }

  // The plain numbers of LLM.stats(), by their names there.
  figures() {
    const s = this.state, of = [0, 0, 0, 0];
    let filled = 0;
    for (let block = 0; block < s.holders.length; block++) {
      of[this.blockState(block)]++;
      if (s.holders[block]) filled += s.filled[block];
    }
    return {...s.counts, num_blocks: s.holders.length, referenced_blocks: of[HELD] + of[SHARED],
            cached_blocks: of[CACHED], free_blocks: of[FREE], shared_blocks: of[SHARED],
            reserved_slots: (of[HELD] + of[SHARED]) * this.size, filled_slots: filled,
            num_waiting: this.withStatus(WAITING, PREEMPTED).length, num_running: this.withStatus(RUNNING).length};
  }

  holdersOf(block) {
    return this.withStatus(RUNNING).filter(r => this.state.tables[r].includes(block));
  }

  // Bytes become text; half a character is shown as the replacement character.
  text(r, from, to) {
    const tokens = this.tokens[r];
    if (!tokens) return "";
    const bytes = tokens.slice(from, to).map(id => this.scene.texts[id] ?? `‹${id}›`).join("");
    if ([...bytes].some(c => c > "\u00ff")) return bytes;
    return new TextDecoder("utf-8", {ignoreBOM: true}).decode(Uint8Array.from(bytes, c => c.charCodeAt(0))).replaceAll("\n", "↵");
  }

  // The first slot in which two blocks hold different tokens; -1 if there is none.
  firstDifference(one, other) {
    const s = this.state, [r, q] = [s.placeOf[one], s.placeOf[other]];
    if (r < 0 || q < 0 || !this.tokens[r] || !this.tokens[q]) return -1;
    for (let i = 0; i < Math.min(s.filled[one], s.filled[other]); i++)
      if (this.tokens[r][s.placeAt[one] * this.size + i] !== this.tokens[q][s.placeAt[other] * this.size + i]) return i;
    return -1;
  }

  // The words of a block in the pool, as [text before, first differing text or "", text after].
  words(block) {
    const s = this.state, r = s.placeOf[block];
    if (r < 0) return ["", "", ""];
    const from = s.placeAt[block] * this.size, to = from + s.filled[block];
    const alike = Object.keys(s.copies).filter(copy => s.copies[copy] === block).map(Number);
    if (s.copies[block] !== undefined) alike.push(s.copies[block]);
    const differs = alike.map(other => this.firstDifference(block, other)).filter(i => i >= 0);
    if (differs.length) {
      const i = from + Math.min(...differs);
      return [this.text(r, from, i), this.text(r, i, i + 1), this.text(r, i + 1, to)];
    }
    return [this.text(r, from, to), "", ""];
  }
}
