/**
 * Watches a server with JavaScript clients and writes down everything they receive, one JSON line each:
 *
 *   ["list", offset, rows]                            a list loaded from REST
 *   ["hello", recovered, offset, socket.recovered]    a connection was accepted; the last is null while the database
 *                                                     was away, when it cannot be true
 *   [event, what, offset]                             a change, as in ["thing:create", {...}, ...]; `topic:reload`
 *                                                     if a topic must be loaded again
 *   ["quiet", offset]                                 nothing has happened up to there
 *   ["state", rows]                                   the items of a page's feed.js at the end
 *
 * Argument: a JSON array of {kind, url, transports, file}; kind is `official` (list, then stream),
 * `bare` (a plain io(), without a list; `since` is the offset it has, if any) or `page` (static/feed.js, which holds
 * things and nothing else). Stops when standard input ends.
 */

import { createWriteStream } from 'node:fs';
import { io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const RECONNECTION = { reconnectionDelay: 200, reconnectionDelayMax: 1000, timeout: 5000 };
const LIST_TIMEOUT_MS = 10_000;

function note(socket, write) {
  // Connected while the database was away: socket.recovered is false, whatever the hello will say.
  let isHeld = false;
  let isGreeted = false;
  socket.on('connect', () => {
    isHeld = isGreeted = false;
  });
  socket.onAny((event, ...args) => {
    if (event === 'feed:state') {
      isHeld ||= !isGreeted;
      return; // it has no offset
    }
    const offset = args.pop();
    const what = args[0] ?? null;
    if (event !== 'feed:hello') {
      write([event, what, offset]);
    } else if (what.topic) {
      write([`${what.topic}:reload`, null, offset]);
    } else {
      isGreeted = true;
      write(['hello', what.recovered, offset, isHeld ? null : socket.recovered]);
    }
  });
}

function bare({ url, transports, since }, write) {
  const socket = io(url, { transports, forceNew: true, auth: since && { since }, ...RECONNECTION });
  note(socket, write);
  return { stop: () => socket.disconnect() };
}

function official(options, write) {
  const { url, transports } = options;
  let socket;
  async function load() {
    const answer = await fetch(`${url}/api/things`, { signal: AbortSignal.timeout(LIST_TIMEOUT_MS) }).catch(() => null);
    const rows = answer?.ok ? await answer.json().catch(() => null) : null;
    if (!rows) return setTimeout(load, RECONNECTION.reconnectionDelay);
    const since = answer.headers.get('Feed-Offset');
    write(['list', since, rows]);
    socket = io(url, { path: '/socket.io-client', transports, forceNew: true, auth: { since }, ...RECONNECTION });
    note(socket, write);
    socket.on('feed:hello', ({ recovered, topic = 'thing' }) => {
      if (recovered || topic !== 'thing') return;
      socket.off();
      socket.disconnect();
      load();
    });
  }
  load();
  return { stop: () => socket?.disconnect() };
}

function page({ url, transports }, write) {
  const watched = (address, options) => {
    const socket = io(address, { ...options, ...RECONNECTION, transports, forceNew: true });
    note(socket, (entry) => {
      if (entry[0] === 'feed:offset') write(['quiet', entry[2]]);
      // Before the first list there is nothing to continue from. A client that waited for an answer gets another pid,
      // so socket.recovered may be false although the server continues.
      if (entry[0] === 'hello' && (entry[1] || feed.offset)) write(['hello', entry[1], entry[2], null]);
    });
    return socket;
  };
  const feed = new Feed({ io: watched, topic: 'thing', server: url });
  let isFirst = true;
  feed.onload = (items) => {
    write(['list', feed.offset, [...items.values()]]);
    if (isFirst) write(['hello', true, feed.offset, null]);
    isFirst = false;
  };
  feed.onchange = ({ op, row, before, offset }) => write([`thing:${op}`, row ?? before?.name ?? null, offset]);
  feed.start();
  return {
    stop() {
      write(['state', [...feed.items.values()]]);
      feed.stop();
    },
  };
}

const kinds = { bare, official, page };
const clients = JSON.parse(process.argv[2]).map((options) => {
  const file = createWriteStream(options.file);
  const client = kinds[options.kind](options, (entry) => file.write(`${JSON.stringify(entry)}\n`));
  return { client, file };
});
process.stdin.on('end', async () => {
  for (const { client } of clients) client.stop();
  await Promise.all(clients.map(({ file }) => new Promise((done) => file.end(done))));
  process.exit();
});
process.stdin.resume();
