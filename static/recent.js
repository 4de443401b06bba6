/** The list of recent changes at the side, and the line that sums them up for screen readers. */

const KEPT = 40;
const SAMPLES = 200;
const SPEAK_EVERY_MS = 5_000;

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: 'medium', hourCycle: 'h23' });
const template = document.getElementById('change-template').content.firstElementChild;

export class Recent {
  #ol;
  #empty;
  #pace;
  #fresh = [];
  #frame = 0;
  #delays = [];

  constructor(ol, empty, pace) {
    this.#ol = ol;
    this.#empty = empty;
    this.#pace = pace;
  }

  /** Add one change from a Feed. */
  add({ op, name, before, writtenAt }) {
    this.#fresh.push({ op, name, before, writtenAt, at: new Date() });
    if (this.#fresh.length > KEPT) this.#fresh.shift();
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    const now = performance.now();
    this.#empty.hidden = true;
    for (const change of this.#fresh.splice(0)) {
      const delay = change.writtenAt === null ? null : Math.max(0, Math.round(now - change.writtenAt));
      if (delay !== null) this.#delays.push(delay);
      this.#ol.prepend(entry(change, delay));
    }
    while (this.#ol.children.length > KEPT) this.#ol.lastElementChild.remove();
    this.#delays.splice(0, this.#delays.length - SAMPLES);
    if (this.#delays.length) this.#pace.textContent = `${median(this.#delays)} ms from write to screen`;
  }
}

function entry({ op, name, before, at }, delay) {
  const li = template.cloneNode(true);
  const [opCell, nameCell, when] = li.children;
  li.dataset.op = op;
  opCell.textContent = op;
  nameCell.textContent = describe(op, name, before);
  when.textContent = clock.format(at) + (delay === null ? '' : ` · ${delay} ms`);
  if (delay !== null) when.title = `From write to screen in ${delay} ms`;
  return li;
}

function describe(op, name, before) {
  if (op === 'truncate') return 'all things';
  if (op === 'update' && before && before.name !== name) return `${before.name} → ${name}`;
  return name;
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
    this.#element.textContent =
      total === 1
        ? `${this.#last.op}: ${describe(this.#last.op, this.#last.name, this.#last.before)}`
        : `${total} changes: ${parts.join(', ')}`;
    this.#counts.clear();
    this.#timer = setTimeout(() => this.#speak(), SPEAK_EVERY_MS);
  }
}
