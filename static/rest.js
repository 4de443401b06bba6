/** The page's writes. Each resolves once the server has done it, and rejects with a Problem if it has not. */

export const create = (thing) => send('POST', THINGS, thing);
export const change = (name, fields) => send('PATCH', at(name), fields);
export const destroy = (name) => send('DELETE', at(name));

const THINGS = new URL('api/things', import.meta.url).href;

/** A sentence for the user; `status` is 0 if the server cannot be reached, `field` may be undefined. */
export class Problem extends Error {
  constructor(status, sentence, field) {
    super(sentence);
    this.status = status;
    this.field = field;
  }
}

const TIMEOUT_MS = 15_000;

// URL parsers remove `.` and `..` from a path, encoded or not, so these two names go into the query.
const at = (name) => `${THINGS}/${/^\.\.?$/.test(name) ? `?name=${name}` : encodeURIComponent(name)}`;

async function send(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: { 'Content-Type': 'application/json', Accept: 'application/json' },
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(TIMEOUT_MS),
  }).catch(() => {
    throw new Problem(0, 'The server cannot be reached. Please try again in a moment.');
  });
  if (answer.ok) return;
  const { detail, field } = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, detail ?? `The server answered ${answer.status}.`, field);
}
