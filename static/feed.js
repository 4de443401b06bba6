/**
 * feed.js: the rows of a table that match a filter, kept up to date in a Map over Socket.IO.
 *
 *   import { io } from './socket.io-client/socket.io.esm.min.js';
 *   import { Feed } from './feed.js';
 *
 *   const feed = new Feed({ io, topic: 'order', where: 'status=eq.open', columns: 'id,total' });
 *   feed.onload = (items) => { ... };     // all rows: at the start, and whenever they are loaded again
 *   feed.onchange = (change) => { ... };  // { op, key, row, before, offset, writtenAt }, already in feed.items
 *   feed.onbatch = (changes) => { ... };  // the same, once for all changes that arrive together: repaint here
 *   feed.onstate = (state) => { ... };    // see State
 *   feed.start();
 *   ...
 *   feed.items                            // Map: key -> row, see "Keys"
 *   feed.stop();
 *
 * What it guarantees
 *   `items` is what `SELECT columns FROM table WHERE ...` returned as of `offset`: no change is missed and none is
 *   applied twice. Rows that begin to match are created, those that no longer match are destroyed. After a lost
 *   connection, a sleep, or a restart of the server, the stream continues after the last change seen; the official
 *   client does this by itself (its "connection state recovery"). If the server cannot continue from there, or the table
 *   was altered, all rows are loaded again; until they are complete, `items` stays as it was.
 *
 * What it does not guarantee
 *   The changes of one transaction arrive one by one. Numbers above Number.MAX_SAFE_INTEGER lose digits in JSON.parse,
 *   so two rows with such keys may become one: use text or uuid for them. (If this happens while rows are loaded, the
 *   state becomes `refused`.)
 *
 * Connections
 *   Feeds share one connection, each in a namespace of its own: `/order`, then `/order/2` and so on for more Feeds of
 *   the same topic. One connection holds 50; for more, or for a separate connection, pass `io` as
 *   `(url, options) => io(url, { ...options, forceNew: true })`.
 *
 * Keys
 *   `items` is keyed by the value of the table's key column; if the key has several columns, by the JSON of their
 *   values, in the key's order, as in '[7,"a"]'. Use `feed.items.get(feed.keyOf({ tenant: 7, number: 'a' }))`. Rows
 *   always have their key columns, even if `columns` does not name them.
 *   A row with `too_large: true` was too large to be sent. It has its key columns and, if asked for, the column that the
 *   topic's destroys carry (destroy_with), and nothing else: fetch it from your backend if you need all of it.
 *
 * @module
 */

/**
 * A row: column -> value.
 *
 * @typedef {Record<string, any>} AnyRow
 */

/**
 * @typedef {object} FeedOptions
 * @property {IO | Manager} io socket.io-client's `io`, or a Manager of it; passed in, so that this module has no
 *   dependencies and also runs in Node
 * @property {string} topic the topic of the table
 * @property {string | URLSearchParams} [where] which rows, in PostgREST's syntax: 'status=eq.open&total=gt.100'; all by
 *   default
 * @property {string | string[]} [columns] which columns: 'id,total'; all by default
 * @property {string} [label] follows the topic in the namespace, so that it can be found in logs: /topic/label, and
 *   /topic/label/2 the next time
 * @property {boolean} [old] have updates and destroys carry the old row, with the selected columns: then `before` is
 *   what the server says, even for a row that is `too_large` now
 * @property {boolean} [timing] ask the server for times, and set each change's `writtenAt`
 * @property {string | URL} [server] URL of the server, up to and including its path prefix if it has one
 *   ('https://host/app/'); by default where this module was loaded from, so it is required if that is a file, as in
 *   Node; ignored with a Manager
 * @property {string} [path] path of Socket.IO, relative to `server`; 'socket.io-client' by default
 */

/**
 * One change. `row`: as it is now, null if it is gone. `before`: as it was, undefined for a create. `writtenAt`: when it
 * was written, in ms on the clock of performance.now(); null without `timing`, and for missed changes. A truncate has
 * neither `key` nor rows: all rows are gone.
 *
 * @template {AnyRow} [Row=AnyRow]
 * @typedef {object} Change
 * @property {'create' | 'update' | 'destroy' | 'truncate'} op
 * @property {any} [key]
 * @property {Row | null} row
 * @property {Row | undefined} before
 * @property {string} offset
 * @property {number | null} writtenAt
 */

/**
 * What a Feed is doing:
 *
 *   connecting  not connected, or not yet; from start() to stop(), attempts continue until there is a connection.
 *               `problem`, if any, says why the last attempt was refused
 *   loading     the rows are on their way
 *   returning   connected again, receiving the missed changes
 *   live        up to date; `missed` counts the changes received while returning, `reloaded` means that all rows were
 *               loaded again instead
 *   stale       connected, but the server has lost its database: `since` when, and the `reason`, a sentence. Changes
 *               continue by themselves once the database is back
 *   refused     the server refuses what was asked for, and asking again would not help: `problem` says why. start()
 *               tries once more
 *
 * `asOf`: when the rows were last known to be up to date; null if there are none yet.
 *
 * @typedef {{ name: 'connecting', asOf: Date | null, problem?: Problem }
 *   | { name: 'loading', asOf: Date | null }
 *   | { name: 'returning', asOf: Date | null }
 *   | { name: 'live', missed: number, reloaded: boolean }
 *   | { name: 'stale', asOf: Date | null, since: Date, reason: string }
 *   | { name: 'refused', asOf: Date | null, problem: Refusal }} State
 */

/**
 * Why a connection was refused; `status` is the HTTP status, or 0.
 *
 * @typedef {Error & { status: number }} Problem
 */

/**
 * Why a subscription was refused: `code` for programs, `detail`, a sentence that says what to change, and `field`, the
 * option that it is about.
 *
 * @typedef {Error & { code: string, detail: string, field?: string }} Refusal
 */

// What we use of socket.io-client.
/** @typedef {(url: string, options: any) => Socket} IO */
/** @typedef {{ socket(namespace: string, options: any): Socket }} Manager */
/**
 * @typedef {object} Connecting
 * @property {{ readyState: string }} [engine]
 * @property {(ms: number) => any} reconnectionDelay
 * @property {(ms: number) => any} reconnectionDelayMax
 */
/**
 * @typedef {object} Socket
 * @property {boolean} active
 * @property {boolean} connected
 * @property {Connecting} io
 * @property {(event: any, listener: (...args: any[]) => void) => any} on
 * @property {() => any} off
 * @property {() => any} connect
 * @property {() => any} disconnect
 */

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;
// A server that refuses us is unlikely to change its mind within seconds.
const LAST_RETRY_REFUSED_MS = 30_000;
// The server does not mark the end of a replay. It has ended when a change arrives that was written after we
// reconnected (known with timing), or when nothing has arrived for this long.
const QUIET_MS = 300;

// How many namespaces there have been for each topic and label. None is reused: messages for an earlier subscription may
// still arrive in it.
/** @type {Map<string, number>} */
const numbers = new Map();

/** The namespace `wanted`, or if that has been used, `wanted/2` and so on.
 * @param {string} wanted */
function unused(wanted) {
  let namespace = wanted;
  let number = numbers.get(wanted) ?? 0;
  do {
    number += 1;
    if (number > 1) namespace = `${wanted}/${number}`;
  } while (number > 1 && numbers.has(namespace));
  numbers.set(wanted, number);
  if (number > 1) numbers.set(namespace, 1);
  return namespace;
}

/** @template {AnyRow} [Row=AnyRow] */
export class Feed {
  /** @type {Map<any, Row>} */
  items = new Map();
  /** The offset that `items` is as of; null before the rows are loaded.
   * @type {string | null} */
  offset = null;
  /** @type {State} */
  state = { name: 'connecting', asOf: null };
  /** @type {(items: Map<any, Row>) => void} */
  onload = () => {};
  /** @type {(change: Change<Row>) => void} */
  onchange = () => {};
  /** @type {(changes: Change<Row>[]) => void} */
  onbatch = () => {};
  /** @type {(state: State) => void} */
  onstate = () => {};

  #options;
  /** @type {string[]} */
  #key = []; // the columns
  /** @type {object | null} */
  #started = null; // a new object for each start
  /** @type {Socket | null} */
  #socket = null;
  #isWelcome = false; // this connection's hello has arrived
  /** @type {{ key: string[], rows: Map<any, Row> } | null} */
  #arriving = null; // what is being loaded
  #isLoaded = false;
  #isReloaded = false;
  /** @type {Change<Row>[]} */
  #batch = []; // changes not passed to onbatch yet
  /** @type {Problem | undefined} */
  #problem; // why the server refuses us, until it accepts us
  #retries = 0;
  /** @type {{ since: Date, reason: string } | null} */
  #outage = null; // while the server has lost its database
  /** @type {Date | null} */
  #asOf = null; // until when `items` is known to have been up to date; null while it is
  #greetedAt = 0;
  // From the database's clock to ours. Delays can only increase it, so the smallest difference seen is the most accurate.
  #clockDifference = Infinity;
  /** @type {number | null} */
  #writtenAt = null;
  #missed = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #quiet;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #handingOver;

  /** @param {FeedOptions} options */
  constructor({
    io,
    topic,
    where = '',
    columns = '',
    label,
    old = false,
    timing = false,
    server = new URL('.', import.meta.url),
    path = 'socket.io-client',
    ...unknown
  }) {
    check(io, topic, server);
    for (const name of Object.keys(unknown)) console.warn(`Feed: there is no option ${name}.`);
    const base = new URL(server);
    if (!base.pathname.endsWith('/')) base.pathname += '/';
    /** @type {Record<string, string | boolean>} */
    const asked = { key: true };
    if (String(where)) asked.where = String(where);
    if (columns.length) asked.columns = typeof columns === 'string' ? columns : columns.map(quoted).join(',');
    if (old) asked.old = true;
    if (timing) asked.timing = true;
    this.#options = { io, topic, label, asked, address: new URL(path, base) };
  }

  /** Load the rows and follow their changes until `stop()`. */
  start() {
    if (this.#started) return;
    const started = (this.#started = {});
    // Not at once: if a callback calls this while socket.io-client reports a lost connection, a new socket would keep it
    // from ever connecting again.
    queueMicrotask(() => {
      if (this.#started === started) this.#connect();
    });
    this.#enter({ name: 'connecting', asOf: this.#asOf });
  }

  /** Stop. Callbacks may call this; none is called afterwards, unless the Feed is started again. */
  stop() {
    if (!this.#started) return;
    this.#started = null;
    this.#batch = [];
    clearTimeout(this.#handingOver);
    this.#close();
    this.state = { name: 'connecting', asOf: this.#asOf };
  }

  /**
   * The key under which `items` has a row, given the row or an object of its key columns.
   *
   * @param {AnyRow} row
   */
  keyOf(row) {
    return keyIn(row, this.#key);
  }

  // ---- connecting ----------------------------------------------------------------------------------------------

  #connect() {
    const { topic } = this.#options;
    this.#retries = 0;
    this.#problem = undefined;
    this.#forgetConnection();
    const socket = this.#open();
    this.#socket = socket;
    socket.on('feed:hello', (hello, offset) => this.#greeted(hello, offset));
    socket.on('feed:rows', (rows) => this.#arrived(rows));
    socket.on('feed:loaded', (offset) => this.#loaded(offset));
    socket.on('feed:offset', (offset) => (this.offset = offset));
    socket.on('feed:state', (state) => this.#heard(state));
    socket.on('feed:timing', (times) => this.#timed(times));
    // The old row, if there is one, comes before the offset.
    socket.on(`${topic}:create`, (row, offset) => this.#put('create', row, offset));
    socket.on(`${topic}:update`, (row, ...rest) => this.#put('update', row, rest.pop(), rest.pop()));
    socket.on(`${topic}:destroy`, (key, ...rest) => this.#remove(key, rest.pop(), rest.pop()));
    socket.on(`${topic}:truncate`, (offset) => this.#clear(offset));
    socket.on('connect_error', (error) => {
      if (error.data?.code) {
        this.#refused(error.data);
        return;
      }
      this.#problem = problemOf(error, socket);
      this.#lost(socket);
    });
    socket.on('disconnect', () => {
      // Every connection resets the client's backoff, even one that is refused right afterwards: browsers send a page's
      // origin with a POST, but not with a GET. So the backoff is applied here.
      socket.io.reconnectionDelay(waitingMs(this.#retries, this.#patience));
      this.#retries += 1;
      this.#lost(socket);
    });
    if (!socket.active) socket.connect();
  }

  /** A socket for a namespace that this page has not used yet. The client keeps it, and with it `auth`, as long as the
   * page is open: they must not refer to this Feed, which holds the rows. */
  #open() {
    const { io, topic, label, asked, address } = this.#options;
    const namespace = unused(`/${topic}${label ? `/${encodeURIComponent(label)}` : ''}`);
    if (typeof io !== 'function') return io.socket(namespace, { auth: asked });
    return io(address.origin + namespace, {
      path: address.pathname,
      transports: ['websocket', 'polling'],
      tryAllTransports: true,
      reconnectionDelay: FIRST_RETRY_MS,
      reconnectionDelayMax: LAST_RETRY_MS,
      auth: asked,
    });
  }

  #close() {
    const socket = this.#socket;
    this.#socket = null;
    this.#forgetConnection();
    socket?.off();
    if (!socket?.active) return; // it was refused: a DISCONNECT would be for a namespace that we are not in
    if (!socket.connected && socket.io.engine?.readyState === 'open') {
      // CONNECT was sent. Before the answer, the client sends no DISCONNECT, and the server would go on sending.
      for (const event of ['connect', 'disconnect']) socket.on(event, () => socket.disconnect());
    } else {
      socket.disconnect();
    }
  }

  #forgetConnection() {
    clearTimeout(this.#quiet);
    this.#isWelcome = false;
    this.#arriving = null;
    this.#outage = null;
    this.#noteTime();
  }

  /** From now on, `items` may not be up to date. */
  #noteTime() {
    if (this.#isLoaded) this.#asOf ??= new Date();
  }

  /** @param {Socket} socket */
  async #lost(socket) {
    socket.io.reconnectionDelayMax(this.#patience);
    this.#forgetConnection();
    const problem = this.#problem;
    const isNews = this.state.name !== 'connecting' || this.state.problem?.message !== problem?.message;
    if (isNews && !this.#enter({ name: 'connecting', asOf: this.#asOf, ...(problem && { problem }) })) return;
    if (socket.active) return; // it reconnects by itself
    // The server refused or disconnected the socket. The official client gives up here; we do not.
    await pause((this.#retries += 1), this.#patience);
    if (socket === this.#socket) socket.connect();
  }

  /** Refused for good. @param {{ code: string, detail: string, field?: string }} why */
  #refused({ code, detail, field }) {
    if (!this.#handOver()) return;
    this.#started = null;
    this.#close();
    const problem = Object.assign(new Error(detail), { code, detail, ...(field !== undefined && { field }) });
    this.#enter({ name: 'refused', asOf: this.#asOf, problem });
  }

  /** The longest wait between two attempts. */
  get #patience() {
    return this.#problem ? LAST_RETRY_REFUSED_MS : LAST_RETRY_MS;
  }

  // ---- loading, returning, live --------------------------------------------------------------------------------

  /**
   * @param {{ recovered: boolean, key: string[] }} hello
   * @param {string} offset
   */
  #greeted({ recovered, key }, offset) {
    clearTimeout(this.#quiet);
    this.#retries = 0;
    this.#problem = undefined;
    this.#isWelcome = true;
    this.#outage = null; // if it continues, the server will say so
    if (!recovered) {
      this.#awaitRows(key);
      return;
    }
    this.#greetedAt = performance.now();
    this.#writtenAt = null;
    this.offset = offset;
    if (this.#enter({ name: 'returning', asOf: this.#asOf })) this.#awaitQuiet();
  }

  /** @param {string[]} key */
  #awaitRows(key) {
    if (!key.length) {
      const detail = `The table of ${this.#options.topic} has no primary key by which its rows could be told apart.`;
      this.#refused({ code: 'no_key', detail, field: 'topic' });
      return;
    }
    this.#arriving = { key, rows: new Map() };
    this.#clockDifference = Infinity;
    this.#writtenAt = null;
    this.#isReloaded ||= this.#isLoaded;
    this.#noteTime();
    this.#enter({ name: 'loading', asOf: this.#asOf });
  }

  /** @param {Row[]} some */
  #arrived(some) {
    if (!this.#arriving) return;
    const { key, rows } = this.#arriving;
    const before = rows.size;
    for (const row of some) rows.set(keyIn(row, key), row);
    if (rows.size === before + some.length) return;
    const detail = `Several rows of ${this.#options.topic} have the same ${key} in JavaScript, where numbers above 2^53 lose digits: use text or uuid.`;
    this.#refused({ code: 'same_key', detail, field: 'topic' });
  }

  /** @param {string} offset */
  #loaded(offset) {
    if (!this.#arriving) return;
    if (!this.#handOver()) return; // these changes belong to the rows that are replaced now
    const { key, rows } = this.#arriving;
    this.#arriving = null;
    this.#key = key;
    this.items.clear();
    for (const [under, row] of rows) this.items.set(under, row);
    this.offset = offset;
    this.#isLoaded = true;
    this.#asOf = null;
    if (this.#call(() => this.onload(this.items))) this.#goLive();
  }

  /** @param {{ live: boolean, since: string, reason: string }} state */
  #heard({ live, since, reason }) {
    this.#outage = live ? null : { since: new Date(since), reason };
    if (this.state.name === 'returning') return; // goes live, or stale, when the missed changes have arrived
    if (this.#isWelcome && !this.#arriving) {
      if (!live || this.state.name === 'stale') this.#goLive();
    } else if (this.#outage) {
      this.#enter({ name: 'stale', asOf: this.#asOf, ...this.#outage });
    } else {
      this.#enter({ name: this.#arriving ? 'loading' : 'connecting', asOf: this.#asOf });
    }
  }

  /** @param {{ at: number, now: number }} times */
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
    if (this.state.name === 'returning') this.#goLive();
  }

  #goLive() {
    clearTimeout(this.#quiet);
    if (this.#outage) {
      this.#asOf ??= this.#outage.since;
      this.#enter({ name: 'stale', asOf: this.#asOf, ...this.#outage });
      return;
    }
    const [missed, reloaded] = [this.#missed, this.#isReloaded];
    this.#missed = 0;
    this.#isReloaded = false;
    this.#asOf = null;
    this.#enter({ name: 'live', missed, reloaded });
  }

  /** Return whether to go on, as #call does. @param {State} state */
  #enter(state) {
    if (!this.#handOver()) return false;
    this.state = state;
    return this.#call(() => this.onstate(state));
  }

  /**
   * Call a callback; return whether to go on: it may have stopped the Feed, or started it again. An error in it is
   * reported as uncaught, and changes nothing here: if a handler threw, socket.io-client would not note the offset of the
   * change, and receive it again.
   *
   * @param {() => void} callback
   */
  #call(callback) {
    const started = this.#started;
    try {
      callback();
    } catch (error) {
      queueMicrotask(() => {
        throw error;
      });
    }
    return this.#started === started;
  }

  // ---- folding -------------------------------------------------------------------------------------------------

  /**
   * @param {'create' | 'update'} op
   * @param {Row} row
   * @param {string} offset
   * @param {Row} [old]
   */
  #put(op, row, offset, old) {
    const key = this.keyOf(row);
    const before = old ?? this.items.get(key);
    this.items.set(key, row);
    this.#changed({ op, key, row, before, offset });
  }

  /**
   * @param {AnyRow} gone the key columns
   * @param {string} offset
   * @param {Row} [old]
   */
  #remove(gone, offset, old) {
    const key = this.keyOf(gone);
    if (!this.items.has(key)) {
      this.#beginAgain();
      return;
    }
    const before = old ?? this.items.get(key);
    this.items.delete(key);
    this.#changed({ op: 'destroy', key, row: null, before, offset });
  }

  /** What we hold cannot be right: ask for all rows, as a new client. */
  #beginAgain() {
    this.#close();
    this.#connect();
    this.#enter({ name: 'connecting', asOf: this.#asOf });
  }

  /** @param {string} offset */
  #clear(offset) {
    this.items.clear();
    this.#changed({ op: 'truncate', row: null, before: undefined, offset });
  }

  /** @param {Omit<Change<Row>, 'writtenAt'>} what */
  #changed(what) {
    const isLive = this.state.name === 'live';
    const change = { ...what, writtenAt: isLive ? this.#writtenAt : null };
    this.offset = change.offset;
    if (!isLive) this.#missed += 1;
    if (this.state.name === 'returning') this.#awaitQuiet();
    if (!this.#batch.length) this.#handingOver = setTimeout(() => this.#handOver());
    this.#batch.push(change);
    this.#call(() => this.onchange(change));
  }

  /** Call onbatch: once all messages that arrived together are handled, or before another callback. Return whether to go
   * on, as #call does. */
  #handOver() {
    clearTimeout(this.#handingOver);
    const changes = this.#batch;
    this.#batch = [];
    return !changes.length || this.#call(() => this.onbatch(changes));
  }
}

/** Throw for options that cannot work.
 * @param {IO | Manager} io
 * @param {string} topic
 * @param {string | URL} server */
function check(io, topic, server) {
  if (!io) throw new TypeError("Feed: io must be socket.io-client's `io`, or a Manager of it.");
  if (!topic) throw new TypeError('Feed: topic must name a topic.');
  if (typeof io === 'function' && !/^https?:/.test(String(server))) {
    throw new TypeError("Feed: server must be the server's URL, as in 'http://127.0.0.1:8000'.");
  }
}

/** The key under which `items` has a row.
 * @param {AnyRow} row
 * @param {string[]} key */
function keyIn(row, key) {
  const values = key.map((column) => row[column]);
  return values.length > 1 ? JSON.stringify(values) : comparable(values[0]);
}

/** A value that can be a Map's key: arrays and documents become text that no Postgres text equals (U+0000).
 * @param {any} value */
function comparable(value) {
  return typeof value === 'object' && value !== null ? `\u0000${JSON.stringify(value)}` : value;
}

/** @param {string} name */
function quoted(name) {
  return /^\w+$/.test(name) ? name : `"${name.replace(/["\\]/g, '\\$&')}"`;
}

/** An Error with the message of an Engine.IO refusal.
 * @param {number} status
 * @param {string} body */
function refusedWith(status, body) {
  let sentence;
  try {
    sentence = JSON.parse(body).message;
  } catch {
    // a proxy's page, say
  }
  return Object.assign(new Error(sentence ?? `The server answered ${status}.`), { status });
}

/** The Error for a connection that the server refused; undefined if there was no answer.
 * @param {Error & { description?: any, context?: any }} error
 * @param {Socket} socket */
function problemOf(error, socket) {
  if (!socket.active) return Object.assign(new Error(error.message), { status: 0 }); // CONNECT_ERROR
  if (!(error.description > 0)) return undefined;
  return refusedWith(error.description, error.context?.responseText);
}

/** How long to wait after this many failures: twice as long each time, up to a limit.
 * @param {number} failures
 * @param {number} most */
function waitingMs(failures, most) {
  return Math.min(FIRST_RETRY_MS * 2 ** failures, most);
}

/** Wait before the next attempt, with jitter so that pages do not all return at once.
 * @param {number} failures
 * @param {number} most */
function pause(failures, most) {
  return new Promise((resolve) => setTimeout(resolve, waitingMs(failures, most) * (0.5 + Math.random())));
}
