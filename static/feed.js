/**
 * feed.js: a list from REST and its live changes from Socket.IO, folded into one Map.
 *
 *   import { io } from './socket.io-client/socket.io.esm.min.js';
 *   import { Feed } from './feed.js';
 *
 *   const feed = new Feed({ io, list: 'api/things', topic: 'thing' });
 *   feed.onload = (items) => { ... };     // the whole list: at the start, and whenever it was loaded again
 *   feed.onchange = (change) => { ... };  // { op, key, name, row, before, offset, writtenAt }, already in feed.items
 *   feed.onstate = (state) => { ... };    // see "States"
 *   feed.start();
 *   ...
 *   feed.items                            // Map: key -> row, see "Keys"
 *   feed.stop();
 *
 * What it guarantees
 *   `items` is the table as of `offset`: no change is missed and none is applied twice. The Feed-Offset header of the
 *   list says which moment the list shows, and the stream is asked to begin exactly there. After a lost connection, a
 *   sleep, or a restart of the server, the stream continues after the last change seen. The official client does this
 *   by itself (its "connection state recovery"), and `auth.since` does the same with a server that no longer knows us.
 *   If the server cannot continue from there it says so (`recovered: false`); the list is then loaded again, and a new
 *   socket begins at the new list's offset; the same if a destroy does not tell which row is gone, because the options
 *   do not fit the topic, say. Until that list arrives, `items` stays as it was.
 *
 * What it does not guarantee
 *   Changes of one transaction come one by one. Numbers above Number.MAX_SAFE_INTEGER lose digits in JSON.parse, so
 *   two rows with such keys may become one: have the list and the table use text or uuid for them.
 *
 * Options
 *   io          socket.io-client's `io`; passed in, so that this module has no dependencies and also runs in Node
 *   list        URL of the REST list, an array of rows; relative to `server`. The list and its Feed-Offset must be of
 *               one moment: `SELECT feed.offset(), json_agg(orders) FROM orders`
 *   topic       the topic of the table: 'order' for order:create, order:update, order:destroy, order:truncate
 *   key         the column that identifies a row, 'id' by default, or an array of them: ['tenant', 'number']
 *   name        the column whose value a destroy carries if the topic is watched with `destroy_with`, as things are
 *               with 'name', the default. Its values must be unique in the table. The destroys of other topics carry
 *               the key, and this option does nothing but fill in the `name` of each change
 *   server      URL of the server, up to and including its path prefix if it has one ('https://host/app/'); by
 *               default where this module was loaded from, so it must be given where that is a file, as in Node
 *   path        path of Socket.IO, relative to `server`; 'socket.io-client' by default
 *   timing      true asks the server for times and sets each change's `writtenAt`: when it was written, in ms on
 *               performance.now()'s clock; null without timing, and for missed changes
 *
 * Keys
 *   `items` is keyed by the value of the key column. For an array of columns it is the JSON of their values in that
 *   order, as in '[7,"a"]'. Use `feed.items.get(feed.keyOf({ tenant: 7, number: 'a' }))`.
 *   A row with `too_large: true` was too large to be sent. It has its key columns, and `name`, and nothing else; load
 *   it from REST if you need it whole.
 *
 * States ({ name, ... }, passed to onstate, also feed.state)
 *   loading     the list was requested; `problem`, an Error, says why the last attempt failed (its `status` is the
 *               HTTP status, or 0 if there was no answer); the next attempt follows automatically
 *   connecting  not connected, or not yet; attempts continue until there is a connection. `problem`, if there is one,
 *               is the server's reason to refuse the last attempt. `asOf`, a Date: the rows are as they were then
 *   returning   connected again, receiving the missed changes
 *   live        up to date; `missed` counts the changes received while returning, `reloaded` means that the list
 *               was loaded again instead
 *   stale       connected, but the server has lost its database. `since`, a Date, and `reason`, a sentence; `asOf` as
 *               above. Changes continue by themselves once the database is back
 */

const LIST_TIMEOUT_MS = 30_000;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;
// A server that answers and refuses will hardly change its mind within seconds.
const LAST_RETRY_REFUSED_MS = 30_000;
// The server does not mark the end of a replay. It has ended when a change arrives that was written after we
// reconnected (known with timing), or when nothing has arrived for this long.
const QUIET_MS = 300;

export class Feed {
  items = new Map();
  offset = null;
  state = { name: 'loading' };
  onload = () => {};
  onchange = () => {};
  onstate = () => {};

  #options;
  #socket = null;
  #ending = new AbortController();
  #holders = new Map(); // name -> Set of keys
  #refusals = 0;
  #retries = 0;
  #refusal; // the server's reason not to let us in, until it does
  #wasLive = false;
  #welcomed = false; // by the hello of this connection
  #outage = null; // { since, reason } while the server has lost its database
  #asOf = null; // until when `items` is known to have been up to date; null while it is
  #greetedAt = 0;
  // From the database's clock to ours. Delays only make it look larger, so the smallest difference seen is the most
  // accurate.
  #clockDifference = Infinity;
  #writtenAt = null;
  #reloaded = false;
  #missed = 0;
  #quiet;

  constructor({
    io,
    list,
    topic,
    key = 'id',
    name = 'name',
    server = new URL('.', import.meta.url),
    path = 'socket.io-client',
    timing = false,
  }) {
    const base = new URL(server);
    if (!base.pathname.endsWith('/')) base.pathname += '/';
    this.#options = { io, list: new URL(list, base), topic, key, name, socket: new URL(path, base), timing };
  }

  /** Load the list, then follow its changes until `stop()`. */
  start() {
    this.#load();
  }

  /** Stop for good: no callback is called after this. */
  stop() {
    this.#ending.abort();
    clearTimeout(this.#quiet);
    this.#close();
  }

  /** The key under which `items` has a row, given the row or an object of its key columns. */
  keyOf(row) {
    const { key } = this.#options;
    return Array.isArray(key) ? JSON.stringify(key.map((column) => row[column])) : comparable(row[key]);
  }

  async #load() {
    this.#enter('loading');
    this.#clockDifference = Infinity;
    let answer = null;
    for (let failures = 0; !answer; failures += 1) {
      try {
        answer = await this.#fetchList();
      } catch (error) {
        if (this.#ended) return;
        this.#enter('loading', { problem: error });
        await pause(failures, isRefusal(error) ? LAST_RETRY_REFUSED_MS : LAST_RETRY_MS);
      }
      if (this.#ended) return;
    }
    this.#replace(answer.rows);
    this.#asOf = new Date();
    this.offset = answer.offset;
    this.onload(this.items);
    this.#connect();
  }

  async #fetchList() {
    const answer = await fetch(this.#options.list, {
      headers: { Accept: 'application/json' },
      cache: 'no-store',
      signal: AbortSignal.timeout(LIST_TIMEOUT_MS), // not combined by AbortSignal.any: Node 20 may drop it
    }).catch(() => {
      throw Object.assign(new Error('The server cannot be reached.'), { status: 0 });
    });
    if (!answer.ok) throw problemOf(answer.status, await answer.text().catch(() => ''));
    const offset = answer.headers.get('Feed-Offset');
    if (!offset) throw new Error('The list came without a Feed-Offset.');
    return { rows: await answer.json(), offset };
  }

  #connect() {
    const { io, topic, socket: address, timing } = this.#options;
    this.#welcomed = false;
    this.#outage = null;
    this.#enter('connecting', { asOf: this.#asOf });
    const socket = io(address.origin, {
      path: address.pathname,
      forceNew: true,
      transports: ['websocket', 'polling'],
      tryAllTransports: true,
      reconnectionDelay: FIRST_RETRY_MS,
      reconnectionDelayMax: LAST_RETRY_MS,
      // A function, so that each reconnection sends the latest offset.
      auth: (send) => send({ since: this.offset, ...(timing && { timing }) }),
    });
    this.#socket = socket;
    socket.on('feed:hello', (hello, offset) => this.#greeted(hello, offset));
    socket.on('feed:state', (state) => this.#heard(state));
    socket.on('feed:timing', (times) => this.#timed(times));
    socket.on(`${topic}:create`, (row, offset) => this.#put('create', row, offset));
    socket.on(`${topic}:update`, (row, offset) => this.#put('update', row, offset));
    socket.on(`${topic}:destroy`, (what, offset) => this.#remove(what, offset));
    socket.on(`${topic}:truncate`, (offset) => this.#clear(offset));
    socket.on('connect_error', (error) => {
      this.#refusal = refusalOf(error, socket);
      this.#lost(socket);
    });
    socket.on('disconnect', () => {
      // Every connection resets the client's backoff, even one that is refused right afterwards: browsers say where a
      // page is from when they POST, not when they GET. So the backoff is applied here.
      socket.io.reconnectionDelay(waitingMs(this.#retries, this.#patience));
      this.#retries += 1;
      this.#lost(socket);
    });
  }

  #close() {
    this.#socket?.off();
    this.#socket?.disconnect();
    this.#socket = null;
  }

  #greeted({ recovered, topic = this.#options.topic }, offset) {
    this.#retries = 0;
    this.#refusal = undefined;
    if (topic !== this.#options.topic) {
      this.offset = offset; // another topic must be loaded again
      return;
    }
    this.#welcomed = true;
    this.#outage = null; // if it goes on, we shall hear of it
    if (!recovered) {
      this.#reload();
      return;
    }
    this.#refusals = 0;
    this.#greetedAt = performance.now();
    this.#writtenAt = null;
    this.offset = offset;
    if (this.#wasLive) {
      this.#enter('returning');
      this.#awaitQuiet();
    } else {
      this.#goLive({});
    }
  }

  #heard({ live, since, reason }) {
    this.#outage = live ? null : { since: new Date(since), reason };
    if (this.state.name === 'returning') return; // goes live, or stale, when the missed changes have arrived
    if (!this.#welcomed) this.#enterConnected();
    else if (!live || this.state.name === 'stale') this.#goLive({ missed: this.#missed });
  }

  /** The state of a connection that was not welcomed yet. */
  #enterConnected() {
    if (this.#outage) this.#enter('stale', { ...this.#outage, asOf: this.#asOf });
    else this.#enter('connecting', { asOf: this.#asOf });
  }

  async #reload() {
    // The live stream that follows this refusal begins at a different moment than the new list will: drop it.
    this.#close();
    this.#reloaded ||= this.#wasLive;
    this.#wasLive = false;
    this.#enter('loading');
    if (this.#refusals > 0) await pause(this.#refusals);
    this.#refusals += 1;
    if (!this.#ended) this.#load();
  }

  async #lost(socket) {
    const problem = this.#refusal;
    socket.io.reconnectionDelayMax(this.#patience);
    clearTimeout(this.#quiet);
    this.#welcomed = false;
    this.#outage = null;
    this.#asOf ??= new Date();
    this.#enter('connecting', { asOf: this.#asOf, ...(problem && { problem }) });
    if (socket.active) return; // it reconnects by itself
    // The server refused or disconnected the socket; the official client gives up here, we do not.
    await pause((this.#retries += 1), this.#patience);
    if (socket === this.#socket) socket.connect();
  }

  /** The longest wait between two attempts. */
  get #patience() {
    return this.#refusal ? LAST_RETRY_REFUSED_MS : LAST_RETRY_MS;
  }

  #timed({ at, now }) {
    this.#clockDifference = Math.min(this.#clockDifference, performance.now() - now);
    this.#writtenAt = at + this.#clockDifference;
    if (this.#writtenAt > this.#greetedAt) this.#caughtUp();
  }

  #awaitQuiet() {
    clearTimeout(this.#quiet);
    this.#quiet = setTimeout(() => this.#caughtUp(), QUIET_MS);
  }

  #caughtUp() {
    if (this.state.name === 'returning') this.#goLive({ missed: this.#missed });
  }

  #goLive(details) {
    clearTimeout(this.#quiet);
    this.#wasLive = true;
    if (this.#outage) {
      this.#asOf ??= this.#outage.since;
      this.#enter('stale', { ...this.#outage, asOf: this.#asOf });
      return;
    }
    if (this.#reloaded) details.reloaded = true;
    this.#reloaded = false;
    this.#missed = 0;
    this.#asOf = null;
    this.#enter('live', details);
  }

  #enter(name, details = {}) {
    this.state = { name, ...details };
    this.onstate(this.state);
  }

  get #ended() {
    return this.#ending.signal.aborted;
  }

  // ---- folding -------------------------------------------------------------------------------------------------

  #put(op, row, offset) {
    const { name } = this.#options;
    const key = this.keyOf(row);
    const before = this.items.get(key);
    if (comparable(before?.[name]) !== comparable(row[name])) {
      if (before) this.#release(before, key);
      this.#claim(row, key);
    }
    this.items.set(key, row);
    this.#changed({ op, key, name: row[name], row, before, offset });
  }

  /** `what` is an object of the key columns, or the row's name. */
  #remove(what, offset) {
    const { key: columns, name } = this.#options;
    const isKey = isObject(what) && [columns].flat().every((column) => Object.hasOwn(what, column));
    const [key, another] = isKey ? [this.keyOf(what)] : (this.#holders.get(comparable(what)) ?? []);
    const before = this.items.get(key);
    if (!before || another !== undefined) {
      this.offset = offset;
      this.#reload(); // which row is gone cannot be told
      return;
    }
    this.#release(before, key);
    this.items.delete(key);
    this.#changed({ op: 'destroy', key, name: isKey ? before?.[name] : what, row: null, before, offset });
  }

  #clear(offset) {
    this.#replace([]);
    this.#changed({ op: 'truncate', name: null, row: null, before: undefined, offset });
  }

  #replace(rows) {
    this.items.clear();
    this.#holders.clear();
    for (const row of rows) {
      const key = this.keyOf(row);
      this.items.set(key, row);
      this.#claim(row, key);
    }
  }

  #changed(change) {
    change.writtenAt = this.state.name === 'live' ? this.#writtenAt : null;
    this.offset = change.offset;
    if (this.state.name !== 'live') this.#missed += 1;
    if (this.state.name === 'returning') this.#awaitQuiet();
    this.onchange(change);
  }

  // Names are unique in the table, but not between the changes of one statement: `UPDATE ... SET name = ...` may
  // pass a name from row to row. So we keep all holders of a name.

  #claim(row, key) {
    const name = comparable(row[this.#options.name]);
    if (name === undefined) return; // the table has no such column
    const keys = this.#holders.get(name);
    if (keys) keys.add(key);
    else this.#holders.set(name, new Set([key]));
  }

  #release(row, key) {
    const name = comparable(row[this.#options.name]);
    const keys = this.#holders.get(name);
    keys?.delete(key);
    if (keys?.size === 0) this.#holders.delete(name);
  }
}

function isObject(value) {
  return typeof value === 'object' && value !== null;
}

/** A value that can be a Map's key: arrays and documents become text, which no text of Postgres equals (U+0000). */
function comparable(value) {
  return isObject(value) ? `\u0000${JSON.stringify(value)}` : value;
}

/** An Error with the sentence of a refusal, whether problem+json or Engine.IO's. */
function problemOf(status, body) {
  let sentence;
  try {
    const { detail, message } = JSON.parse(body);
    sentence = detail ?? message;
  } catch {
    // a proxy's page, say
  }
  return Object.assign(new Error(sentence ?? `The server answered ${status}.`), { status });
}

/** The Error for a connection that the server refused; undefined if there was no answer. */
function refusalOf(error, socket) {
  if (!socket.active) return Object.assign(new Error(error.message), { status: 0 }); // CONNECT_ERROR
  if (!(error.description > 0)) return undefined;
  return problemOf(error.description, error.context?.responseText);
}

/** Whether asking again soon would be useless: not for a server that is away, restarting or out of database. */
function isRefusal({ status }) {
  return status >= 400 && status < 500;
}

/** How long to wait after this many failures: twice as long each time, up to a limit. */
function waitingMs(failures, most = LAST_RETRY_MS) {
  return Math.min(FIRST_RETRY_MS * 2 ** failures, most);
}

/** Wait before the next attempt, with jitter so that pages do not all return at once. */
function pause(failures, most) {
  return new Promise((resolve) => setTimeout(resolve, waitingMs(failures, most) * (0.5 + Math.random())));
}
