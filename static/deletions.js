/**
 * Deletions that can be undone for a few seconds. The DELETE is sent when this time is over, or when the user leaves
 * the page.
 *
 * A thing that somebody else renames meanwhile is not deleted: it is no longer what the user meant to delete, and
 * another thing may have its old name by now. Other changes do not matter.
 */

import { Problem, destroy, verify } from './rest.js';

const GRACE_MS = 5_000;

export class Deletions {
  /** Called with the key of a thing whose deletion has begun, was sent or has ended; and the problem if it failed. */
  onchange = () => {};

  #items;
  #pending = new Map(); // key -> { name, timer, sent, answered }

  /** `items`: the Map of a Feed. */
  constructor(items) {
    this.#items = items;
    addEventListener('pagehide', () => {
      for (const [key, { sent }] of this.#pending) if (!sent) this.#send(key, true);
    });
  }

  /** The deletion of this thing, { sent }, if there is one. */
  get(key) {
    return this.#pending.get(key);
  }

  begin(key) {
    const { name } = this.#items.get(key);
    this.#pending.set(key, { name, sent: false, timer: setTimeout(() => this.#send(key), GRACE_MS) });
    this.onchange(key);
  }

  undo(key) {
    if (!this.#pending.get(key)?.sent) this.#end(key);
  }

  /** All of `items` were replaced. A deleted thing that is still there has been put back. */
  check() {
    for (const [key, { answered }] of this.#pending) {
      if (answered) this.#end(key);
      else this.checkOne(key);
    }
  }

  /** This thing may have changed. */
  checkOne(key) {
    const pending = this.#pending.get(key);
    if (!pending) return;
    const thing = this.#items.get(key);
    if (!thing) this.#end(key);
    else if (thing.name !== pending.name) {
      this.#end(key, new Problem(409, `Not deleted: it was called “${pending.name}” when you deleted it.`));
    }
  }

  /** `leaving`: the user is leaving the page, so there is no time to ask first which thing has the name. */
  async #send(key, leaving = false) {
    const pending = this.#pending.get(key);
    clearTimeout(pending.timer);
    pending.sent = true;
    this.onchange(key);
    try {
      if (!leaving) await verify(pending.name, key);
      await destroy(pending.name);
    } catch (problem) {
      // 404: somebody else was faster; the feed is about to show what happened.
      if (problem.status !== 404 && this.#pending.get(key) === pending) this.#end(key, problem);
    }
    pending.answered = true;
  }

  #end(key, problem = null) {
    clearTimeout(this.#pending.get(key)?.timer);
    this.#pending.delete(key);
    this.onchange(key, problem);
  }
}
