/** The list of recent changes at the side, and the line that sums them up for screen readers. */

const KEPT = 40;
const SAMPLES = 200;
const PAINT_EVERY_MS = 250;
const SPEAK_EVERY_MS = 5_000;

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: 'medium', hourCycle: 'h23' });
const template = document.getElementById('change-template').content.firstElementChild;

export class Recent {
  #ol;
  #empty;
  #pace;
  #fresh = []; // not shown here yet
  #scheduled = false;
  #paintedAt = 0;
  #delays = [];

  constructor(ol, empty, pace) {
    this.#ol = ol;
    this.#empty = empty;
    this.#pace = pace;
  }

  /** Add one change from a Feed; it is shown once its row is. */
  add({ op, row, before, writtenAt }) {
    this.#fresh.push({ op, row, before, writtenAt, at: Date.now(), delay: null, ready: false });
    if (this.#fresh.length > KEPT) this.#fresh.shift();
  }

  /** The rows of all changes so far are on the screen. */
  painted() {
    const now = performance.now();
    for (const change of this.#fresh) {
      if (change.ready) continue;
      change.ready = true;
      if (change.writtenAt === null) continue;
      change.delay = Math.max(0, Math.round(now - change.writtenAt));
      this.#delays.push(change.delay);
    }
    if (this.#fresh.length && !this.#scheduled) this.#schedule();
  }

  #schedule() {
    this.#scheduled = true;
    const wait = this.#paintedAt + PAINT_EVERY_MS - performance.now();
    setTimeout(() => requestAnimationFrame(() => this.#paint()), Math.max(0, wait));
  }

  #paint() {
    this.#scheduled = false;
    this.#paintedAt = performance.now();
    this.#empty.hidden = true;
    // The rows of later changes may not be on the screen yet.
    const ready = this.#fresh.findLastIndex((change) => change.ready) + 1;
    for (const change of this.#fresh.splice(0, ready)) {
      const li = this.#ol.childElementCount < KEPT ? template.cloneNode(true) : this.#ol.lastElementChild;
      fill(li, change);
      this.#ol.prepend(li);
    }
    this.#delays.splice(0, this.#delays.length - SAMPLES);
    if (this.#delays.length) this.#pace.textContent = `${median(this.#delays)} ms to screen`;
  }
}

function fill(li, { op, row, before, at, delay }) {
  const [opCell, nameCell, when] = li.children;
  li.dataset.op = op;
  opCell.textContent = op;
  nameCell.textContent = describe(op, row, before);
  when.children[0].textContent = clock.format(at);
  when.children[1].textContent = delay === null ? '' : `${delay} ms`;
}

function describe(op, row, before) {
  if (op === 'truncate') return 'all things';
  if (op === 'update' && before && before.name !== row.name) return `${before.name} → ${row.name}`;
  return (row ?? before).name;
}

function median(numbers) {
  return [...numbers].sort((a, b) => a - b)[numbers.length >> 1];
}

/** Speaks at most once every few seconds: a single change by name, several as counts. */
export class Announcer {
  #element;
  #counts = new Map();
  #last = null;
  #timer = null;

  constructor(element) {
    this.#element = element;
  }

  /** Say something at once; changes wait until it has been heard. */
  say(sentence) {
    this.#element.textContent = sentence;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#speak(), SPEAK_EVERY_MS);
  }

  add(change) {
    this.#last = change;
    this.#counts.set(change.op, (this.#counts.get(change.op) ?? 0) + 1);
    // The first change after a quiet period is announced soon; those after it wait for the next turn.
    this.#timer ??= setTimeout(() => this.#speak(), 500);
  }

  #speak() {
    this.#timer = null;
    if (this.#counts.size === 0) return;
    const total = [...this.#counts.values()].reduce((sum, count) => sum + count, 0);
    const parts = [...this.#counts].map(([op, count]) => `${count} ${op}`);
    this.#counts.clear();
    this.say(
      total === 1
        ? `${this.#last.op}: ${describe(this.#last.op, this.#last.row, this.#last.before)}`
        : `${total} changes: ${parts.join(', ')}`,
    );
  }
}
