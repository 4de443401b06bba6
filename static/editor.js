/** The form that replaces a row while its thing is edited. It keeps what the user types, whatever others do. */

import { change, verify } from './rest.js';
import { complain, setBusy, shorten } from './row.js';

const template = document.getElementById('editor-template').content.firstElementChild;

export class Editor {
  /** Called when the editor should be closed: it was saved or cancelled. */
  onclose = () => {};
  /** Called with the problem if saving fails after the editor was closed. */
  onfail = () => {};
  form = template.cloneNode(true);

  #opened;
  #thing; // as last seen
  #saving = false;

  constructor(thing) {
    const { name, info } = this.form.elements;
    name.value = thing.name;
    info.value = thing.info;
    // The values as the fields hold them (an <input> drops line breaks), so that only edited fields are sent.
    this.#opened = { name: name.value, info: info.value };
    this.#thing = thing;
    this.form.addEventListener('input', () => complain(this.form, null));
    this.form.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#save();
    });
    this.form.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') this.onclose();
      if (event.target !== info || event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.form.querySelector('.cancel').addEventListener('click', () => this.onclose());
  }

  focus() {
    this.form.elements.name.focus();
    this.form.elements.name.select();
  }

  /** The thing may have changed; `updated`: an event said so. null: it was deleted. */
  changed(thing, updated = false) {
    const save = this.form.querySelector('.primary');
    const wasDeleted = save.disabled;
    const before = this.#thing;
    if (thing) this.#thing = thing;
    save.disabled = !thing;
    const looksTheSame = thing?.too_large ? !updated : thing?.info === before.info;
    if (!wasDeleted && thing?.name === before.name && looksTheSame) return;
    // Our own change comes back through the feed before the answer to our PATCH: do not report it.
    if (this.#saving) return;
    const words = thing ? `Changed meanwhile: ${[thing.name, shorten(thing.info ?? '')].filter(Boolean).join(' – ')}` : 'Deleted meanwhile.';
    this.form.querySelector('.meanwhile').textContent = words;
  }

  async #save() {
    if (this.#saving || this.form.querySelector('.primary').disabled) return;
    const fields = {};
    for (const field of ['name', 'info']) {
      const { value } = this.form.elements[field];
      if (value !== this.#opened[field]) fields[field] = value;
    }
    complain(this.form, null);
    this.#saving = true;
    setBusy(this.form, true);
    try {
      if (Object.keys(fields).length) {
        await verify(this.#thing.name, this.#thing.id);
        await change(this.#thing.name, fields);
      }
      this.onclose();
    } catch (problem) {
      if (!this.form.isConnected) {
        this.onfail(problem);
        return;
      }
      complain(this.form, problem);
      this.form.querySelector('.problem').scrollIntoView({ block: 'nearest' });
    } finally {
      this.#saving = false;
      setBusy(this.form, false);
    }
  }
}
