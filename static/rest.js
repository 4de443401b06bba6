/** The page's requests. Writes resolve once the server has done them; all reject with a Problem if it has not. */

const at = (path) => new URL(path, import.meta.url).href;
const THINGS = at('api/things');
const TIMEOUT_MS = 15_000;
const ABOUT_TIMEOUT_MS = 3_000;
const LONGEST_NAME = 200;

export const create = async (thing) => send('POST', THINGS, checked(thing));
export const change = async (name, fields) => send('PATCH', addressOf(name), checked(fields));
const read = (name) => send('GET', addressOf(name));
/** `keepalive`, because it may be sent while the user leaves the page. */
export const destroy = (name) => send('DELETE', addressOf(name), undefined, { keepalive: true });

/**
 * Read the thing with this name; reject unless it has this id. A page that is not live knows things by old names, and
 * another thing may have such a name by now.
 */
export async function verify(name, id) {
  const thing = await read(name).catch((problem) => {
    if (problem.status !== 404) throw problem;
  });
  if (thing?.id !== id) throw new Problem(404, `It is not called “${name}” any more; this page will show what it is.`);
  return thing;
}

/** What this server is, or null if it does not say: { things, psql }. */
export async function about() {
  try {
    const answer = await fetch(at('about'), { cache: 'no-store', signal: AbortSignal.timeout(ABOUT_TIMEOUT_MS) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** A sentence for the user; `status` is 0 if the server cannot be reached, `field` may be undefined. */
export class Problem extends Error {
  constructor(status, sentence, field) {
    super(sentence);
    this.status = status;
    this.field = field;
  }

  /** Whether it goes away by itself, when the server or its database is back. */
  get passes() {
    return this.status === 0 || this.status >= 500;
  }
}

/** Check the server's rules, in words for somebody who fills in a form. */
function checked(fields) {
  const { name } = fields;
  if (name === '') throw new Problem(400, `Please type a name of 1 to ${LONGEST_NAME} characters.`, 'name');
  const { length } = [...(name ?? '')];
  if (length > LONGEST_NAME) {
    throw new Problem(400, `This name has ${length} characters; a name has 1 to ${LONGEST_NAME}.`, 'name');
  }
  return fields;
}

/** URL parsers remove `.` and `..` from a path, encoded or not, so these two names go into the query. */
function addressOf(name) {
  return `${THINGS}/${/^\.\.?$/.test(name) ? `?name=${name}` : encodeURIComponent(name)}`;
}

async function send(method, address, body, options = {}) {
  const answer = await fetch(address, {
    method,
    headers: { Accept: 'application/json', ...(body && { 'Content-Type': 'application/json' }) },
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(TIMEOUT_MS),
    ...options,
  }).catch(() => {
    throw new Problem(0, 'The server cannot be reached. Please try again in a moment.');
  });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const { detail, field } = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, detail ?? `The server answered ${answer.status}.`, field);
}
