/** One row of the list: its element, and how a thing and a deletion are shown in it. */

const FLASH_MS = 1_200;
const SHOWN_CHARACTERS = 300;
const TOO_LARGE = '(too large to be sent; Edit shows it)';

export const calm = matchMedia('(prefers-reduced-motion: reduce)');
const date = new Intl.DateTimeFormat(undefined, {
  month: 'short',
  day: 'numeric',
  hour: '2-digit',
  minute: '2-digit',
  hourCycle: 'h23',
});
const template = document.getElementById('thing-template').content.firstElementChild;

export function makeRow(key) {
  const element = template.cloneNode(true);
  element.key = key;
  element.shown = {};
  return element;
}

/** Show a thing; `deletion` is { sent } if it is being deleted. Only what differs is touched. */
export function fill(element, thing, deletion) {
  const { shown } = element;
  const [nameCell, infoCell, timeCell, { children: [edit, remove] }] = element.firstElementChild.children;
  const { name, created_at: created = '' } = thing;
  const info = thing.too_large ? TOO_LARGE : thing.info;
  const button = !deletion ? 'Delete' : deletion.sent ? 'Deleting…' : 'Undo';
  if (shown.name !== name) nameCell.textContent = name;
  if (shown.info !== info) infoCell.textContent = shorten(info);
  if (shown.created !== created) timeCell.textContent = readableTime(created);
  if (shown.button !== button) remove.textContent = button;
  if (shown.name !== name || shown.button !== button) {
    element.classList.toggle('deleting', deletion !== undefined);
    edit.ariaLabel = `Edit ${name}`;
    edit.disabled = deletion !== undefined;
    remove.ariaLabel = deletion ? `${button} deleting ${name}` : `Delete ${name}`;
    if (deletion?.sent) remove.ariaLabel = `Deleting ${name}`;
  }
  element.shown = { name, info, created, button };
}

/** Show the whole text of a cell that is cut off as a tooltip, made only when the pointer is on it. */
export function explain(cell) {
  cell.title = cell.scrollWidth > cell.clientWidth ? cell.textContent : '';
}

/** A row shows only the beginning of a long info; its editor shows all of it. */
export function shorten(text) {
  return text.length > SHOWN_CHARACTERS ? `${text.slice(0, SHOWN_CHARACTERS)}…` : text;
}

/** Postgres has times that JavaScript cannot represent, such as `infinity`: they are shown as they are. */
function readableTime(text) {
  const time = new Date(text);
  return Number.isNaN(time.getTime()) ? text : date.format(time);
}

/** Light a row up for a moment. */
export function flash(element, op) {
  element.flash?.cancel();
  element.flash = element.firstElementChild.animate(
    [{ backgroundColor: `var(--flash-${op})` }, { backgroundColor: 'transparent' }],
    { duration: FLASH_MS, easing: calm.matches ? 'steps(1, end)' : 'ease-out' },
  );
}

/** Show a problem next to the form or row that caused it; null removes it. */
export function complain(container, problem) {
  let p = container.querySelector(':scope > .problem');
  if (!p && problem) {
    p = document.createElement('p');
    p.className = 'problem';
    p.role = 'alert';
    container.append(p);
  }
  if (p) {
    p.textContent = problem?.message ?? '';
    p.passes = problem?.passes ?? false;
  }
  for (const field of container.querySelectorAll('[name]')) {
    const rejected = field.name === problem?.field;
    field.setAttribute('aria-invalid', String(rejected));
    if (rejected) field.focus();
  }
}

/** While a form is being sent, its fields accept no text: it would be lost afterwards. */
export function setBusy(form, busy) {
  form.ariaBusy = String(busy);
  for (const field of form.querySelectorAll('[name]')) field.readOnly = busy;
}

/** The server is back: remove the problems that were due to its absence. */
export function forgive() {
  for (const p of document.querySelectorAll('.problem')) if (p.passes) complain(p.parentElement, null);
}
