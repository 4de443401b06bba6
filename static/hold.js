/**
 * Whether somebody is about to use a container, so that nothing in it may move: a pointer rests on it, a finger touches
 * it or did so a moment ago, or the keyboard's focus is in it.
 */

const AFTER_TOUCH_MS = 3_000;

export class Hold {
  /** Called when a hold may have ended; `held` says whether it has. */
  onrelease = () => {};

  #container;
  #byTouch = false; // the last pointer was a touch: after one, browsers leave :hover where it was
  #touching = false;
  #timer;

  constructor(container) {
    this.#container = container;
    const listen = (target, type, listener) => target.addEventListener(type, listener, { passive: true });
    for (const type of ['pointermove', 'pointerdown']) {
      listen(window, type, ({ pointerType }) => (this.#byTouch = pointerType === 'touch'));
    }
    listen(container, 'pointerdown', ({ pointerType }) => {
      clearTimeout(this.#timer);
      this.#touching = pointerType === 'touch';
    });
    for (const type of ['pointerup', 'pointercancel']) listen(window, type, () => this.#lifted());
    listen(container, 'pointerleave', () => this.#later());
    listen(container, 'focusout', () => this.#later());
    listen(document, 'visibilitychange', () => this.#later());
  }

  get held() {
    if (document.hidden) return false;
    return this.#touching || (!this.#byTouch && this.#container.matches(':hover')) || this.#hasKeyboard;
  }

  /** A click leaves the focus on its button: only :focus-visible, which text fields always have, means the keyboard. */
  get #hasKeyboard() {
    const { activeElement } = document;
    return this.#container.contains(activeElement) && activeElement.matches(':focus-visible');
  }

  #lifted() {
    if (!this.#touching) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#touching = false;
      this.#later();
    }, AFTER_TOUCH_MS);
  }

  #later() {
    setTimeout(() => this.onrelease()); // once :hover and the focus have moved
  }
}
