/**
 * feed.js: a list from REST and its live changes from Socket.IO, folded into one Map.
 *
 *   import { io } from './socket.io-client/socket.io.esm.min.js';
 *   import { Feed } from './feed.js';
 *
 *   const feed = new Feed({ io, list: 'api/things', topic: 'thing' });
 *   feed.onload = (items) => { ... };     // the whole list: at the start, and whenever it was loaded again
 *   feed.onchange = (change) => { ... };  // { op, name, row, before, offset, writtenAt }, already in feed.items
 *   feed.onstate = (state) => { ... };    // see "States"
 *   feed.start();
 *   ...
 *   feed.items                            // Map: key -> row
 *   feed.stop();
 *
 * What it guarantees
 *   `items` is the table as of `offset`: no change is missed and none is applied twice. The Feed-Offset header of the
 *   list says which moment the list shows, and the stream is asked to begin exactly there. After a lost connection, a
 *   sleep, or a restart of the server, the stream continues after the last change seen. The official client does this
 *   by itself (its "connection state recovery"), and `auth.since` does the same with a server that no longer knows us.
 *   If the server cannot continue from there it says so (`recovered: false`); the list is then loaded again, and a new
 *   socket begins at the new list's offset. Until that list arrives, `items` stays as it was.
 *
 * What it does not guarantee
 *   Changes of one transaction come one by one. Keys above Number.MAX_SAFE_INTEGER lose digits in JSON.parse.
 *
 * Options
 *   io          socket.io-client's `io`; passed in, so that this module has no dependencies and also runs in Node
 *   list        URL of the REST list, an array of rows; relative to `server`
 *   topic       the topic of the table: 'thing' for thing:create, thing:update, thing:destroy, thing:truncate
 *   key, name   columns of a row: the one that identifies it for good ('id'), and the one a destroy carries ('name')
 *   server      URL of the server, up to and including its path prefix if it has one ('https://host/app/'); by
 *               default where this module was loaded from, so it must be given where that is a file, as in Node
 *   path        path of Socket.IO, relative to `server`
 *   timing      true asks the server for times and sets each change's `writtenAt`: when it was written, in ms on
 *               performance.now()'s clock; null without timing, and for missed changes
 *
 * States ({ name, ... }, passed to onstate, also feed.state)
 *   loading     the list was requested; `problem`, an Error, says why the last attempt failed (its `status` is the
 *               HTTP status, or 0 if there was no answer); the next attempt follows automatically
 *   connecting  not connected, or not yet; attempts continue until there is a connection
 *   returning   connected again, receiving the missed changes
 *   live        up to date; `missed` counts the changes received while returning, `reloaded` means that the list
 *               was loaded again instead
 */

const LIST_TIMEOUT_MS = 30_000;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;
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
  #keysOf = new Map();
  #refusals = 0;
  #retries = 0;
  #wasLive = false;
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
        await pause(failures);
      }
      if (this.#ended) return;
    }
    this.#replace(answer.rows);
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
    if (!answer.ok) {
      const problem = await answer.json().catch(() => ({}));
      const sentence = problem.detail ?? `The server answered ${answer.status}.`;
      throw Object.assign(new Error(sentence), { status: answer.status });
    }
    const offset = answer.headers.get('Feed-Offset');
    if (!offset) throw new Error('The list came without a Feed-Offset.');
    return { rows: await answer.json(), offset };
  }

  #connect() {
    const { io, topic, socket: address, timing } = this.#options;
    this.#enter('connecting');
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
    socket.on('feed:timing', (times) => this.#timed(times));
    socket.on(`${topic}:create`, (row, offset) => this.#put('create', row, offset));
    socket.on(`${topic}:update`, (row, offset) => this.#put('update', row, offset));
    socket.on(`${topic}:destroy`, (name, offset) => this.#remove(name, offset));
    socket.on(`${topic}:truncate`, (offset) => this.#clear(offset));
    socket.on('connect_error', () => this.#lost(socket));
    socket.on('disconnect', () => {
      // Every connection resets the client's backoff, even one that the server closes before its hello, as it does
      // while its database is down. So the backoff is applied here.
      socket.io.reconnectionDelay(waitingMs(this.#retries));
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
    if (topic !== this.#options.topic) {
      this.offset = offset; // another topic must be loaded again
      return;
    }
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
    clearTimeout(this.#quiet);
    this.#enter('connecting');
    if (socket.active) return; // it reconnects by itself
    // The server refused or disconnected the socket; the official client gives up here, we do not.
    await pause((this.#retries += 1));
    if (socket === this.#socket) socket.connect();
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
    if (this.#reloaded) details.reloaded = true;
    this.#reloaded = false;
    this.#missed = 0;
    this.#wasLive = true;
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
    const key = row[this.#options.key];
    const before = this.items.get(key);
    const name = row[this.#options.name];
    if (before?.[this.#options.name] !== name) {
      if (before) this.#release(before);
      this.#claim(row);
    }
    this.items.set(key, row);
    this.#changed({ op, name, row, before, offset });
  }

  #remove(name, offset) {
    const [key] = this.#keysOf.get(name) ?? [];
    const before = this.items.get(key);
    if (before) {
      this.#release(before);
      this.items.delete(key);
    }
    this.#changed({ op: 'destroy', name, row: null, before, offset });
  }

  #clear(offset) {
    this.#replace([]);
    this.#changed({ op: 'truncate', name: null, row: null, before: undefined, offset });
  }

  #replace(rows) {
    this.items.clear();
    this.#keysOf.clear();
    for (const row of rows) {
      this.items.set(row[this.#options.key], row);
      this.#claim(row);
    }
  }

  #changed(change) {
    change.writtenAt = this.state.name === 'live' ? this.#writtenAt : null;
    this.offset = change.offset;
    if (this.state.name === 'returning') {
      this.#missed += 1;
      this.#awaitQuiet();
    }
    this.onchange(change);
  }

  // Names are unique in the table, but not between the changes of one statement: `UPDATE ... SET name = ...` may
  // pass a name from row to row. So we keep all holders of a name; a destroy means the one that has held it longest.

  #claim(row) {
    const name = row[this.#options.name];
    const keys = this.#keysOf.get(name);
    if (keys) keys.push(row[this.#options.key]);
    else this.#keysOf.set(name, [row[this.#options.key]]);
  }

  #release(row) {
    const name = row[this.#options.name];
    const others = this.#keysOf.get(name).filter((key) => key !== row[this.#options.key]);
    if (others.length) this.#keysOf.set(name, others);
    else this.#keysOf.delete(name);
  }
}

/** How long to wait after this many failures: twice as long each time, up to a limit. */
function waitingMs(failures) {
  return Math.min(FIRST_RETRY_MS * 2 ** failures, LAST_RETRY_MS);
}

/** Wait before the next attempt, with jitter so that pages do not all return at once. */
function pause(failures) {
  return new Promise((resolve) => setTimeout(resolve, waitingMs(failures) * (0.5 + Math.random())));
}
