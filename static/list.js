/**
 * The list of things on the page: newest first, one row per thing, changed in place.
 *
 * Changes only mark a key as due. A few times a second the due rows are brought up to date with `items`, for as long as
 * the frame's budget lasts. So a thing that has changed a hundred times is redrawn once, and a burst of any size is
 * spread over several frames. The first change after a quiet moment is shown in the next frame.
 *
 * While somebody is about to use the list (hold.js), no row moves: rows are updated in place, new ones wait, and those
 * of deleted things stay where they are, greyed out.
 */

import { Chunks } from './chunks.js';
import { Deletions } from './deletions.js';
import { Editor } from './editor.js';
import { Hold } from './hold.js';
import { verify } from './rest.js';
import { calm, complain, explain, fill, flash, makeRow } from './row.js';

const PAINT_EVERY_MS = 100;
const FRAME_BUDGET_MS = 8;
const FLASHES_PER_PAINT = 8;
// When this many rows change at once, flashes are meaningless, and would keep the browser painting all the time.
const CROWD = 30;
const LEAVE_MS = 450;

export class ThingList {
  /** Called after each paint, with the number of new things that wait for the list to be released. */
  onpainted = () => {};
  /** Called with a sentence for screen readers. */
  onsay = () => {};

  #container;
  #chunks;
  #items;
  #hold;
  #deletions;
  #rows = new Map(); // key -> element
  #due = new Map(); // key -> operation to flash, or null
  #waiting = new Map(); // key -> operation: changes that would have moved other rows
  #scheduled = false;
  #releasing = false; // show the rows that wait, although somebody is about to use the list
  #paintedAt = 0;
  #current = null; // the row whose buttons the Tab key reaches: the last one visited, or the first
  #visited = null;

  /** `container` shows `items`, the Map of a Feed. */
  constructor(container, items) {
    this.#container = container;
    this.#chunks = new Chunks(container);
    this.#items = items;
    this.#hold = new Hold(container);
    this.#hold.onrelease = () => this.#released();
    this.#deletions = new Deletions(items);
    this.#deletions.onchange = (key, problem) => this.#deletionChanged(key, problem);
    container.addEventListener('click', (event) => this.#clicked(event));
    container.addEventListener('keydown', (event) => this.#pressed(event));
    container.addEventListener('pointerover', ({ target }) => {
      if (target.matches('.name, .info')) explain(target);
    });
    container.addEventListener('focusin', (event) => {
      this.#visited = event.target.closest('.thing');
      this.#makeCurrent(this.#visited);
    });
  }

  /** Any of `items` may have changed. */
  reload() {
    this.#deletions.check();
    for (const map of [this.#due, this.#waiting]) map.clear(); // everything becomes due again
    for (const key of this.#rows.keys()) this.#due.set(key, null);
    for (const key of [...this.#items.keys()].reverse()) this.#due.set(key, null);
    this.#schedule();
  }

  /** Changes, already in `items`. */
  changed(changes) {
    for (const { op, key } of changes) {
      if (op === 'truncate') {
        this.reload();
      } else {
        this.#deletions.checkOne(key);
        if (this.#items.has(key) || this.#rows.has(key)) this.#due.set(key, op);
        else this.#forget(key);
      }
    }
    this.#schedule();
  }

  /** The thing has come and gone between two paints; a hidden tab may not paint for hours. */
  #forget(key) {
    this.#due.delete(key);
    this.#waiting.delete(key);
  }

  /** Show what waits, even if that moves rows. */
  release() {
    for (const [key, op] of this.#waiting) this.#due.set(key, op);
    this.#waiting.clear();
    this.#releasing = true;
    this.#schedule(0);
  }

  #released() {
    if (this.#waiting.size && !this.#hold.held) this.release();
  }

  #schedule(soonest = this.#paintedAt + PAINT_EVERY_MS) {
    if (this.#scheduled) return;
    this.#scheduled = true;
    const paint = () => requestAnimationFrame(() => this.#paint());
    const wait = soonest - performance.now();
    if (wait > 0) setTimeout(paint, wait);
    else paint();
  }

  #paint() {
    this.#scheduled = false;
    this.#paintedAt = performance.now();
    const held = !this.#releasing && this.#rows.size > 0 && this.#hold.held;
    if (this.#items.size === 0 && !held && !this.#container.querySelector('.editor')) this.#clear();
    let flashes = this.#due.size < CROWD ? FLASHES_PER_PAINT : 0;
    for (const [key, op] of this.#due) {
      if (performance.now() > this.#paintedAt + FRAME_BUDGET_MS) break;
      this.#due.delete(key);
      if (this.#update(key, op, held, flashes > 0)) flashes -= 1;
    }
    if (this.#due.size) this.#schedule(0);
    else this.#releasing = false;
    if (this.#container.hidden !== (this.#rows.size === 0)) this.#container.hidden = this.#rows.size === 0;
    const visitedStays = this.#visited?.isConnected && !this.#visited.inert;
    this.#makeCurrent(visitedStays ? this.#visited : this.#staying(this.#chunks.first, 'next'));
    this.onpainted(this.#countWaiting());
  }

  #clear() {
    for (const map of [this.#due, this.#waiting, this.#rows]) map.clear();
    this.#chunks.clear();
  }

  #countWaiting() {
    let count = 0;
    for (const key of this.#waiting.keys()) if (this.#items.has(key) && !this.#rows.has(key)) count += 1;
    return count;
  }

  /** Bring one row up to date; return whether it flashes. */
  #update(key, op, held, mayFlash) {
    const thing = this.#items.get(key);
    const element = this.#rows.get(key);
    const moves = thing ? !element && key > (this.#chunks.last?.key ?? Infinity) : element && !element.editor;
    if (held && moves) {
      this.#waiting.set(key, op);
      if (element) this.#bury(element);
      return false;
    }
    this.#waiting.delete(key);
    if (thing) return this.#show(element ?? this.#add(key), thing, op, mayFlash);
    return element !== undefined && this.#drop(element, op !== null && mayFlash);
  }

  #add(key) {
    const element = makeRow(key);
    this.#rows.set(key, element);
    this.#chunks.insert(element);
    return element;
  }

  #show(element, thing, op, mayFlash) {
    if (element.inert) {
      element.inert = false; // it was deleted, and is back
      element.classList.remove('gone');
    }
    fill(element, thing, this.#deletions.get(element.key));
    element.editor?.changed(thing, op !== null);
    const visibly = op !== null && mayFlash && this.#chunks.isInView(element);
    if (visibly) flash(element, op);
    return visibly;
  }

  /** Its thing is gone, but the row has to stay where it is. */
  #bury(element) {
    this.#leaveFocus(element);
    element.inert = true;
    element.classList.add('gone');
  }

  #drop(element, visibly) {
    if (element.editor) {
      element.editor.changed(null);
      return false;
    }
    this.#rows.delete(element.key);
    this.#leaveFocus(element);
    const fades = visibly && !element.inert && !calm.matches && this.#chunks.isInView(element);
    element.inert = true;
    if (fades) this.#fade(element);
    else this.#chunks.remove(element);
    return fades;
  }

  #fade(element) {
    const frames = [{ backgroundColor: 'var(--flash-destroy)' }, { opacity: 0 }];
    element.firstElementChild.animate(frames, LEAVE_MS).onfinish = () => {
      if (element.isConnected) this.#chunks.remove(element);
    };
  }

  /** Before a row with the focus disappears, move the focus to the next one's Edit, where a late Enter does no harm. */
  #leaveFocus(element) {
    if (!element.contains(document.activeElement)) return;
    const near = this.#below(element) ?? this.#above(element);
    if (near) near.querySelector('.edit:enabled, .delete').focus();
    else document.getElementById('things-title').focus();
  }

  // ---- keyboard: one Tab stop per button kind, arrows between rows ---------------------------------------------

  #below(element) {
    return this.#staying(this.#chunks.next(element), 'next');
  }

  #above(element) {
    return this.#staying(this.#chunks.previous(element), 'previous');
  }

  /** `element`, or the next one in that direction whose thing is not gone. */
  #staying(element, direction) {
    while (element?.inert) element = this.#chunks[direction](element);
    return element;
  }

  #makeCurrent(element) {
    if (element === this.#current) return;
    for (const button of this.#current?.querySelectorAll('.row button') ?? []) button.tabIndex = -1;
    for (const button of element?.querySelectorAll('.row button') ?? []) button.tabIndex = 0;
    this.#current = element;
  }

  #pressed(event) {
    if (event.target.closest('.editor')) return;
    if (event.repeat && event.key === 'Enter') event.preventDefault(); // would delete and undo in turn
    const element = event.target.closest('.thing');
    const target = {
      ArrowDown: () => this.#below(element),
      ArrowUp: () => this.#above(element),
      Home: () => this.#staying(this.#chunks.first, 'next'),
      End: () => this.#staying(this.#chunks.last, 'previous'),
    }[event.key]?.();
    if (!target) return;
    event.preventDefault();
    const kind = event.target.classList.contains('delete') ? '.delete' : '.edit:enabled, .delete';
    target.querySelector(kind).focus();
  }

  // ---- writing -------------------------------------------------------------------------------------------------

  #clicked(event) {
    const button = event.target.closest('.row button');
    if (!button) return;
    const element = button.closest('.thing');
    complain(element.firstElementChild, null);
    if (button.classList.contains('edit')) this.#edit(element);
    else if (!this.#deletions.get(element.key)) this.#delete(element.key);
    else if (event.detail < 2) this.#deletions.undo(element.key); // not on a double click on Delete
  }

  #delete(key) {
    const thing = this.#items.get(key);
    if (!thing) return; // the row is about to go
    this.#deletions.begin(key);
    this.onsay(`${thing.name} will be deleted in 5 seconds. Press again to undo.`);
  }

  #deletionChanged(key, problem) {
    const element = this.#rows.get(key);
    const thing = this.#items.get(key);
    if (!element || !thing) return;
    fill(element, thing, this.#deletions.get(key));
    if (problem) complain(element.firstElementChild, problem);
    else if (problem === null) this.onsay(`${thing.name} is kept.`);
  }

  async #edit(element) {
    let thing = this.#items.get(element.key);
    if (!thing || element.editor) return;
    try {
      if (thing.too_large) thing = await verify(thing.name, element.key);
    } catch (problem) {
      complain(element.firstElementChild, problem);
      return;
    }
    if (element.editor) return; // a double click has opened it
    const editor = new Editor(thing);
    editor.onclose = () => this.#closeEditor(element, editor);
    editor.onfail = (problem) => complain(element.firstElementChild, problem);
    element.editor = editor;
    element.classList.add('editing');
    element.append(editor.form);
    editor.focus();
  }

  #closeEditor(element, editor) {
    if (element.editor !== editor) return; // saved after it was cancelled
    const focused = element.contains(document.activeElement);
    editor.form.remove();
    element.editor = null;
    element.classList.remove('editing');
    if (focused) element.querySelector('.edit').focus();
    if (!this.#items.has(element.key)) this.changed([{ op: 'destroy', key: element.key }]);
  }
}
