/**
 * Watches a server with JavaScript clients and writes down everything they receive, one JSON line each:
 *
 *   ["list", offset, rows]                            a list loaded from REST
 *   ["hello", recovered, offset, socket.recovered]    a connection was accepted; the last is null while the database
 *                                                     was away, when it cannot be true
 *   [event, what, offset]                             a change, as in ["thing:create", {...}, ...]; `topic:reload`
 *                                                     if a topic must be loaded again
 *   ["state", rows]                                   the items of a page's feed.js at the end
 *
 * Argument: a JSON array of {kind, url, transports, file}; kind is `official` (list, then stream),
 * `bare` (a plain io(), without a list; `since` is the offset it has, if any) or `page` (static/feed.js). Stops
 * when standard input ends.
 */

import { createWriteStream } from 'node:fs';
import { io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const RECONNECTION = { reconnectionDelay: 200, reconnectionDelayMax: 1000, timeout: 5000 };
const LIST_TIMEOUT_MS = 10_000;

function note(socket, write, isOurs = () => true) {
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
      if (isOurs(event)) write([event, what, offset]);
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
    const socket = io(address, { ...options, ...RECONNECTION, transports });
    note(socket, write, (event) => !event.startsWith('thing:')); // feed.js reports those
    return socket;
  };
  const feed = new Feed({ io: watched, list: '/api/things', topic: 'thing', server: url });
  feed.onload = (items) => write(['list', feed.offset, [...items.values()]]);
  feed.onchange = ({ op, row, name, offset }) => write([`thing:${op}`, row ?? name, offset]);
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
