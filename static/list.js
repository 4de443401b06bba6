/**
 * The list of things on the page: newest first, one row per thing, changed in place.
 *
 * Changes only mark a key as due. Once per animation frame the due rows are brought up to date with `items`, for as
 * long as the frame's budget lasts. So a thing that has changed a hundred times is redrawn once, and a burst of any
 * size is spread over several frames.
 */

import { Chunks } from './chunks.js';
import { change, destroy } from './rest.js';

const FRAME_BUDGET_MS = 8;
const FLASHES_PER_FRAME = 40;
const FLASH_MS = 1_400;
const LEAVE_MS = 450;
const SHOWN_CHARACTERS = 300;

const calm = matchMedia('(prefers-reduced-motion: reduce)');
const date = new Intl.DateTimeFormat(undefined, {
  month: 'short',
  day: 'numeric',
  hour: '2-digit',
  minute: '2-digit',
  hourCycle: 'h23',
});
const thingTemplate = document.getElementById('thing-template').content.firstElementChild;
const editorTemplate = document.getElementById('editor-template').content.firstElementChild;

export class ThingList {
  onpainted = () => {};

  #container;
  #chunks;
  #items;
  #rows = new Map(); // key -> element
  #due = new Map(); // key -> operation to flash, or null
  #frame = 0;
  #current = null; // the row whose buttons the Tab key reaches: the last one visited, or the first
  #visited = null;

  /** `container` shows `items`, the Map of a Feed. */
  constructor(container, items) {
    this.#container = container;
    this.#chunks = new Chunks(container);
    this.#items = items;
    container.addEventListener('click', (event) => this.#clicked(event));
    container.addEventListener('keydown', (event) => this.#pressed(event));
    container.addEventListener('focusin', (event) => {
      this.#visited = event.target.closest('.thing');
      this.#makeCurrent(this.#visited);
    });
  }

  /** Any of `items` may have changed. */
  reload() {
    for (const key of this.#rows.keys()) this.#due.set(key, null);
    for (const key of [...this.#items.keys()].reverse()) this.#due.set(key, null);
    this.#schedule();
  }

  /** One change, already in `items`. */
  changed({ op, row, before }) {
    if (op === 'truncate') this.reload();
    else if (row ?? before) this.#due.set((row ?? before).id, op);
    this.#schedule();
  }

  #schedule() {
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    const end = performance.now() + FRAME_BUDGET_MS;
    let flashes = FLASHES_PER_FRAME;
    if (this.#items.size === 0 && !this.#container.querySelector('.editor')) {
      this.#due.clear();
      this.#rows.clear();
      this.#chunks.clear();
    }
    for (const [key, op] of this.#due) {
      if (performance.now() > end) break;
      this.#due.delete(key);
      const visibly = op !== null && flashes > 0;
      if (visibly) flashes -= 1;
      if (this.#items.has(key)) this.#show(key, op, visibly);
      else this.#drop(key, visibly);
    }
    if (this.#due.size) this.#schedule();
    this.#container.hidden = this.#rows.size === 0;
    const first = this.#staying(this.#chunks.first, 'next');
    const visitedStays = this.#visited?.isConnected && !this.#visited.inert;
    this.#makeCurrent(visitedStays ? this.#visited : first);
    this.onpainted();
  }

  #show(key, op, visibly) {
    const thing = this.#items.get(key);
    let element = this.#rows.get(key);
    if (!element) {
      element = thingTemplate.cloneNode(true);
      element.key = key;
      this.#rows.set(key, element);
      this.#chunks.insert(element);
    }
    fill(element, thing);
    if (op && element.editor) meanwhile(element.editor, `Changed meanwhile: ${thing.name} ${shorten(thing.info)}`);
    if (visibly) flash(element.firstElementChild, op);
  }

  #drop(key, visibly) {
    const element = this.#rows.get(key);
    if (!element) return;
    if (element.editor) {
      meanwhile(element.editor, 'Deleted meanwhile.');
      element.editor.querySelector('.primary').disabled = true;
      return;
    }
    this.#rows.delete(key);
    if (element.contains(document.activeElement)) this.#focusNear(element);
    if (visibly && !calm.matches) this.#leave(element);
    else this.#chunks.remove(element);
  }

  #leave(element) {
    element.inert = true;
    const frames = [{ backgroundColor: 'var(--flash-destroy)' }, { opacity: 0 }];
    element.firstElementChild.animate(frames, LEAVE_MS).onfinish = () => {
      if (element.isConnected) this.#chunks.remove(element);
    };
  }

  #focusNear(element) {
    const near = this.#below(element) ?? this.#above(element);
    if (near) near.querySelector('.delete').focus();
    else document.getElementById('things-title').focus();
  }

  // ---- keyboard: one Tab stop per button kind, arrows between rows ---------------------------------------------

  #below(element) {
    return this.#staying(this.#chunks.next(element), 'next');
  }

  #above(element) {
    return this.#staying(this.#chunks.previous(element), 'previous');
  }

  /** `element`, or the next one in that direction that is not fading out. */
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
    const element = event.target.closest('.thing');
    if (event.target.closest('.editor')) {
      if (event.key === 'Escape') this.#closeEditor(element);
      return;
    }
    const target = {
      ArrowDown: () => this.#below(element),
      ArrowUp: () => this.#above(element),
      Home: () => this.#staying(this.#chunks.first, 'next'),
      End: () => this.#staying(this.#chunks.last, 'previous'),
    }[event.key]?.();
    if (!target) return;
    event.preventDefault();
    const kind = event.target.classList.contains('delete') ? '.delete' : '.edit';
    target.querySelector(kind)?.focus();
  }

  // ---- writing -------------------------------------------------------------------------------------------------

  #clicked(event) {
    const button = event.target.closest('button');
    const element = button?.closest('.thing');
    if (button?.classList.contains('edit')) this.#openEditor(element);
    if (button?.classList.contains('delete')) this.#destroy(element);
    if (button?.classList.contains('cancel')) this.#closeEditor(element);
  }

  async #destroy(element) {
    try {
      await destroy(this.#items.get(element.key).name);
    } catch (problem) {
      // 404: somebody else deleted it first, and the row is about to disappear.
      if (problem.status !== 404) complain(element.firstElementChild, problem);
    }
  }

  #openEditor(element) {
    const thing = this.#items.get(element.key);
    if (!thing || element.editor) return;
    const editor = editorTemplate.cloneNode(true);
    const { name, info } = editor.elements;
    name.value = thing.name;
    info.value = thing.info;
    // The values as the fields hold them (an <input> drops line breaks), so that only edited fields are sent.
    const opened = { name: name.value, info: info.value };
    editor.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#save(element, opened);
    });
    info.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        editor.requestSubmit();
      }
    });
    element.editor = editor;
    element.classList.add('editing');
    element.append(editor);
    name.focus();
    name.select();
  }

  #closeEditor(element) {
    const focused = element.contains(document.activeElement);
    element.editor.remove();
    element.editor = null;
    element.classList.remove('editing');
    if (this.#items.has(element.key)) {
      if (focused) element.querySelector('.edit').focus();
    } else {
      this.#drop(element.key, false);
    }
  }

  async #save(element, opened) {
    const { editor } = element;
    const thing = this.#items.get(element.key);
    if (!thing || editor.saving) return;
    const fields = {};
    for (const field of ['name', 'info']) {
      const { value } = editor.elements[field];
      if (value !== opened[field]) fields[field] = value;
    }
    complain(editor, null);
    editor.saving = true;
    try {
      if (Object.keys(fields).length) await change(thing.name, fields);
      if (element.editor === editor) this.#closeEditor(element);
    } catch (problem) {
      complain(editor, problem);
    } finally {
      editor.saving = false;
    }
  }
}

function fill(element, { name, info, created_at: created }) {
  const [nameCell, infoCell, time, actions] = element.firstElementChild.children;
  setText(nameCell, name);
  setText(infoCell, shorten(info));
  setText(time, readableTime(created));
  const [edit, remove] = actions.children;
  edit.setAttribute('aria-label', `Edit ${name}`);
  remove.setAttribute('aria-label', `Delete ${name}`);
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A row shows only the beginning of a long info; its editor shows all of it. */
function shorten(text) {
  return text.length > SHOWN_CHARACTERS ? `${text.slice(0, SHOWN_CHARACTERS)}…` : text;
}

/** Postgres has times that JavaScript cannot represent, such as `infinity`: they are shown as they are. */
function readableTime(text) {
  const time = new Date(text);
  return Number.isNaN(time.getTime()) ? text : date.format(time);
}

function flash(element, op) {
  element.animate(
    [{ backgroundColor: `var(--flash-${op})` }, { backgroundColor: 'transparent' }],
    { duration: FLASH_MS, easing: calm.matches ? 'steps(1, end)' : 'ease-out' },
  );
}

function meanwhile(editor, text) {
  // Our own change comes back through the feed before the answer to our PATCH: do not report it.
  if (!editor.saving) editor.querySelector('.meanwhile').textContent = text;
}

/** Show a problem next to the form or button that caused it; null removes it. */
export function complain(container, problem) {
  let p = container.querySelector(':scope > .problem');
  if (!p && problem) {
    p = document.createElement('p');
    p.className = 'problem';
    p.role = 'alert';
    container.append(p);
  }
  if (p) p.textContent = problem?.message ?? '';
  for (const field of container.querySelectorAll('[name]')) {
    const rejected = field.name === problem?.field;
    field.setAttribute('aria-invalid', String(rejected));
    if (rejected) field.focus();
  }
}
