/**
 * A long list in the document, kept in order of `element.key`, highest first. All elements have the same height.
 *
 * They are grouped in chunks of about fifty. The browser lays out and paints only the chunks near the viewport
 * (`content-visibility: auto`; the others are as high as `--rows` says), so a change among thousands of rows costs no
 * more than one among fifty, while find-in-page and screen readers still see all of them.
 */

const CHUNK_SIZE = 50;

export class Chunks {
  #container;
  #observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.inView = isIntersecting;
  });

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

  /** Whether an element may be visible: its chunk is near the viewport. */
  isInView(element) {
    return element.parentElement.inView === true;
  }

  /** Insert a new element where its key belongs: nearly always before the first or after the last one. */
  insert(element) {
    const { first, last } = this;
    if (!first) this.#container.append(this.#chunkOf(element));
    else if (element.key > first.key) this.#insertAt(first, 'before', element);
    else if (element.key < last.key) this.#insertAt(last, 'after', element);
    else this.#insertBetween(element);
  }

  remove(element) {
    const chunk = element.parentElement;
    element.remove();
    if (chunk.hasChildNodes()) resize(chunk);
    else this.#discard(chunk);
  }

  clear() {
    for (const chunk of [...this.#container.children]) this.#discard(chunk);
  }

  #insertAt(end, side, element) {
    const chunk = end.parentElement;
    if (chunk.childElementCount < CHUNK_SIZE) {
      end[side](element);
      resize(chunk);
    } else {
      chunk[side](this.#chunkOf(element));
    }
  }

  #insertBetween(element) {
    let chunk = this.#container.firstElementChild;
    while (chunk.lastElementChild.key > element.key) chunk = chunk.nextElementSibling;
    let below = chunk.firstElementChild;
    while (below.key > element.key) below = below.nextElementSibling;
    below.before(element);
    if (chunk.childElementCount > 2 * CHUNK_SIZE) {
      chunk.after(this.#chunkOf(...[...chunk.children].slice(CHUNK_SIZE)));
    }
    resize(chunk);
  }

  #chunkOf(...elements) {
    const chunk = document.createElement('div');
    chunk.className = 'chunk';
    chunk.append(...elements);
    resize(chunk);
    this.#observer.observe(chunk);
    return chunk;
  }

  #discard(chunk) {
    this.#observer.unobserve(chunk);
    chunk.remove();
  }
}

function resize(chunk) {
  chunk.style.setProperty('--rows', chunk.childElementCount);
}
