/** The writes of the page. Each resolves when the server has done it, and throws a Problem when it has not. */

export const create = (thing) => send('POST', '/api/things', thing);
export const change = (name, fields) => send('PATCH', at(name), fields);
export const destroy = (name) => send('DELETE', at(name));

/** A sentence for the person who typed; `status` is 0 when the server could not be reached at all. */
export class Problem extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

const TIMEOUT_MS = 15_000;

const at = (name) => `/api/things/${encodeURIComponent(name)}`;

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
  const { detail, title } = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, detail ?? title ?? `The server answered ${answer.status}.`);
}
