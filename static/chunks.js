/**
 * A long list in the document, kept in order of `element.key`, highest first.
 *
 * Its elements are grouped in chunks of about a hundred. The browser lays out and paints only the chunks in view
 * (`content-visibility: auto`), so a change among thousands of rows costs no more than one among a hundred, while
 * find-in-page and screen readers still see all of them.
 */

const CHUNK_SIZE = 100;

export class Chunks {
  #container;

  constructor(container) {
    this.#container = container;
  }

  get first() {
    return this.#container.firstElementChild?.firstElementChild ?? null;
  }

  get last() {
    return this.#container.lastElementChild?.lastElementChild ?? null;
  }

  next(element) {
    return element.nextElementSibling ?? element.parentElement.nextElementSibling?.firstElementChild ?? null;
  }

  previous(element) {
    return element.previousElementSibling ?? element.parentElement.previousElementSibling?.lastElementChild ?? null;
  }

  /** Insert a new element where its key belongs: nearly always before the first or after the last one. */
  insert(element) {
    const { first, last } = this;
    if (!first) this.#container.append(chunkOf(element));
    else if (element.key > first.key) this.#insertAt(first, 'before', element);
    else if (element.key < last.key) this.#insertAt(last, 'after', element);
    else this.#insertBetween(element);
  }

  remove(element) {
    const chunk = element.parentElement;
    element.remove();
    if (!chunk.hasChildNodes()) chunk.remove();
  }

  clear() {
    this.#container.replaceChildren();
  }

  #insertAt(end, side, element) {
    const chunk = end.parentElement;
    if (chunk.childElementCount < CHUNK_SIZE) end[side](element);
    else chunk[side](chunkOf(element));
  }

  #insertBetween(element) {
    let chunk = this.#container.firstElementChild;
    while (chunk.lastElementChild.key > element.key) chunk = chunk.nextElementSibling;
    let below = chunk.firstElementChild;
    while (below.key > element.key) below = below.nextElementSibling;
    below.before(element);
    if (chunk.childElementCount > 2 * CHUNK_SIZE) {
      chunk.after(chunkOf(...[...chunk.children].slice(CHUNK_SIZE)));
    }
  }
}

function chunkOf(...elements) {
  const chunk = document.createElement('div');
  chunk.className = 'chunk';
  chunk.append(...elements);
  return chunk;
}
